"""Experiments: one file each. An experiment times ours and its peers in one run, interleaved."""
