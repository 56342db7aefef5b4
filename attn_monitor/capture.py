"""Run a model on images and observe its attention: `record_attention`, and `AttentionRecorder` to do so repeatedly.

A first forward on noise images finds every attention site, its token layout and what stands in the way of reading
it. From then on only the wanted modules are watched, and the forward is left after the last of them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attn_monitor import functional as F
from attn_monitor.discovery import Site, discover, mismatch
from attn_monitor.errors import NonFiniteAttentionError, UnsupportedAttentionError
from attn_monitor.isolation import model_device_dtype
from attn_monitor.observer import AttentionObserver, SiteKey
from attn_monitor.operations import Observation, Verdict, settle
from attn_monitor.running import Forward, check_materialised, default_forward, is_sharded, run_forward, subtrees
from attn_monitor.selection import Layers, QuerySpec, check_query, cls_index, select_sites
from attn_monitor.sources import Query
from attn_monitor.tokens import TokenStatistics, block_of, watch_tokens

__all__ = [
    "AttentionRecorder",
    "Forward",
    "LayerAttention",
    "Layers",
    "QuerySpec",
    "Site",
    "check_query",
    "record_attention",
]


@dataclass(frozen=True)
class LayerAttention:
    """What one layer's query token attends to, for every image and head.

    ``rows`` is (B, H, T) float32 on the model's device: the prefix tokens first (CLS, registers), then the patches
    row by row; softmax rows sum to 1 over T. ``mixed`` marks layers that do not apply the softmax as it is (talking
    heads, gated mixes). ``verified_error`` is the relative difference between row·V and the model's own output,
    NaN when it was not checked.

    On demand: ``distance`` is the mean attention distance in pixels, (B, H). ``norms`` (B, T), in the rows' order, are
    those of the tokens that enter the layer's block, and ``cosine`` (B,) is the mean cosine between its CLS token and
    its patches; None where a block's input is not these tokens, or has no CLS token.
    """

    layer: int
    name: str
    rows: Tensor
    num_prefix: int
    grid: tuple[int, int]
    mixed: bool
    verified_error: float
    distance: Tensor | None = None
    norms: Tensor | None = None
    cosine: Tensor | None = None

    @property
    def maps(self) -> Tensor:
        """The patch part as images, (B, H, gh, gw), not renormalised: DINO's numbers."""
        maps: Tensor = self.rows[..., self.num_prefix :].unflatten(-1, self.grid)
        return maps


def record_attention(
    model: nn.Module,
    images: Tensor,
    *,
    layers: Layers = -1,
    query: QuerySpec = "cls",
    forward: Forward | None = None,
    verify: bool = True,
) -> list[LayerAttention]:
    """Attention of the model on images (B, C, H, W), one entry per layer asked for.

    ``layers``: an index in order of execution (negative from the end), a module path, a list of these, or "all".
    ``query``: "cls", "mean" (average over all queries), ``(row, col)`` of a patch, or a token index.
    ``forward``: how to call the model when ``model(images)`` is not right. ``verify=False`` skips the comparison of
    row·V with the model's own output. The model is left as it was found.

    Raises a subclass of `AttentionError` with the reason when a map would not be what the model computed.
    """
    recorder = AttentionRecorder(model, layers=layers, query=query, forward=forward, verify=verify)
    return recorder(images)


