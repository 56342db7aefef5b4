"""Observe a forward pass: the kinds of attention, their rows, and isolation of the model from it."""
