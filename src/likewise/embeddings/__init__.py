"""Caption and image embeddings of a dataset by pretrained encoders."""
