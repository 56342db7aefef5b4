"""Follow a training run: when to take snapshots, which images to watch, where to write, and what to report."""
