"""Compute metrics, health flags and the verdict: of attention, patches, global features, prototypes and weights."""
