"""Which key and which query of an attention is which patch, and which is CLS: found by running the model."""
