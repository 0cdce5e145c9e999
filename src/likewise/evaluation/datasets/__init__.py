"""Evaluation datasets: labels, captions, boxes or masks, from files or downloaded by name."""
