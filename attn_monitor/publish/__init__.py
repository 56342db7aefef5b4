"""Numbers and pixels go to loggers and to the archive, behind training: one module a logger."""
