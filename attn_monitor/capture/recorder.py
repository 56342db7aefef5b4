"""Run a model on images and observe its attention: `record_attention`, and `AttentionRecorder` to do so repeatedly.

A first forward on noise images finds every attention site, its token layout and what stands in the way of reading
it. From then on only the wanted modules are watched, and the forward is left after the last of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attn_monitor import functional as F
from attn_monitor.attention import LayerAttention
from attn_monitor.capture.block_tokens import TokenStatistics, watch_tokens
from attn_monitor.capture.discovery import Site, forget, mismatch, sites_of
from attn_monitor.capture.forward import Forward, check_materialised, is_sharded, run_forward
from attn_monitor.capture.isolation import all_modules, model_device_dtype
from attn_monitor.capture.masking import WAYS, Way
from attn_monitor.capture.observer import AttentionObserver, SiteKey
from attn_monitor.capture.operations import Observation, Verdict, settle
from attn_monitor.capture.recording_plan import Found, Plan, Reading, make_plan
from attn_monitor.capture.selection import Layers, QuerySpec, check_layers, check_query, left_out, select_sites
from attn_monitor.errors import (
    AttentionError,
    ForwardError,
    LayerError,
    NonFiniteAttentionError,
    QueryError,
    UnsupportedAttentionError,
)

Verify = bool | Literal["first", "always"]


def check_verify(verify: Verify | str) -> Verify:
    """When to check rows, if it is one of the ways there are; "always", an older word for True, becomes True."""
    if isinstance(verify, bool) or verify == "always":
        return bool(verify)
    if verify == "first":
        return "first"
    raise ValueError(f'verify={verify!r}: expected True (every recording), "first" (and after changes) or False')


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


@dataclass(frozen=True)
class _Outcome:
    """What a way of calling the model finds, and what is wrong with that."""

    way: Way
    sites: tuple[Site, ...] | None
    problem: AttentionError | None


def _calls_for_another_way(problem: AttentionError | None) -> bool:
    """Whether calling the model differently may help: it ran and cannot be read, or it wants other arguments."""
    ran = not isinstance(problem, ForwardError) or problem.__cause__ is None
    return problem is not None and (ran or isinstance(problem.__cause__, TypeError))


class AttentionRecorder:
    """Records the same layers again and again, remembering what it found out about the model.

    ``verify``: True checks every recording; "first" the first one and each after the model or the image size changed;
    False none. ``nonfinite`` "raise" refuses rows with NaN or infinity, "keep" returns them.
    ``distance`` also measures the mean attention distance over all queries, ``tokens`` what enters each block.
    ``forward`` is one, or several ways of which the first is taken that gives what is asked for. ``or_mean`` reads
    query="mean" where the model has no CLS token. ``notes`` say what was done so.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Layers = -1,
        query: QuerySpec = "cls",
        forward: Forward | Sequence[Way] | None = None,
        or_mean: bool = False,
        verify: Verify = True,
        nonfinite: str = "raise",
        distance: bool = False,
        tokens: bool = False,
    ) -> None:
        self.model: nn.Module = getattr(model, "_orig_mod", model)  # what torch.compile wraps
        self.layers, self.query = check_layers(layers), check_query(query)
        self.verify, self.nonfinite = check_verify(verify), nonfinite
        self._ways = (Way(forward),) if callable(forward) else tuple(forward or WAYS)
        self._way, self.or_mean = self._ways[0], or_mean
        self.distance, self.tokens = distance, tokens
        self._sites: tuple[Site, ...] = ()
        self._known: tuple[Any, ...] | None = None
        self._plan: Plan | None = None
        self._verified = False
        self._query = self.query

    @property
    def notes(self) -> tuple[str, ...]:
        """What has to be said about the maps: how a model that masks was called, another query for lack of CLS."""
        query = "it has no CLS token, so maps show the attention that patches receive (query='mean')"
        return tuple(note for note in (self._way.said, query if self._query != self.query else "") if note)

    @property
    def left_out(self) -> dict[int, str]:
        """Under layers="all", the layers that are left out, each with the reason; known after the first look."""
        if self._plan is None or self.layers != "all":
            return {}
        return left_out(self._sites, self._query)

    @property
    def heads(self) -> dict[int, int]:
        """How many heads each wanted layer has, by index; known after the first look."""
        readings = () if self._plan is None else self._plan.readings.values()
        return {reading.site.index: reading.site.heads for reading in readings}

    def found(self) -> Found:
        """What the latest look has found, in the layers that are wanted."""
        sites = [reading.site for reading in self._planned().readings.values()]
        layout = sites[-1].layout
        assert layout is not None
        layers = tuple(site.index for site in sites)
        name = type(self.model).__name__
        return Found(name, layers, len(self._sites), sites[-1].heads, layout.grid, self.notes)

    def sites(self, images: Tensor) -> tuple[Site, ...]:
        """Every attention site in order of execution, usable or not; found anew when model or image size changed."""
        self._look(images)
        return self._sites

    def check(self, images: Tensor) -> None:
        """Raise the reason if a wanted layer cannot be read on images of this size."""
        self._look(images)
        self._planned()

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
        images = self._look(images)
        verify = self.verify is True or (self.verify == "first" and not self._verified)
        recorded = self._record(images, self._planned(), verify, each)
        self._verified = self._verified or verify
        return recorded

    def _look(self, images: Tensor) -> Tensor:
        """The images as the model takes them; finds its sites anew when the model or the images' size has changed."""
        structure = _structure(self.model)
        if self._known is None or structure != self._known[-1]:
            check_materialised(self.model)
        device, dtype = model_device_dtype(self.model)
        images = images.to(device=device, dtype=dtype)
        known = (tuple(images.shape[1:]), images.dtype, images.device, structure)
        if known != self._known:
            self._sites = self._discover(images, known)
            self._known, self._plan, self._verified = known, None, False
        return images

    def _discover(self, images: Tensor, known: tuple[Any, ...]) -> tuple[Site, ...]:
        """The sites by the first way of calling the model that gives what is asked for, else by the first way."""
        # Sharded models run together in all processes, and a failure may be one process's alone.
        ways = self._ways[:1] if is_sharded(self.model) else self._ways
        outcomes = (self._try(way, images, known) for way in ways)
        first = next(outcomes)
        others = outcomes if _calls_for_another_way(first.problem) else ()
        found = next((o for o in itertools.chain([first], others) if o.problem is None), first)
        self._way, self._query = found.way, self.query
        if found.sites is None:
            assert found.problem is not None
            raise found.problem
        return found.sites

    def _try(self, way: Way, images: Tensor, known: tuple[Any, ...]) -> _Outcome:
        try:
            sites = sites_of(self.model, images, way.forward, known)
        except AttentionError as error:
            return _Outcome(way, None, error)
        try:
            select_sites(sites, self.layers, self.query)
        except (LayerError, QueryError):  # not for want of another way
            return _Outcome(way, sites, None)
        except AttentionError as error:
            return _Outcome(way, sites, error)
        return _Outcome(way, sites, None)

    def _planned(self) -> Plan:
        if self._plan is None:
            try:
                wanted = select_sites(self._sites, self.layers, self._query)
            except QueryError:
                if not self.or_mean or self.query != "cls":
                    raise
                self._query = "mean"
                wanted = select_sites(self._sites, self.layers, self._query)
            assert self._known is not None
            self._plan = make_plan(self.model, self._sites, wanted, self._known[2], tokens=self.tokens)
        return self._plan

    def _record(
        self,
        images: Tensor,
        plan: Plan,
        verify: bool,
        each: Callable[[Site, Observation], None] | None,
    ) -> list[LayerAttention]:
        found: dict[SiteKey, Observation] = {}
        distances: dict[SiteKey, Tensor] = {}

        def report(key: SiteKey, seen: Observation) -> None:
            site = plan.readings[key].site
            seen = seen.regrouped(len(images), site.folding)
            if _as_found(site, seen, images):
                if self.distance and _has_every_query(site):
                    distances[key] = _distance(site, seen, images)
                if each is not None:
                    each(site, seen)
            found[key] = replace(seen, values=None, source=None)

        observer = AttentionObserver(
            report,
            lambda key: plan.readings[key].query if key in plan.readings else None,
            images=images,
            verify=verify,
            last=plan.last,
            readings={k: r.site.reading for k, r in plan.readings.items() if r.site.reading is not None},
        )
        with ExitStack() as stack:
            tokens = _watch_tokens(stack, images, plan)
            run_forward(self.model, images, self._way.forward, observer, plan.watched)
        for key, reading in plan.readings.items():
            site = reading.site
            if key not in found or not _as_found(site, found[key], images):
                self._known = None
                forget(self.model)  # look again next time
                raise UnsupportedAttentionError(
                    f"layer {site.index} ({site.name}): attention was not where it had been found on the first look; "
                    "the model takes another path for these images"
                )
        verdicts = settle([found[key] for key in plan.readings])
        return [
            self._layer(reading, found[key], verdict, distances.get(key), tokens.get(key))
            for (key, reading), verdict in zip(plan.readings.items(), verdicts, strict=True)
        ]

    def _layer(
        self,
        reading: Reading,
        seen: Observation,
        verdict: Verdict,
        distance: Tensor | None,
        tokens: TokenStatistics | None,
    ) -> LayerAttention:
        site = reading.site
        assert seen.rows is not None
        assert site.layout is not None
        if self.nonfinite == "raise" and not verdict.finite:
            raise NonFiniteAttentionError(f"layer {site.index} ({site.name}): its attention row holds NaN or infinity")
        if verdict.finite and (verdict.error > seen.tolerance or verdict.error == float("inf")):
            raise mismatch(site.index, site.name, seen.op, verdict.error, seen.tolerance)
        rows = seen.rows.float() if reading.order is None else seen.rows.float()[..., reading.order]
        return LayerAttention(
            layer=site.index,
            name=site.name,
            rows=rows,
            num_prefix=len(site.layout.prefix),
            grid=site.layout.grid,
            mixed=verdict.mixed,
            verified_error=verdict.error,
            kind=verdict.kind,
            places=site.layout.evidence,
            distance=None if verdict.kind == "signed" else distance,
            norms=None if tokens is None else tokens.norms.float(),
            cosine=None if tokens is None or tokens.cosine is None else tokens.cosine.float(),
            model=type(self.model).__name__,
            query=str(self._query),
        )


