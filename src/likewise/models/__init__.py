"""Backbones, image encoders, text towers, and their weight files."""
