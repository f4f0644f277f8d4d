"""Plan a recipe, run its stages in order, and keep what they made."""
