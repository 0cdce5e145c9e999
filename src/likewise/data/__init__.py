"""Datasets of captioned images: import, decoding, caching, filters and audit."""
