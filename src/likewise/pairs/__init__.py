"""Pair sampling: which images become positive pairs."""
