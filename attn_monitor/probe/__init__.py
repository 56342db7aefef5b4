"""The images that attention is watched on: a value, read from folders, shown in the colours of its normalisation."""
