"""What runs a model on a device."""
