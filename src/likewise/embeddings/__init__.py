"""Captions turned into vectors by a pretrained language model."""
