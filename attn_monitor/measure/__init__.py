"""Compute metrics and health flags from `LayerAttention`."""
