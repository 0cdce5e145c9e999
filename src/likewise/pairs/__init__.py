"""Positive pairs: configs, candidates, sampling, and statistics without training."""
