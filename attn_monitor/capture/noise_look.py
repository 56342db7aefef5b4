"""Run a model on three noise images, two of them equal, to find where attention runs and how it orders images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from attn_monitor.capture.observe.attention_rows import Folding, Sequences
from attn_monitor.capture.observe.error_origin import errors_from
from attn_monitor.capture.observe.forward import Forward, run_forward
from attn_monitor.capture.observe.kinds.kind import AttentionCall, Operation
from attn_monitor.capture.observe.kinds.unwritten_memory import UnwrittenMemory
from attn_monitor.capture.observe.observation import Observation, ObservedRows, RefusedObservation, SiteKey
from attn_monitor.capture.observe.observer import AttentionObserver
from attn_monitor.capture.observe.patch_grids import ObservedConvolutions
from attn_monitor.capture.observe.random_projections import (
    change_threshold,
    off_device,
    relative_change,
    sketch,
)
from attn_monitor.capture.token_places.ablated_model import seed_everything
from attn_monitor.capture.token_places.synthetic_images import noise_images

IMAGES = 3  # the first two are equal


@dataclass(frozen=True)
class Candidate:
    """Hold what was observed at a site before its tokens are assigned to patches."""

    key: SiteKey
    seen: ObservedRows | RefusedObservation
    folding: Folding | None = None
    moving: int = 0  # keys that depend on the image; meaningful before attention mixes them
    repeatable: bool = True  # equal images gave equal tokens
    reordered: bool = False  # equal images gave equal tokens at other indices of the batch
    of_batch: bool = False  # equal images gave different tokens, and the same ones again in another random state
    overlooked: bool = False  # it mixes tokens, but no attention was observed in it
    sums_rows: bool = False  # a channel of V is constant over keys, so that row·V contains each row's sum


class DiscoveringObserver(AttentionObserver):
    """Observe a forward of which nothing is known; see `AttentionObserver`.

    Attributes:
        convolutions: Those on images, or on features of whole images.
        memory: What unseen kernels leave.
    """

    discovers = sees_every_operation = True

    def __init__(self, report: Callable[[SiteKey, Observation], None], images: Tensor) -> None:
        super().__init__(images, report, lambda key: 0, queries=(0,))
        self.convolutions = ObservedConvolutions(images)
        self.memory = UnwrittenMemory()

    @errors_from("monitor")
    def _dispatched(self, operation: Operation) -> Any:
        self.memory.used(operation)
        out = super()._dispatched(operation)
        self.memory.allocated(operation, out, self.state.path)
        return out

    def _attended(self, call: AttentionCall) -> None:
        self.memory.written(call.product().out)
        super()._attended(call)

    def _convolution(self, args: tuple[Any, ...], out: Tensor) -> None:
        self.convolutions.add(args, out)


def look_at_noise(model: nn.Module, images: Tensor, forward: Forward) -> tuple[list[Candidate], DiscoveringObserver]:
    """Observe every site on noise images.

    The three images run as one batch, which shows how operations order heads and images. If only one image is given
    they run one by one, since there may be no memory for more.

    Args:
        model: The model to run.
        images: (B, C, *size) that give the size, dtype and device of the noise.
        forward: How to call the model.

    Returns:
        The candidates in order of execution, and the observer of the last forward.
    """
    one, other = noise_images(images, 2)
    candidates: list[Candidate] = []
    if len(images) > 1:
        noise = torch.stack([one, one, other])
        joins = images.ndim > 4
        observer = _observe(model, noise, forward, lambda k, seen: candidates.append(_examine(k, seen, joins)))
        if not all(candidate.repeatable or candidate.reordered for candidate in candidates):
            steady = _steady(model, noise, forward)
            candidates = [c if c.repeatable else replace(c, of_batch=c.key in steady) for c in candidates]
        return candidates, observer
    alone: list[dict[SiteKey, _Alone | RefusedObservation]] = []
    for image in (one, one, other):
        sites: dict[SiteKey, _Alone | RefusedObservation] = {}
        observer = _observe(model, image[None], forward, partial(_keep_alone, sites, images.ndim > 4))
        alone.append(sites)
    return [_put_together(key, [sites.get(key) for sites in alone]) for key in alone[0]], observer


def _steady(model: nn.Module, noise: Tensor, forward: Forward) -> set[SiteKey]:
    """Return the sites that have the same values again in another random state."""
    looks: list[dict[SiteKey, Tensor]] = [{}, {}]
    for seed, values in enumerate(looks):

        def keep(key: SiteKey, seen: Observation, values: dict[SiteKey, Tensor] = values) -> None:
            if isinstance(seen, ObservedRows):
                values[key] = off_device(sketch(seen.values))

        def seeded(model: nn.Module, images: Tensor, seed: int = seed) -> Any:
            seed_everything(seed, images.device)
            return forward(model, images)

        _observe(model, noise, seeded, keep)
    first, second = looks
    return {
        key
        for key, values in first.items()
        if key in second
        and values.shape == second[key].shape
        and bool((relative_change(values, second[key]) <= change_threshold(noise.dtype, noise.device)).all())
    }


def _observe(
    model: nn.Module, noise: Tensor, forward: Forward, report: Callable[[SiteKey, Observation], None]
) -> DiscoveringObserver:
    observer = DiscoveringObserver(report, noise)
    run_forward(model, noise, forward, observer, model.named_modules())
    return observer


def _examine(key: SiteKey, seen: Observation, joins: bool) -> Candidate:
    """Determine the order of batch and heads, and whether equal images give equal tokens.

    With ``joins``, several sequences of each image, such as one for each frame of a clip, are taken as one attention.
    """
    if isinstance(seen, RefusedObservation):
        return Candidate(key, seen)
    foldings: list[Folding | None] = [None]
    if joins and seen.batch % IMAGES == 0 and seen.batch > IMAGES:
        foldings.append(Sequences(seen.batch // IMAGES))
    if seen.batch * seen.heads % IMAGES == 0:
        foldings += ["batch first", "heads first"] if seen.batch == 1 else ["heads first"]
    sums = _sum_rows(seen.values)
    best = Candidate(key, seen.rows_alone(), sums_rows=sums)
    for folding in foldings:
        regrouped = seen.regrouped(IMAGES, folding)
        if regrouped.batch != IMAGES:
            continue
        limit = change_threshold(seen.values.dtype, seen.values.device)
        equal, moving = _compare_images(sketch(regrouped.values), regrouped.rows, limit)
        repeatable = (0, 1) in equal
        if repeatable or folding is None:  # only a folding that makes equal images equal is accepted
            reordered = bool(equal) and not repeatable
            best = Candidate(
                key, regrouped.rows_alone(), folding, moving, repeatable, reordered=reordered, sums_rows=sums
            )
        if repeatable:
            break
    return best


@dataclass(frozen=True)
class _Alone:
    """Hold what was observed at a site in a forward of one image."""

    seen: ObservedRows
    folding: Folding | None
    values: Tensor  # (windows, K, S) sketches of V
    limit: float  # relative change above which a key counts as changed
    sums_rows: bool


def _keep_alone(
    sites: dict[SiteKey, _Alone | RefusedObservation], joins: bool, key: SiteKey, seen: Observation
) -> None:
    if isinstance(seen, RefusedObservation):
        sites[key] = seen
        return
    folding: Folding | None = "heads first" if seen.batch > 1 and seen.heads == 1 else None  # else windows
    if joins and folding is None and seen.batch > 1:
        folding = Sequences(seen.batch)
    seen = seen.regrouped(1, folding)
    rows = seen.rows_alone()
    error, mixed = (None if fact is None else off_device(fact) for fact in (rows.error, rows.mixed))
    rows = replace(rows, rows=off_device(rows.rows), error=error, mixed=mixed)
    limit = change_threshold(seen.values.dtype, seen.values.device)
    sites[key] = _Alone(rows, folding, off_device(sketch(seen.values)), limit, _sum_rows(seen.values))


def _put_together(key: SiteKey, images: Sequence[_Alone | RefusedObservation | None]) -> Candidate:
    """Combine a site's observations of single images into those of one batch."""
    first = images[0]
    if isinstance(first, RefusedObservation):
        return Candidate(key, replace(first, batch=IMAGES * first.batch))
    known = [image for image in images if isinstance(image, _Alone)]
    seen, values = known[0].seen, [image.values for image in known]
    if (
        len(known) < IMAGES
        or len({(v.shape, image.seen.rows.shape) for v, image in zip(values, known, strict=True)}) > 1
    ):
        reason = "it does not run in the same way on every image"
        return Candidate(
            key,
            RefusedObservation(
                op=seen.op,
                batch=seen.batch,
                heads=seen.heads,
                queries=seen.queries,
                keys=seen.keys,
                scope=seen.scope,
                reason=reason,
            ),
        )
    rows = torch.cat([image.seen.rows for image in known])
    errors, mixed = ([getattr(i.seen, n) for i in known] for n in ("error", "mixed"))
    together = replace(
        seen,
        batch=IMAGES * seen.batch,
        rows=rows,
        error=None if any(e is None for e in errors) else torch.stack(errors).amax(),
        mixed=None if any(m is None for m in mixed) else torch.stack(mixed).any(),
    )
    if seen.batch > 1:  # windows
        return Candidate(key, together)
    equal, moving = _compare_images(torch.cat(values), rows, known[0].limit)
    sums = all(image.sums_rows for image in known)
    return Candidate(key, together, known[0].folding, moving, (0, 1) in equal, sums_rows=sums)


def _sum_rows(values: Tensor) -> bool:
    """Return whether a channel of V (B, H, K, D) is the same nonzero number for all keys and images."""
    first = values[:1, :, :1]
    return bool(((values == first).all(2).all(0) & (first[0, :, 0] != 0)).any()) and values.shape[2] > 1


def _compare_images(values: Tensor, rows: Tensor, limit: float) -> tuple[set[tuple[int, int]], int]:
    """Compare the noise images.

    Args:
        values: (3, K, S) sketches of V.
        rows: (3, H, K).
        limit: Relative change above which a key counts as changed.

    Returns:
        The pairs of images with equal tokens, and the number of keys that differ between the first and third image.
    """
    # Compare the rows too: V alone may be the same for all heads.
    compared = (values, rows.flatten(1)[:, None])
    equal = {
        (i, j)
        for i, j in combinations(range(IMAGES), 2)
        if all(bool((relative_change(t[j], t[i]) <= limit).all()) for t in compared)
    }
    return equal, int((relative_change(values[2], values[0]) > limit).sum())
