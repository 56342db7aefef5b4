"""What is drawn of snapshots for loggers: panels, film strips, charts, overlays, at the end table and time-lapse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attn_monitor import functional as F
from attn_monitor.draw import animations, panels, strips
from attn_monitor.draw.cells import CellPainter
from attn_monitor.draw.layer_heat_map import HEAT_SCALES, layer_heat_map
from attn_monitor.draw.logit_chart import logit_chart
from attn_monitor.draw.maps import map_statistics
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.measure.metrics import LARGEST
from attn_monitor.probe.probe_batch import ProbeBatch
from attn_monitor.publish.sink import HeadCurves, HeadRow, Overlay, Picture
from attn_monitor.publish.tags import renamed
from attn_monitor.record.curves import Curves
from attn_monitor.snapshot import Snapshot
from attn_monitor.workers import safe_point

OVERLAID_IMAGES = 2
THUMBNAIL = 64  # pixels


class Pictures:
    """Draws for one probe in one style; ``name`` is that of the callback."""

    def __init__(self, probe: ProbeBatch, style: DrawingOptions, name: str = "") -> None:
        self.probe, self.style, self.name = probe, style, name

    def of_image(
        self, index: int, snapshot: Snapshot, history: Sequence[Snapshot], layers: Sequence[int]
    ) -> Iterator[Picture]:
        """A panel and a film strip of each layer."""
        name, photo, masks = snapshot.names[index], self.probe.pixels[index], self.probe.masks
        truth, caption = None if masks is None else masks[index].numpy(), f"{name}, step {snapshot.step}"
        for layer in layers:
            safe_point()
            suffix = f"/layer{layer}" if len(layers) > 1 else ""
            panel = panels.panel(
                snapshot, index, photo, layer=layer, truth=truth, caption=self.probe.caption, options=self.style
            )
            safe_point()
            strip = strips.filmstrip(history, index, photo, layer=layer, options=self.style)
            yield Picture(renamed(f"attn_maps/{name}{suffix}", self.name), panel, caption)
            yield Picture(renamed(f"attn_filmstrip/{name}{suffix}", self.name), strip, caption)

    def of_run(self, snapshot: Snapshot, curves: Curves) -> Iterator[Picture]:
        """Charts of the whole run up to a snapshot, and where it has several layers, all of their heads at a glance."""
        if logits := curves.of(LARGEST):
            caption = f"largest logits, step {snapshot.step}"
            yield Picture(renamed("attn_overview/logits", self.name), logit_chart(logits), caption)
        if len({layer for _, layer in snapshot.layers}) == 1:
            return
        for name, scale in HEAT_SCALES.items():
            heat_map = layer_heat_map(snapshot, scale)
            if heat_map is not None:
                tag = renamed(f"attn_overview/heads_{name}", self.name)
                yield Picture(tag, heat_map, f"{name} of all heads, step {snapshot.step}")

    def overlays(self, snapshot: Snapshot, layer: int) -> list[Overlay]:
        """Mass masks of every head of the last role, for the first few images."""
        attention = snapshot.layer(snapshot.roles[-1], layer)
        masks = map_statistics(attention.maps, self.style.threshold).mask
        overlays = []
        for image, photo in enumerate(self.probe.pixels[:OVERLAID_IMAGES]):
            safe_point()
            enlarged = attention.grid.over_pixels(masks[image].float(), (photo.shape[0], photo.shape[1])).numpy()
            layers = {f"head {head}": mask for head, mask in enumerate(enlarged)}
            tag = renamed(f"attn_overlay/{snapshot.names[image]}", self.name)
            overlays.append(Overlay(tag, photo, layers))
        return overlays

    def timelapse(self, history: Sequence[Snapshot]) -> bytes:
        """An animated GIF of all images, one frame a step."""
        return animations.gif(animations.timelapse(history, list(self.probe.pixels), options=self.style))

    def head_rows(self, snapshot: Snapshot) -> list[HeadRow]:
        """Every head on every image, in the last captured layer of each role."""
        rows = []
        for role in snapshot.roles:
            attention = snapshot.layer(role)
            said = map_statistics(attention.maps, self.style.threshold)  # (B, H)
            for image, photo in enumerate(self.probe.pixels):
                safe_point()
                painter = CellPainter(photo, attention.grid, self.style, THUMBNAIL)
                for head, cell in enumerate(painter.paint(attention.maps[image].numpy())):
                    numbers = float(said.entropy[image, head]), float(said.mask_area[image, head])
                    rows.append(HeadRow(snapshot.names[image], role, attention.layer, head, *numbers, cell))
        return rows


def entropy_curves(history: Sequence[Snapshot]) -> list[HeadCurves]:
    """Of each role and layer, the mean entropy over images of every head at every step."""
    curves: dict[tuple[str, int], dict[int, list[float]]] = {}
    for snapshot in history:
        safe_point()
        for key, attention in snapshot.layers.items():
            curves.setdefault(key, {})[snapshot.step] = F.entropy(attention.maps.flatten(-2)).mean(0).tolist()
    return [
        HeadCurves(role, layer, list(by_step), list(zip(*by_step.values(), strict=True)))
        for (role, layer), by_step in curves.items()
    ]