def _watch_tokens(stack: ExitStack, images: Tensor, plan: Plan) -> dict[SiteKey, TokenStatistics]:
    """What enters each wanted layer's block, filled while the forward runs; of a block run twice the first time."""
    seen: dict[SiteKey, TokenStatistics] = {}
    for key, reading in plan.readings.items():
        block, report = reading.block, partial(seen.setdefault, key)
        if block is not None:
            watch_tokens(stack, block.module, len(images), block.order, block.num_prefix, block.has_cls, report)
    return seen


def _as_found(site: Site, seen: Observation, images: Tensor) -> bool:
    """Whether an observation has the shape that the site had on the first look."""
    shape = (len(images), site.heads, site.keys)
    return site.layout is not None and seen.rows is not None and tuple(seen.rows.shape) == shape


def _has_every_query(site: Site) -> bool:
    return site.layout is not None and len(site.places.patch_queries) == math.prod(site.layout.grid)


@F.full_precision()
def _distance(site: Site, seen: Observation, images: Tensor) -> Tensor:
    """Mean attention distance over all patches as queries, a few at a time: (B, H) pixels."""
    assert site.layout is not None
    assert seen.source is not None
    assert seen.rows is not None
    (gh, gw), device = site.layout.grid, seen.rows.device  # FSDP may have moved the images to another device
    rows, cols = torch.arange(gh, device=device), torch.arange(gw, device=device)
    centres = torch.cartesian_prod(rows * (images.shape[-2] / gh), cols * (images.shape[-1] / gw))  # (N, 2) pixels
    patches = torch.tensor(site.layout.patches, device=device)
    place = torch.full((site.queries,), -1, device=device)  # query to patch number, -1 for the prefix
    for number, query in site.places.patch_queries.items():
        place[query] = number
    total = torch.zeros((), device=device)
    for start, chunk in seen.source.chunks():
        queries = place[start : start + chunk.shape[2]]
        p = chunk[:, :, queries >= 0][..., patches]  # (B, H, queries, N)
        total = total + F.attention_distance(p, centres[queries[queries >= 0]], centres).sum(-1)
    return total / len(patches)


def _structure(model: nn.Module) -> int:
    """Changes when a submodule is replaced, added, removed, renamed, or given another class (as FSDP does)."""
    return hash(tuple((id(module), type(module), *module._modules.keys()) for module in all_modules(model)))
