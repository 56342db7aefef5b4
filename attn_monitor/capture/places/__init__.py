"""Which key and which query of an attention is which patch, and which is CLS: asked of the model at every depth."""
