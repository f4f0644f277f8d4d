"""Ways to write a finished run down, found through the entry points ``mcsharp_sdk.exporters``."""
