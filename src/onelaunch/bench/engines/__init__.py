"""The engines against what a user could pick instead: forward, generation, training, error."""
