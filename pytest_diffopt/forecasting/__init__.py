"""Forecasts: what a full-size pipeline takes on a card, with no GPU and no weights."""
