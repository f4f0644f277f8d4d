"""Where a model's layers, routers and experts are, and how to run it layer by layer."""
