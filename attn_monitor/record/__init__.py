"""What is kept: the probe's images, snapshots of their attention, and the archive folder on disk."""
