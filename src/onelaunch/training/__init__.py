"""Training: recipes, data, the loop, its telemetry."""
