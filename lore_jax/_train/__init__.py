"""Training: steps, recipes, the search for settings, and records to resume from."""
