"""Experiments by the published study that they repeat."""
