"""Audit of a dataset: uninformative captions, boilerplate, languages, near-duplicate images."""
