"""What a model is worth and what it costs: perplexity, bits, bytes, experts really used."""
