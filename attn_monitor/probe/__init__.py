"""The probe: the fixed images on which attention is recorded, their masks and their normalisation."""
