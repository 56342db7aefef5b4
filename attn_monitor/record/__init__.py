"""Archive files: snapshots of attention, and the curves of a run."""
