"""Discover every attention site of a model on noise images: its token layout, or the reason why it cannot be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attn_monitor.capture.attention_rows import CallingConvention, Folding, widen
from attn_monitor.capture.forward import Forward, default_forward, run_forward
from attn_monitor.capture.isolation import model_device_dtype
from attn_monitor.capture.observation import Observation, ObservedRows, ReadObservation, RefusedObservation, SiteKey
from attn_monitor.capture.observer import AttentionObserver
from attn_monitor.capture.sharded_models import refuse_split_parameters
from attn_monitor.capture.sites import ReadableSite, RefusedSite, Site, site_name
from attn_monitor.capture.stacks import Ran, second_stacks
from attn_monitor.capture.token_places.find_places import find_places
from attn_monitor.capture.token_places.random_projections import change_threshold, relative_change
from attn_monitor.capture.token_places.site_places import SitePlaces
from attn_monitor.capture.token_places.synthetic_images import noise_images
from attn_monitor.capture.token_places.tokens import SiteFormat
from attn_monitor.capture.verification import CheckResult, fetch_checks, mismatch
from attn_monitor.errors import (
    AttentionError,
    ForwardError,
    NoAttentionError,
    NonFiniteAttentionError,
    UnsupportedAttentionError,
)

_IMAGES = 3  # noise, of which the first two are the same


def discover(model: nn.Module, images: Tensor, forward: Forward) -> tuple[Site, ...]:
    """Every attention site in order of execution, found by running the model on noise of the images' size.

    Then the places of the keys and queries of each are found, see `places`.
    """
    candidates: list[_Candidate] = []
    modules = dict(model.named_modules())
    one, other = noise_images(images, 2)
    noise = torch.stack([one, one, other])
    observer = AttentionObserver(lambda key, seen: candidates.append(_examine(key, seen)), lambda key: 0, images=noise)
    with refuse_split_parameters(model):
        run_forward(model, noise, forward, observer, modules.items())
    if not candidates:
        hint = "batched products but no softmax over tokens that meets V" if observer.products else "no batched product"
        raise NoAttentionError(
            f"no attention was observed in {type(model).__name__}: its forward ran {hint}. "
            "Models without softmax attention (convolutional networks, linear attention) have no map to show"
        )
    global_sites = [c for c in candidates if c.repeatable and not _shape_problem(c.seen)]
    places: dict[SiteKey, SitePlaces] = {}
    if global_sites:
        first = global_sites[0]
        places = find_places(
            model,
            images,
            forward,
            {c.key: SiteFormat(c.folding, c.convention) for c in global_sites},
            keys=first.seen.keys,
            moving={c.key: c.moving for c in global_sites},
            convs=observer.convs,
            batch_size=min(len(images), 8),
        )
    read = {c.key: c.seen for c in candidates if isinstance(c.seen, ObservedRows)}
    checks = dict(zip(read, fetch_checks(list(read.values())), strict=True))
    stacks = second_stacks([Ran(c.key[0], c.seen.queries * c.seen.batch // _IMAGES) for c in candidates], modules)
    return tuple(
        _site(index, candidate, places.get(candidate.key, SitePlaces()), checks.get(candidate.key), stacks[index])
        for index, candidate in enumerate(candidates)
    )


def attends_to_images(model: nn.Module, images: Tensor) -> bool:
    """Whether the module runs on images and attends to tokens that come from them."""
    device, dtype = model_device_dtype(model)
    one, other = noise_images(images.to(device=device, dtype=dtype), 2)
    noise, moving = torch.stack([one, one, other]), list[int]()
    observer = AttentionObserver(
        lambda key, seen: moving.append(_examine(key, seen).moving), lambda key: 0, images=noise
    )
    try:
        run_forward(model, noise, default_forward, observer, model.named_modules())
    except AttentionError:  # it is not made for images
        return False
    return max(moving, default=0) > 1


@dataclass(frozen=True)
class _Candidate:
    """What was observed at a site, before it is known what its tokens are."""

    key: SiteKey
    seen: ObservedRows | RefusedObservation
    folding: Folding | None = None
    moving: int = 0  # keys that depend on the image, where no attention has mixed them yet
    repeatable: bool = True  # equal images gave equal tokens

    @property
    def convention(self) -> CallingConvention | None:
        """Of an operation from outside PyTorch, if it was read."""
        return self.seen.convention if isinstance(self.seen, ObservedRows) else None


def _examine(key: SiteKey, seen: Observation) -> _Candidate:
    """In which order batch and heads are, and whether equal images give equal tokens."""
    if isinstance(seen, RefusedObservation):
        return _Candidate(key, seen)
    foldings: list[Folding | None] = [None]
    if seen.batch * seen.heads % _IMAGES == 0:
        foldings += ["batch first", "heads first"] if seen.batch == 1 else ["heads first"]
    best = _Candidate(key, seen.rows_alone())
    for folding in foldings:
        regrouped = seen.regrouped(_IMAGES, folding)
        if regrouped.batch != _IMAGES:
            continue
        repeatable, moving = _compare_images(regrouped)
        if repeatable or folding is None:  # another order than the plain one must explain what is seen
            best = _Candidate(key, regrouped.rows_alone(), folding, moving, repeatable)
        if repeatable:
            break
    return best


def _compare_images(seen: ReadObservation) -> tuple[bool, int]:
    """Whether the two equal images have equal tokens, and how many keys differ in the third image."""
    limit = change_threshold(seen.values.dtype, seen.values.device)
    values, rows = widen(seen.values).transpose(1, 2).flatten(2), seen.rows.flatten(1)[:, None]  # (B, …, C)
    # Equal images must be equal in what is read and in how much of it: V alone may be the same for all heads.
    repeatable = all(bool((relative_change(t[1], t[0]) <= limit).all()) for t in (values, rows))
    return repeatable, int((relative_change(values[2], values[0]) > limit).sum())


def _shape_problem(seen: ObservedRows | RefusedObservation) -> str:
    """Why the shape of an attention operation alone rules out a global row over patches; empty if it does not."""
    if isinstance(seen, RefusedObservation):
        return seen.reason
    if seen.batch % _IMAGES:
        return f"it runs on {seen.batch} sequences for {_IMAGES} images, which is no whole number for each"
    if seen.batch != _IMAGES:
        return f"it runs on {seen.batch // _IMAGES} sequences of {seen.keys} tokens for each image, such as windows"
    return ""


def _site(index: int, candidate: _Candidate, places: SitePlaces, check: CheckResult | None, stack: str) -> Site:
    seen, layout = candidate.seen, places.layout
    compared = isinstance(seen, ObservedRows) and seen.error is not None
    facts: dict[str, Any] = {
        "index": index,
        "key": candidate.key,
        "op": seen.op,
        "heads": seen.heads,
        "queries": seen.queries,
        "keys": seen.keys,
        "mixed": check is not None and check.mixed,
        "error": check.error if check is not None and compared else None,
        "folding": candidate.folding,
        "scope": seen.scope,
        "convention": candidate.convention,
        "places": places,
        "stack": stack,
    }
    where = f"layer {index} ({site_name(candidate.key)}, {seen.op})"
    refusal = _refusal(where, candidate, check)
    if refusal is None and layout is not None:
        return ReadableSite(**facts, layout=layout)
    no_places = UnsupportedAttentionError(
        f"{where} has {seen.queries} queries and {seen.keys} keys of which no map can be drawn: {places.reason}"
    )
    return RefusedSite(**facts, refusal=refusal or no_places)


def _refusal(where: str, candidate: _Candidate, check: CheckResult | None) -> AttentionError | None:
    """Why no map is shown of a site, wherever its keys are."""
    problem = _shape_problem(candidate.seen)
    if problem:
        return UnsupportedAttentionError(f"{where} has no global attention row: {problem}")
    if check is not None and not check.finite:
        return NonFiniteAttentionError(f"{where}: its attention row holds NaN or infinity")
    if check is not None and not check.reproduces_output:
        return mismatch(where, check)
    if not candidate.repeatable:
        return ForwardError(
            f"{where}: two identical images gave different tokens, so the forward is random even in eval mode "
            "(random token masking, as in MAE?). Pass a deterministic forward=lambda model, images: ..."
        )
    return None
