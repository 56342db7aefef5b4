"""Facts of a training run: when to look, on which images, in which folder, and what is told about it."""
