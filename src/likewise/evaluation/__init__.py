"""Probes on frozen features: what a model knows, measured without changing the model."""
