"""Hold a model with what was discovered in it, and repeat the discovery when that is in doubt."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor, nn

from attn_monitor.capture.choose_forward import Discovery, ForwardOption, find_discovery
from attn_monitor.capture.inputs import check_finite, check_images
from attn_monitor.capture.layer_selection import Layers, QuerySpec
from attn_monitor.capture.observe.forward import check_materialised
from attn_monitor.capture.observe.isolation import model_device_dtype
from attn_monitor.capture.recheck_places import places_hold
from attn_monitor.capture.site_cache import Doubt, forget, same_places, structure_of


class WatchedModel:
    """Discover a model's attention where nothing is known of it yet, or its modules or the image size are others.

    Args:
        model: The model.
        options: The ways to call it.
        axes: Names of the images' dimensions, None to ask the model.
        layers: The requested layers. A way to call the model under which they can be read is preferred.
        query: The requested query, likewise.
    """

    def __init__(
        self, model: nn.Module, options: Sequence[ForwardOption], axes: str | None, layers: Layers, query: QuerySpec
    ) -> None:
        self.model, self.options, self.axes = model, options, axes
        self.layers, self.query = layers, query
        self.discovery: Discovery | None = None

    def look(self, images: Tensor) -> tuple[Tensor, Discovery]:
        """Return images (B, C, *size) for the model, and its sites for the current modules and image size."""
        images = check_images(images)
        known, structure = self.discovery, structure_of(self.model)
        if known is None or structure != known.known.conditions.structure:
            check_materialised(self.model)
        device, dtype = model_device_dtype(self.model)
        images = images.to(device=device, dtype=dtype)
        if known is None or not known.covers(images, structure):
            check_finite(images)
            known = find_discovery(
                self.model, images, self.axes, self.options, structure, layers=self.layers, query=self.query
            )
            self.discovery = known
        return known.axes.channels_first(images), known

    def doubt(self, images: Tensor, *, last: bool = False) -> Doubt:
        """Return whether the discovery still holds, see `AttentionRecorder.doubt`."""
        return self._doubt(self.look(images)[1], last=last)

    def check_places(self, images: Tensor) -> Doubt:
        """Run the model on a few coded images to check the token-to-patch assignment."""
        images, discovery = self.look(images)
        known = discovery.known
        hold = places_hold(self.model, images, discovery.forward, known.sites, known.recordings)
        return Doubt.NONE if hold else Doubt.MOVED

    def discover_again(self, images: Tensor, doubt: Doubt) -> bool:
        """Discover the sites again; return whether tokens had moved, so that recordings may be in the old order."""
        before = self.look(images)[1].sites
        self.drop(with_cache=doubt == Doubt.MOVED)
        now = self.look(images)[1].sites
        lost = {site.key for site in before if site.layout is not None} - {s.key for s in now if s.layout is not None}
        return doubt == Doubt.MOVED and (bool(lost) or not same_places(before, now))

    def follow(self, images: Tensor, *, recording: bool) -> tuple[Tensor, Discovery]:
        """Repeat the discovery if it is in doubt, then return as `look`; check the tokens only before a recording."""
        found = self.look(images)
        doubt = self._doubt(found[1])
        if doubt == Doubt.DUE and recording:
            doubt = self.check_places(images)
        if doubt < Doubt.CHANGED:
            return found
        if self.discover_again(images, doubt):
            warnings.warn(
                f"the tokens of {type(self.model).__name__} hold other parts of the image than before, and its "
                "attention is read in the new order from now on. Recordings since the latest check of the places "
                "(they come after 1, 2, 4, 8, … recordings) may be in the old order: record those again",
                stacklevel=4,
            )
        return self.look(images)

    def drop(self, *, with_cache: bool) -> None:
        """Discover the sites again the next time, or take them from the cache if they still hold."""
        self.discovery = None
        if with_cache:
            forget(self.model)

    def _doubt(self, discovery: Discovery, *, last: bool = False) -> Doubt:
        return discovery.known.doubt(self.model, discovery.option.forward, last=last)
