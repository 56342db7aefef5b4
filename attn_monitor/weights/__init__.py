"""Models by name, and their weights: from libraries, from files and folders of checkpoints."""
