"""What is said of the recipes of a run: rows of figures, and how a terminal shows them."""
