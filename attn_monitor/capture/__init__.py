"""A model and images become `LayerAttention`: what ran is observed, its places are found, its rows are read.

Needs PyTorch alone, and knows nothing of metrics, files, pictures or loggers.
"""
