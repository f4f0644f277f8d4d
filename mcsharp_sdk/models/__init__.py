"""Where a model's layers, routers and experts are, and how to run it one decoder layer at a time."""
