"""What happens while a recipe runs, written down as plain data."""
