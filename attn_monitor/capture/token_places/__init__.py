"""Assign the keys and queries of each attention to patches and to the CLS token, by running the model."""
