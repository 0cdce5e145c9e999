"""The audit: what is wrong with the captions and the images of a collection, and which take no part."""
