"""Differentiable functions on tensors, each usable alone: a folder per operator."""
