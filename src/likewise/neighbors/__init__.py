"""Nearest neighbors of images by caption or image embeddings: exact and approximate search."""
