"""Snapshots become pixels, uint8 (height, width, 3), and JPEG or GIF bytes; nothing here knows where they go.

A colour table goes into `colormap.py`, a colour scale into `scales.py`, a kind of picture beside `panels.py`.
"""
