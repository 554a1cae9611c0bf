"""Experiments by room. An experiment times ours and its peers in one run, interleaved.

core/ is what they share; studies/ and engines/ hold them, on core/ and peers/ alone; report/ reads
their records. experiments.py names them, imports none, and may be imported by all.
"""
