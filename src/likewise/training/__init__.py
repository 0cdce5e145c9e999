"""Training an image encoder on pairs."""
