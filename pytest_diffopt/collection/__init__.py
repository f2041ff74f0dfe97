"""What pytest collects, and what the markers do: recipe files become items, and tests are watched."""
