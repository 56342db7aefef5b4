"""Archive files: snapshots of attention, and the history and curves of a run."""
