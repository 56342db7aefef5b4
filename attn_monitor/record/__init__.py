"""What is kept: snapshots of attention, and the archive folder on disk."""
