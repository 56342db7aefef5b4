"""Turn snapshots into events (pictures, tables, …), and log the kinds that each tracker supports.

Every tracker is one module. Event files, W&B runs, MLflow artifacts and an archive are written in the background.
"""
