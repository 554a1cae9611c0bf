"""Engines: each runs a model on a device."""
