"""Draw snapshots as pixels, uint8 (height, width, 3), and encode them as JPEG, GIF, WebP or MP4.

A new colour table goes into `colormap.py`, a colour scale into `scales.py`, a kind of picture beside `panels.py`.
"""
