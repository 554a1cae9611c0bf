"""Text generation on any engine: prompts, decoding, stop strings."""
