"""The compressed model that transformers loads and runs."""
