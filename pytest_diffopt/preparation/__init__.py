"""A live pipeline out of a recipe, and every global given back after it."""
