"""A training step in a few kernels per layer: row-wise Triton kernels between matrix products."""
