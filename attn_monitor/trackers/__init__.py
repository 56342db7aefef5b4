"""Snapshots become events (pictures, tables, …), and each tracker, one file, takes the kinds that it can show.

What a snapshot holds goes in; event files, W&B runs, MLflow artifacts and an archive come out, behind training.
"""
