"""What is asked of an encoder's feature maps: objects and pixels."""
