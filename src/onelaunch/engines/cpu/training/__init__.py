"""The CPU engine's training step: forward and backward of a micro-step in one compiled call."""