class AttentionRecorder:
    """Records the same layers again and again, remembering what it found out about the model.

    ``verify``: True checks the first recording and each one after the model or the image size changed; "always"
    checks every one; False none. ``nonfinite`` "raise" refuses rows with NaN or infinity, "keep" returns them.
    ``distance`` also measures the mean attention distance over all queries, ``tokens`` what enters each block.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Layers = -1,
        query: QuerySpec = "cls",
        forward: Forward | None = None,
        verify: bool | str = True,
        nonfinite: str = "raise",
        distance: bool = False,
        tokens: bool = False,
    ) -> None:
        if verify not in (True, False, "always"):
            raise ValueError(f'verify={verify!r}: expected True (first time), False (never) or "always"')
        self.model: nn.Module = getattr(model, "_orig_mod", model)  # what torch.compile wraps
        self.layers, self.query, self.verify, self.nonfinite = layers, check_query(query), verify, nonfinite
        self._forward, self.distance, self.tokens = forward or default_forward, distance, tokens
        self._sites: tuple[Site, ...] = ()
        self._known: tuple[Any, ...] | None = None
        self._verified = False

    def sites(self, images: Tensor) -> tuple[Site, ...]:
        """Every attention site in order of execution, usable or not; found anew when model or image size changed."""
        images = self._prepare(images)
        known = (tuple(images.shape[1:]), images.dtype, images.device, _structure(self.model))
        if known != self._known:
            self._sites, self._known, self._verified = (
                discover(self.model, images, self._forward),
                known,
                False,
            )
        return self._sites

    def check(self, images: Tensor) -> None:
        """Raise the reason if a wanted layer cannot be read on images of this size."""
        select_sites(self.sites(images), self.layers, self.query, self.model)

    def __call__(
        self, images: Tensor, *, each: Callable[[Site, Observation], None] | None = None
    ) -> list[LayerAttention]:
        """Attention on (B, C, H, W) images, one entry per wanted layer, on the model's device.

        ``each`` sees every wanted layer as it runs, when its whole matrix can still be read.
        """
        if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
            got = f"{tuple(images.shape)} {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(
                f"images: received {got}, expected a floating-point tensor (batch, channels, height, width)"
            )
        images = self._prepare(images)
        wanted = select_sites(self.sites(images), self.layers, self.query, self.model)
        verify = self.verify == "always" or (bool(self.verify) and not self._verified)
        recorded = self._record(images, wanted, verify, each)
        self._verified = self._verified or verify
        return recorded

    def _prepare(self, images: Tensor) -> Tensor:
        check_materialised(self.model)
        device, dtype = model_device_dtype(self.model)
        return images.to(device=device, dtype=dtype)

    def _record(
        self,
        images: Tensor,
        wanted: dict[SiteKey, tuple[Site, Query]],
        verify: bool,
        each: Callable[[Site, Observation], None] | None,
    ) -> list[LayerAttention]:
        found: dict[SiteKey, Observation] = {}
        distances: dict[SiteKey, Tensor] = {}

        def report(key: SiteKey, seen: Observation) -> None:
            site, _ = wanted[key]
            seen = seen.regrouped(len(images), site.folding)
            if _as_found(site, seen, images):
                if self.distance:
                    distances[key] = _distance(site, seen, images)
                if each is not None:
                    each(site, seen)
            found[key] = replace(seen, values=None, source=None)

        observer = AttentionObserver(
            report,
            lambda key: wanted[key][1] if key in wanted else None,
            images=images,
            verify=verify,
            last=None if is_sharded(self.model) else next(reversed(wanted)),
        )
        with ExitStack() as stack:
            tokens = self._watch_tokens(stack, images, wanted) if self.tokens else {}
            watched = subtrees(self.model, {path for path, _ in wanted})
            run_forward(self.model, images, self._forward, observer, watched)
        for key, (site, _) in wanted.items():
            if key not in found or not _as_found(site, found[key], images):
                self._known = None  # look again next time
                raise UnsupportedAttentionError(
                    f"layer {site.index} ({site.name}): attention was not where it had been found on the first look; "
                    "the model takes another path for these images"
                )
        verdicts = settle([found[key] for key in wanted])
        return [
            self._layer(site, found[key], verdict, distances.get(key), tokens.get(key))
            for (key, (site, _)), verdict in zip(wanted.items(), verdicts, strict=True)
        ]

    def _watch_tokens(
        self, stack: ExitStack, images: Tensor, wanted: dict[SiteKey, tuple[Site, Query]]
    ) -> dict[SiteKey, TokenStatistics]:
        """What enters each wanted layer's block, filled while the forward runs; of a block run twice the first time."""
        seen: dict[SiteKey, TokenStatistics] = {}
        modules, paths = dict(self.model.named_modules()), {site.key[0] for site in self._sites}
        for key, (site, _) in wanted.items():
            block = block_of(key[0], paths, modules)
            if block is None or site.layout is None:
                continue
            patches = torch.tensor(site.layout.patches, device=images.device)
            report = partial(seen.setdefault, key)
            watch_tokens(stack, modules[block], (len(images), site.keys), patches, cls_index(site, self.model), report)
        return seen

    def _layer(
        self,
        site: Site,
        seen: Observation,
        verdict: Verdict,
        distance: Tensor | None,
        tokens: TokenStatistics | None,
    ) -> LayerAttention:
        assert seen.rows is not None
        assert site.layout is not None
        if self.nonfinite == "raise" and not verdict.finite:
            raise NonFiniteAttentionError(f"layer {site.index} ({site.name}): its attention row holds NaN or infinity")
        if verdict.finite and (verdict.error > seen.tolerance or verdict.error == float("inf")):
            raise mismatch(site.index, site.name, seen.op, verdict.error, seen.tolerance)
        rows, order = seen.rows.float(), site.layout.order
        norms = None if tokens is None else tokens.norms.float()
        if order != tuple(range(len(order))):
            index = torch.tensor(order, device=rows.device)
            rows, norms = rows[..., index], None if norms is None else norms[..., index]
        return LayerAttention(
            layer=site.index,
            name=site.name,
            rows=rows,
            num_prefix=len(site.layout.prefix),
            grid=site.layout.grid,
            mixed=verdict.mixed,
            verified_error=verdict.error,
            distance=distance,
            norms=norms,
            cosine=None if tokens is None or tokens.cosine is None else tokens.cosine.float(),
        )


def _as_found(site: Site, seen: Observation, images: Tensor) -> bool:
    """Whether an observation has the shape that the site had on the first look."""
    shape = (len(images), site.heads, site.keys)
    return site.layout is not None and seen.rows is not None and tuple(seen.rows.shape) == shape


def _distance(site: Site, seen: Observation, images: Tensor) -> Tensor:
    """Mean attention distance over all patches as queries, a few at a time: (B, H) pixels."""
    assert site.layout is not None
    assert seen.source is not None
    assert seen.rows is not None
    (gh, gw), device = site.layout.grid, seen.rows.device  # FSDP may have moved the images to another device
    rows, cols = torch.arange(gh, device=device), torch.arange(gw, device=device)
    centres = torch.cartesian_prod(rows * (images.shape[-2] / gh), cols * (images.shape[-1] / gw))  # (N, 2) pixels
    patches = torch.tensor(site.layout.patches, device=device)
    place = torch.full((site.keys,), -1, device=device)
    place[patches] = torch.arange(len(patches), device=device)  # token to patch number, -1 for the prefix
    total = torch.zeros((), device=device)
    for start, chunk in seen.source.chunks():
        queries = place[start : start + chunk.shape[2]]
        p = chunk[:, :, queries >= 0][..., patches]  # (B, H, queries, N)
        total = total + F.attention_distance(p, centres[queries[queries >= 0]], centres).sum(-1)
    return total / len(patches)


def _structure(model: nn.Module) -> int:
    """Changes when a submodule is replaced, added or removed."""
    return hash(tuple((name, id(module)) for name, module in model.named_modules()))
