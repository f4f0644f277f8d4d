"""Figures of results, written as text: they need no plotting library."""
