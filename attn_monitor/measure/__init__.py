"""`LayerAttention` becomes numbers, and health flags where these are alarming."""
