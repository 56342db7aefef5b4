"""Make the events of a run: at its start, at each snapshot, at its end, and when health flags are raised.

These are pure functions of snapshots, and draw nothing: an event draws when a tracker reads it.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from attn_monitor import functional as F
from attn_monitor.attention import LayerAttention
from attn_monitor.draw import animations, panels, strips
from attn_monitor.draw.canvas import Pixels
from attn_monitor.draw.cells import CellPainter
from attn_monitor.draw.history import Entry
from attn_monitor.draw.layer_heat_map import HEAT_SCALES, HeatScale, layer_heat_map
from attn_monitor.draw.logit_chart import logit_chart
from attn_monitor.draw.maps import map_statistics
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.draw.slices import slice_photo
from attn_monitor.measure.metrics import LARGEST, METRICS, SINK_SHARES
from attn_monitor.measurements import HEALTH_TAG, HealthFlag, MetricKey
from attn_monitor.probe.probe_batch import ProbeBatch
from attn_monitor.record.curves import Curves
from attn_monitor.snapshot import Snapshot
from attn_monitor.trackers import events as ev
from attn_monitor.trackers.naming import prefixed, titled
from attn_monitor.trackers.sink_table import COLUMNS, markdown, sink_rows
from attn_monitor.workers import safe_point

Events = Iterator[ev.Event[Any]]

MASKED_IMAGES = 2
THUMBNAIL = 64  # pixels
VERDICT_TEXT = "attn/health/verdict"  # comes before attn_monitor, as TensorBoard sorts / and _ alike
HEAD_COLUMNS = ("image", "role", "layer", "head", "entropy", "mask area", "attention")


def events_at_start(snapshot: Snapshot, drawing: DrawingOptions, settings: str, name: str, *, heads: bool) -> Events:
    """Yield a text on how to read the pictures, and a layout of charts that show several curves.

    Args:
        snapshot: the first snapshot.
        drawing: how pictures are drawn.
        settings: Markdown on how the run is watched, for the text.
        name: of the callback in tags, empty for none.
        heads: whether single heads are logged as curves.
    """
    text = _how_to_read(drawing, settings, name, heads)
    yield ev.Text("attn_monitor/how_to_read", lambda: text)
    # The first snapshot has no drift yet, but later ones do.
    metrics = [m for m in METRICS if m == "drift" or any(key.metric == m for key in snapshot.metrics)]
    charts = _charts_of_means(snapshot, metrics)
    for (role, layer), metric in itertools.product(snapshot.layers, metrics if heads else ()):
        if MetricKey(role, layer, metric, 0) in snapshot.metrics or metric == "drift":
            tags = f"attn_heads/{role}/layer{layer}/{metric}/head.*"
            charts[f"{_words(metric)} per head", f"{role}, layer {layer}"] = tags
    yield ev.Layout("attn_heads", lambda: charts)


def _charts_of_means(snapshot: Snapshot, metrics: Sequence[str]) -> dict[tuple[str, str], str]:
    """Return a chart for each metric, of the roles side by side; of several layers one for each role."""
    several = len({layer for _, layer in snapshot.layers}) > 1
    if several:
        return {
            (f"{_words(metric)} per layer", role): f"attn/{re.escape(role)}/layer[0-9]+/{metric}$"
            for metric, role in itertools.product(metrics, snapshot.roles)
        }
    roles = "|".join(map(re.escape, snapshot.roles))
    charts = {("means", _words(metric)): f"attn/({roles})/layer[0-9]+/{metric}$" for metric in metrics}
    return charts if len(snapshot.roles) > 1 else {}


def _words(metric: str) -> str:
    return metric.replace("_", " ")


def events_at_snapshot(
    snapshot: Snapshot,
    history: Sequence[Entry],
    curves: Curves,
    probe: ProbeBatch,
    drawing: DrawingOptions,
    layers: Sequence[int],
) -> Events:
    """Yield panels and film strips of each image, charts of the run so far, histograms, and switchable masks.

    Args:
        snapshot: the latest snapshot.
        history: the past for film strips, the latest snapshot included.
        curves: metrics of the run so far.
        probe: the images.
        drawing: how to draw them.
        layers: the layers with a panel and a film strip for each image.
    """
    # Once for all events, which are listed while training waits.
    photos, truths = probe.pixels, None if probe.masks is None else probe.plane_masks.numpy()
    for (index, image), layer in itertools.product(enumerate(snapshot.names), layers):
        suffix, caption = f"/layer{layer}" if len(layers) > 1 else "", f"{image}, step {snapshot.step}"
        settings: dict[str, Any] = {"layer": layer, "options": drawing}
        photo, truth = photos[index], None if truths is None else truths[index]
        shown: dict[str, Any] = {"caption": probe.shown_caption, "frames": probe.frames_of(index)}
        panel = partial(_panel, history[-1], index, photo, truth=truth, **shown, **settings)
        yield ev.Picture(f"attn_maps/{image}{suffix}", panel, caption=caption)
        below = slice_photo(probe.frames_of(index), photo, snapshot.layer(snapshot.roles[-1], layer), drawing)
        strip = partial(_filmstrip, history, index, below, **settings)
        yield ev.Picture(f"attn_filmstrip/{image}{suffix}", strip, caption=caption, so_far=True)
    if logits := curves.of(LARGEST):
        caption = f"largest logits, step {snapshot.step}"
        yield ev.Picture("attn_overview/logits", partial(logit_chart, logits), caption=caption, so_far=True)
    of_heads = {key.metric for key, value in snapshot.metrics.items() if key.head is not None and not math.isnan(value)}
    several = len({layer for _, layer in snapshot.layers}) > 1
    for title, scale in HEAT_SCALES.items() if several else ():
        if of_heads.isdisjoint(scale.metrics):
            continue
        caption = f"{title} of all heads, step {snapshot.step}"
        yield ev.Picture(f"attn_overview/heads_{title}", partial(_heat_map, snapshot, scale), caption=caption)
    for (role, layer), attention in snapshot.layers.items():
        yield ev.Histogram(f"attn_histogram/{role}/layer{layer}/entropy", partial(_entropies, attention))
    attention = snapshot.layer(snapshot.roles[-1], layers[-1]).in_plane()
    masks = ev.Once(lambda: map_statistics(attention.maps, drawing.threshold).mask)
    for index, image in enumerate(snapshot.names[:MASKED_IMAGES]):
        yield ev.Masks(f"attn_overlay/{image}", partial(_head_masks, attention, masks, index, photos[index]))


def events_at_end(
    last: Snapshot,
    history: Sequence[Snapshot],
    curves: Curves,
    probe: ProbeBatch,
    drawing: DrawingOptions,
) -> Events:
    """Yield the verdict, a time-lapse, the table of attention sinks, and a table and line charts of all heads.

    Args:
        last: the last snapshot.
        history: snapshots for the time-lapse and the line charts.
        curves: metrics of the run.
        probe: the images.
        drawing: how to draw them.
    """
    photos = list(probe.pixels)
    if last.verdict is not None:
        yield ev.Text(VERDICT_TEXT, partial(str, last.verdict), sums_up=True)
    yield ev.Animation("attn_timelapse", lambda: animations.gif(animations.timelapse(history, photos, options=drawing)))
    if any(key.metric in SINK_SHARES for key in last.metrics):
        rows = ev.Once(lambda: sink_rows(last, curves))
        yield ev.Table("attn_sinks", rows, columns=COLUMNS)
        yield ev.Text("attn_monitor/sinks", lambda: markdown(COLUMNS, rows()))
    yield ev.Table("attn_table", partial(_head_rows, last, photos, drawing), columns=HEAD_COLUMNS)
    for role, layer in dict.fromkeys(key for snapshot in history for key in snapshot.layers):
        lines, title = partial(_entropy_lines, history, role, layer), f"entropy per head, {role}, layer {layer}"
        yield ev.Lines(f"attn_heads_chart/{role}/layer{layer}", lines, title)


def events_of_flags(flags: Sequence[HealthFlag]) -> Events:
    """Yield health flags as a text and as an alert."""
    text = "\n".join(f"- {flag}" for flag in flags)
    yield ev.Text("attn/health/flags", lambda: text)
    yield ev.Alert("attn_health", lambda: text, "attention health")


def _how_to_read(drawing: DrawingOptions, settings: str, name: str, heads: bool) -> str:
    colours = (
        "Colours are fixed: attention in units of **uniform** attention (weight × number of patches), on a log scale "
        "from half of uniform to 32 times uniform. A flat purple map says that attention is uniform."
        if drawing.scale == "uniform"
        else "Colours stretch each map from its own minimum to its own maximum, so strengths cannot be compared."
    )
    tags = ("attn_filmstrip", "attn_maps", "attn_overview/logits", HEALTH_TAG)
    strips_tag, panels_tag, logits_tag, health_tag = (prefixed(tag, name) for tag in tags)
    return (
        f"### {titled('How to read the attention maps', name)}\n\n{colours} Outlined in cyan: the smallest set of "
        f"patches that holds {drawing.threshold:.0%} of the attention on patches. **H** is the entropy over patches (1 "
        "uniform, 0 one patch); the percentage is the outlined area; with H 1.00 there is none. "
        "Ground truth, where there is some, is green. **PCA of a layer's input**: the patch features that enter it as "
        "colours, which keep their meaning over the run; patches alike in features are alike in colour, on all images. "
        f"`{strips_tag}` shows the steps so far in one picture; start TensorBoard with `--samples_per_plugin "
        f"images=1000` to see more than ten steps of `{panels_tag}`. `{logits_tag}` has the largest logit of every "
        f"layer over the run. *Custom Scalars* shows several curves in one chart, {_HEADS[heads]}; "
        f"`{health_tag}` counts health flags.\n\n{settings}"
    )


_HEADS = {True: "all heads of a layer too", False: 'and with `heads="curves"` all heads of a layer too'}


def _panel(entry: Entry, *settings: Any, **more: Any) -> Pixels:
    return panels.panel(entry.colored(), *settings, **more)


def _filmstrip(entries: Sequence[Entry], *settings: Any, **more: Any) -> Pixels:
    return strips.filmstrip([entry.colored() for entry in entries], *settings, **more)


def _heat_map(snapshot: Snapshot, scale: HeatScale) -> Pixels:
    picture = layer_heat_map(snapshot, scale)
    assert picture is not None
    return picture


def _entropies(attention: LayerAttention) -> ev.Array:
    """Return the finite entropies of all heads on all images, (n,)."""
    values: ev.Array = F.entropy(attention.on_patches).flatten().numpy()
    return values[np.isfinite(values)]


def _head_masks(
    attention: LayerAttention, masks: ev.Once[Tensor], index: int, photo: Pixels
) -> tuple[Pixels, dict[str, ev.Array]]:
    size = (photo.shape[0], photo.shape[1])
    enlarged = attention.grid.over_pixels(masks()[index].float(), size).bool().numpy()
    return photo, {f"head {head}": mask for head, mask in enumerate(enlarged)}


def _head_rows(snapshot: Snapshot, photos: Sequence[Pixels], drawing: DrawingOptions) -> list[Sequence[Any]]:
    """Return a row for each head on each image, of the last captured layer of each role."""
    rows: list[Sequence[Any]] = []
    for role in snapshot.roles:
        attention = snapshot.layer(role).in_plane()
        numbers = map_statistics(attention.maps, drawing.threshold)  # (B, H)
        for index, photo in enumerate(photos):
            safe_point()
            painter = CellPainter(photo, attention.grid, drawing, THUMBNAIL)
            for head, cell in enumerate(painter.paint(attention.maps[index].numpy())):
                entropy, area = float(numbers.entropy[index, head]), float(numbers.mask_area[index, head])
                rows.append((snapshot.names[index], role, attention.layer, head, entropy, area, cell))
    return rows


def _entropy_lines(history: Sequence[Snapshot], role: str, layer: int) -> tuple[list[int], list[tuple[float, ...]]]:
    """Return the steps, and for each head its entropy at these, averaged over images."""
    layers = {s.step: s.layers[role, layer] for s in history if (role, layer) in s.layers}
    values = [F.entropy(attention.on_patches).mean(0).tolist() for attention in layers.values()]
    return list(layers), list(zip(*values, strict=True))
