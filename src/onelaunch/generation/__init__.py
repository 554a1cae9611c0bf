"""Text in, text out, on top of any engine."""
