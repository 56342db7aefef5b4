"""Pictures of single maps, each in a file of its own, as DINO's `visualize_attention.py` writes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from attn_monitor import functional as F
from attn_monitor.draw.canvas import Array, Pixels
from attn_monitor.draw.maps import mean_and_heads
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.draw.single import PixelPictures
from attn_monitor.record.file_names import tag_safe_names
from attn_monitor.snapshot import Snapshot


def separate_pictures(
    snapshot: Snapshot,
    photos: Array,
    *,
    role: str,
    hatched: Mapping[int, Tensor] | None = None,
    options: DrawingOptions = DrawingOptions(),
) -> Iterator[tuple[str, Pixels]]:
    """Yield names of files and pictures of every image and layer, in the size of the photos (B, H, W, 3).

    img.png, and for each layer heatmap.png, overlay.png and mask_th{t}_mean.png (the mean over heads), attn-head{j}.png
    and mask_th{t}_head{j}.png. Several images have a folder each, and several layers folders in it. ``hatched`` are
    patches by layer, bool (B, gh, gw), that were left out of the maps.
    """
    layers = snapshot.layers_of(role)
    for image, (name, photo) in enumerate(zip(tag_safe_names(snapshot.names), photos, strict=True)):
        of_image = f"{name}/" if len(photos) > 1 else ""
        yield f"{of_image}img.png", photo
        for layer in layers:
            of_layer = f"{of_image}layer{layer}/" if len(layers) > 1 else of_image
            patches = None if hatched is None or layer not in hatched else hatched[layer][image].numpy()
            attention = snapshot.layer(role, layer).in_plane()
            drawing = PixelPictures(photo, attention.grid, options, patches)
            for stem, picture in _pictures(attention.maps[image], drawing):
                yield f"{of_layer}{stem}.png", picture


def _pictures(maps: Tensor, drawing: PixelPictures) -> Iterator[tuple[str, Pixels]]:
    """Yield the stems of file names, and pictures of one image's maps (H, gh, gw)."""
    shown, labels = mean_and_heads(maps, drawing.options.drawn_heads)
    masks = F.mass_mask(shown.flatten(1), drawing.options.threshold).view_as(shown).numpy()
    for label, weights, mask in zip(labels, shown.numpy(), masks, strict=True):
        name = label.replace(" ", "")
        yield "heatmap" if name == "mean" else f"attn-{name}", drawing.heat_map(weights)
        if name == "mean":
            yield "overlay", drawing.heat_map_over(weights)
        yield f"mask_th{drawing.options.threshold}_{name}", drawing.masked(mask)
