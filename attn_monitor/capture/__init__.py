"""Record a model's attention on images as `LayerAttention`: observe the operations, find the tokens, read the rows.

This package needs PyTorch and NumPy alone and does not depend on metrics, files, drawing or loggers.
"""
