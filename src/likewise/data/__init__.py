"""Captioned images on disk: what they are, where their bytes lie, and how they are read."""
