"""Pictures for notebooks: sheets of a snapshot's or a layer's maps, and a matplotlib figure."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from attn_monitor.attention import LayerAttention
from attn_monitor.draw.canvas import GAP, HEADER, LINE, Pixels, blank_picture, draw_text, draw_text_within, up_to_block
from attn_monitor.draw.cells import CellPainter
from attn_monitor.draw.legend import LEGEND, draw_legend
from attn_monitor.draw.maps import map_statistics, mean_and_heads
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.draw.scales import HIGH, LOW, SCALES
from attn_monitor.draw.slices import has_slices, mean_in_slices, shown_slices, slice_word
from attn_monitor.extras import needs
from attn_monitor.record.thinning import thin
from attn_monitor.snapshot import Snapshot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHEET_IMAGES, SHEET_WIDTH, CELL = 4, 1200, 128  # images; pixels: all columns about, a cell at most


def snapshot_sheet(snapshot: Snapshot, options: DrawingOptions = DrawingOptions()) -> Pixels:
    """Draw head mean and heads of the last role's last layer on the first four images, (height, width, 3).

    The title says which role, layer and images of how many. Maps are not over photographs, which a snapshot does not
    hold; `panel` draws these. Of clips and volumes they are their mean, with frames or slices in a second line.
    """
    role = snapshot.roles[-1]
    of = f" of {' and '.join(snapshot.roles)}" if len(snapshot.roles) > 1 else ""
    return _sheet(snapshot.layer(role), snapshot.names, f"{role}{of}", f"step {snapshot.step:,}", options)


def layer_sheet(attention: LayerAttention, options: DrawingOptions = DrawingOptions()) -> Pixels:
    """Draw head mean and heads of a layer on the first four images, (height, width, 3)."""
    names = [f"image {n}" for n in range(len(attention.rows))]
    return _sheet(attention, names, attention.model or "attention", f"query {attention.query or 'unknown'}", options)


def _sheet(attention: LayerAttention, names: Sequence[str], of: str, when: str, options: DrawingOptions) -> Pixels:
    whole = attention.to("cpu")
    attention = whole.in_plane()
    shown = min(SHEET_IMAGES, len(names))
    images = f"{shown} of {len(names)} images" if shown < len(names) else ""
    parts = [of, f"layer {attention.layer} ({attention.name})", when, images]
    rows = [mean_and_heads(maps, options.drawn_heads) for maps in attention.maps[:SHEET_IMAGES]]
    labels = rows[0][1]
    painter = CellPainter(blank_picture(8, 8), attention.grid, options, min(CELL, SHEET_WIDTH // len(labels)))
    height, width = painter.size
    down, across = up_to_block(height) + LINE + GAP, up_to_block(width) + GAP
    slices = thin(shown_slices(whole), max(len(labels), min(8, SHEET_WIDTH // across)))
    wide = max(len(labels), len(slices)) * across + GAP
    size = max(wide, 58 * GAP), HEADER + len(rows) * (down * (1 + bool(slices)) + 2 * LINE) + LEGEND
    sheet = Image.fromarray(blank_picture(*size))
    draw_text_within(sheet, (GAP, 7), " · ".join(filter(None, parts)), size[0] - 2 * GAP, 17)
    y = HEADER
    for image, (name, (maps, _)) in enumerate(zip(names, rows, strict=False)):
        draw_text(sheet, (GAP, y), name, 15)
        y += 3 * GAP
        lines = [(labels, maps, map_statistics(maps, options.threshold).mask)]
        if slices:
            in_slices, masks = mean_in_slices(whole, image, options)
            captions = [f"{slice_word(whole)} {number}" for number in slices]
            lines.append((captions, in_slices[slices], masks[slices]))
        for captions, values, masks in lines:
            pictures = painter.paint(values.numpy(), masks.numpy())
            for column, (label, picture) in enumerate(zip(captions, pictures, strict=True)):
                sheet.paste(Image.fromarray(picture), (GAP + column * across, y))
                draw_text_within(sheet, (GAP + column * across, y + height + 2), label, across, 13)
            y += down
        y += GAP
    draw_legend(sheet, y + 6, options)
    return np.asarray(sheet)


def png_of(picture: Pixels) -> bytes:
    """Encode a picture as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def snapshot_figure(
    snapshot: Snapshot, image: int = 0, role: str | None = None, layer: int = -1, only: int | None = None
) -> Figure:
    """Plot head mean and heads of one image in units of uniform attention, in the colours of panels.

    Args:
        snapshot: The snapshot.
        image: Index of the probe image.
        role: Role of the model; None for the last.
        layer: Layer; a negative one counts from the last.
        only: Frame or slice of a clip or volume; None for their mean.

    Returns:
        A matplotlib figure, closed in pyplot so that a notebook shows it once.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    with needs("matplotlib", "plot()"):
        import matplotlib.pyplot as plt
        from matplotlib.colors import LogNorm
    whole = snapshot.layer(snapshot.roles[-1] if role is None else role, layer)
    attention = whole.in_plane(only)
    part = (
        ""
        if only is None or not has_slices(whole)
        else f" · {slice_word(whole)} {min(only, whole.grid[0] - 1)} of {whole.grid[0]}"
    )
    maps, labels = mean_and_heads(attention.maps[image], None)
    units = (maps * attention.grid.cells).numpy()
    figure: Figure
    figure, axes = plt.subplots(
        1, len(labels), figsize=(1.6 * len(labels) + 1, 2.4), squeeze=False, layout="constrained"
    )
    for axis, label, values in zip(axes[0], labels, units, strict=True):
        shown = axis.imshow(np.maximum(values, 1e-6), norm=LogNorm(2.0**LOW, 2.0**HIGH), cmap="inferno")
        axis.set(title=label, xticks=[], yticks=[])
    figure.colorbar(shown, ax=axes[0].tolist(), label=SCALES["uniform"].unit)
    of = f"{snapshot.names[image]} · {role or snapshot.roles[-1]} · layer {attention.layer}{part}"
    figure.suptitle(f"{of} · step {snapshot.step:,}")
    plt.close(figure)
    return figure
