"""Snapshots become pixels: panels, film strips, animations. Nothing here knows where they go."""
