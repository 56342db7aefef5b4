"""What patches themselves attend to, in the player: the model is there, so their rows are read once, for one page."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from attn_monitor.attention import LayerAttention
from attn_monitor.capture.attention_distance import has_query_of_each_patch
from attn_monitor.capture.image_channels import image_channels
from attn_monitor.capture.layer_selection import Layers, QuerySpec
from attn_monitor.capture.observe.observation import ReadObservation
from attn_monitor.capture.recorder import AttentionRecorder
from attn_monitor.capture.sites import ReadableSite
from attn_monitor.commands.report import Player
from attn_monitor.commands.support.devices import fitting_size
from attn_monitor.monitor import AttentionMonitor
from attn_monitor.player import blocks
from attn_monitor.player.contents import Contents, Step, images_of, step_facts
from attn_monitor.player.page import page_of_runs
from attn_monitor.player.slices import in_slices, pictures_of
from attn_monitor.probe.probe_batch import ProbeBatch
from attn_monitor.snapshot import Snapshot

ROOM, FILE_ROOM = 3_750_000, 7_000_000  # bytes of rows in a notebook, and in a file; in base64 they take about as much
ROLE = "backbone"


def attention_player(
    model: nn.Module,
    images: ProbeBatch | Tensor | str | os.PathLike[str],
    *,
    layers: Layers = -1,
    query: QuerySpec = "cls",
    height: int = 900,
) -> Player:
    """Show a model's attention in a notebook, interactively; a click on a patch shows what this patch attends to.

    Rows of patches are read a few queries at a time, each is checked against the model's own output, and a kept one
    takes memory linear in the tokens. At most 3.75 MB of them are kept: of all patches of eight images at 224 pixels
    for ViT-S/16 and one layer, else of every second patch in each direction, every third, and so on; then the page
    shows the nearest. Fewer images, or layers, leave room for more.

    Args:
        model: runs on its device, in evaluation mode.
        images: a probe, normalised images (B, C, H, W), an image file or a folder.
        layers: index, module path, list of these, or "all".
        query: whose attention is shown before a patch is clicked, as in `record_attention`.
        height: of the frame, in pixels.

    Returns:
        An object for the end of a notebook's cell.

    Raises:
        AttentionError: the attention of a layer cannot be read.
        ProbeError: an image is missing or unreadable.

    Example:
        >>> from timm.models import VisionTransformer
        >>> model = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
        >>> player = attention_player(model.eval(), torch.randn(1, 3, 32, 32))
        >>> player._repr_html_()[:29]
        '<iframe sandbox="allow-script'
    """
    if isinstance(images, Tensor):
        probe = ProbeBatch(images)
    elif isinstance(images, ProbeBatch):
        probe = images
    else:
        size = fitting_size(model, None)
        channels, axes = image_channels(model, size)
        probe = ProbeBatch.from_folder(images, size=size, channels=channels, axes=axes)
    monitor = AttentionMonitor(probe, layers=layers, query=query, features=True)
    snapshot = monitor.colored(monitor.snapshot({ROLE: model}, step=0))
    return Player(page_of_model(model, probe, snapshot, query, ROOM), height)


def page_of_model(model: nn.Module, probe: ProbeBatch, snapshot: Snapshot, query: QuerySpec, room: int) -> str:
    """Return the player's page of one snapshot of a model, with attention of as many patches as fit into ``room``."""
    wanted = {layer: snapshot.layer(ROLE, layer) for layer in snapshot.layers_of(ROLE)}
    rows, notes = rows_of_patches(model, probe.images, wanted, query, room)
    pictures = pictures_of(snapshot, probe)
    shown = replace(in_slices(snapshot, len(pictures.names)), verdict=None)  # this is no run
    of_patches = {(ROLE, layer): found for layer, found in rows.items()}
    packed = blocks.blocks(shown, of_patches=of_patches)
    step = Step(step_facts(shown), blocks.layout_of(shown, of_patches=of_patches), packed)
    return page_of_runs([Contents(type(model).__name__, images_of(probe, pictures), [step], ". ".join(notes))])


def rows_of_patches(
    model: nn.Module, images: Tensor, layers: Mapping[int, LayerAttention], query: QuerySpec, room: int
) -> tuple[dict[int, blocks.PatchRows], list[str]]:
    """Read rows of patches as queries.

    Args:
        model: runs on its device.
        images: (B, C, H, W), normalised.
        layers: the layers that were recorded, by index.
        query: chooses layers as in `AttentionRecorder`.
        room: bytes that all rows may take, as float16.

    Returns:
        For each layer the rows of chosen patches, float16 on the CPU; and notes: why a layer has none, or not of all.
    """
    plane = {layer: a for layer, a in layers.items() if len(a.grid) == 2}
    notes = [] if len(plane) == len(layers) else ["Attention of patches is shown of images with two axes only"]
    chosen = _chosen(plane, len(images), room)
    found: dict[int, blocks.PatchRows] = {}

    def read(site: ReadableSite, seen: ReadObservation) -> Tensor | None:
        if site.index not in chosen:
            return None
        if not has_query_of_each_patch(site):
            notes.append(f"Layer {site.index}: patches are no queries here, so none has attention of its own")
            return None
        found[site.index], error = _read(site, seen, chosen[site.index], len(images))
        return error

    if chosen:
        AttentionRecorder(model, layers=list(chosen), query=query)(images, on_layer=read)
    for layer, rows in found.items():
        cells = layers[layer].grid.cells
        if len(rows.patches) < cells:
            notes.append(f"Layer {layer}: attention of {len(rows.patches)} of {cells} patches, evenly spaced")
    return found, notes


def _chosen(layers: Mapping[int, LayerAttention], images: int, room: int) -> dict[int, list[int]]:
    """Return patches for each layer: all, or every n-th in each direction, with the least n that fits."""
    if not layers:
        return {}
    for every in range(1, 1 + max(max(a.grid) for a in layers.values())):
        chosen = {layer: _grid_of(a.grid, every) for layer, a in layers.items()}
        taken = sum(2 * images * a.rows.shape[1] * a.rows.shape[2] * len(chosen[layer]) for layer, a in layers.items())
        if taken <= room:
            return chosen
    return chosen  # a single patch, whatever it takes


def _grid_of(grid: Sequence[int], every: int) -> list[int]:
    """Return the indices of every n-th patch in each direction, centred."""
    starts = [((length - 1) % every) // 2 for length in grid]
    rows, columns = (range(start, length, every) for start, length in zip(starts, grid, strict=True))
    return [row * grid[1] + column for row in rows for column in columns]


def _read(
    site: ReadableSite, seen: ReadObservation, patches: Sequence[int], images: int
) -> tuple[blocks.PatchRows, Tensor | None]:
    """Return rows of patches in the order of patches, keys as in `LayerAttention`, and the error of the check."""
    tokens = {site.places.patch_queries[patch]: place for place, patch in enumerate(patches)}
    order = list(site.layout.order)
    rows = torch.empty(images, site.heads, len(patches), len(order), dtype=torch.float16, device="cpu")
    checked = seen.checked_rows
    for queries, chunk, _ in checked.chunks(sorted(tokens)):
        rows[:, :, [tokens[query] for query in queries]] = chunk[..., order].half().cpu()
    return blocks.PatchRows(list(patches), rows), checked.error
