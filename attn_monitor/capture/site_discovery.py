"""Discover every attention site of a model on noise images: its token layout, or the reason why it cannot be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from attn_monitor.capture.noise_look import IMAGES, Candidate, DiscoveringObserver, look_at_noise
from attn_monitor.capture.observe.forward import Forward, default_forward, in_one_line
from attn_monitor.capture.observe.isolation import model_device_dtype
from attn_monitor.capture.observe.kinds.kind import ForwardState
from attn_monitor.capture.observe.observation import ObservedRows, RefusedObservation, SiteKey
from attn_monitor.capture.other_shapes import runs
from attn_monitor.capture.sharded_models import refuse_split_parameters
from attn_monitor.capture.sites import ReadableSite, RefusedSite, Site, site_name
from attn_monitor.capture.stacks import ObservedLayer, second_stacks
from attn_monitor.capture.token_places.find_places import find_places
from attn_monitor.capture.token_places.site_places import ONE_IMAGE, SitePlaces
from attn_monitor.capture.token_places.synthetic_images import noise_images
from attn_monitor.capture.token_places.tokens import SiteFormat
from attn_monitor.capture.unseen_attention import overlooked
from attn_monitor.capture.verification import CheckResult, fetch_checks, mismatch
from attn_monitor.errors import (
    AttentionError,
    ForwardError,
    NoAttentionError,
    NonFiniteAttentionError,
    UnsupportedAttentionError,
)


def discover(model: nn.Module, images: Tensor, forward: Forward) -> tuple[Site, ...]:
    """Discover every attention site by running the model on noise images, then assign its tokens to patches.

    Args:
        model: The model, left as it was found.
        images: (B, C, H, W) that give the size, dtype and device of the noise.
        forward: How to call the model.

    Returns:
        The sites in order of execution.

    Raises:
        NoAttentionError: No attention was observed.
        UnsupportedAttentionError: The model runs in another thread, or with tensor parallelism.
        ForwardError: The model failed.
    """
    try:
        return _discover(model, images, forward)
    except ForwardError as error:
        if error.batch in (None, len(images)) or not runs(model, noise_images(images, len(images)), forward):
            raise
        cause = "" if error.__cause__ is None else f": {in_one_line(error.__cause__)}"
        raise ForwardError(
            f"{type(model).__name__} ran on {len(images)} images of {tuple(images.shape[1:])} and failed on "
            f"{error.batch}{cause}. Its patches are found by running it on batches of several sizes: let it take any "
            "number of images (where it was exported or traced, by dynamic shapes)"
        ) from error


def _discover(model: nn.Module, images: Tensor, forward: Forward) -> tuple[Site, ...]:
    """Find the attention of a model on noise images, and then which token is which patch in each."""
    with refuse_split_parameters(model):
        candidates, observer = look_at_noise(model, images, forward)
    if observer.elsewhere:
        raise UnsupportedAttentionError(
            f"{type(model).__name__} runs {observer.elsewhere} in a thread of its own, where its operations cannot be "
            "seen. Pass a forward=lambda model, images: ... that stays in the thread that it is called in"
        )
    candidates = _with_overlooked(model, images, forward, candidates, observer)
    if all(candidate.overlooked for candidate in candidates):
        raise _no_attention(model, candidates, observer.state)
    read = {c.key: c.seen for c in candidates if isinstance(c.seen, ObservedRows)}
    checks = dict(zip(read, fetch_checks(list(read.values())), strict=True))
    global_sites = [c for c in candidates if c.repeatable and not _shape_problem(c.seen)]
    places: Mapping[SiteKey, SitePlaces] = {}
    if global_sites:
        first = global_sites[0]
        places = find_places(
            model,
            images,
            forward,
            {c.key: SiteFormat(c.folding, checks[c.key].kind == "distribution") for c in global_sites},
            keys=first.seen.keys,
            moving={c.key: c.moving for c in global_sites},
            convs=observer.convolutions.found,
            batch_size=min(len(images), 8),
        )
    reasons: dict[SiteKey, str] = {}
    if observer.quantised:
        reason = "its linear layers are quantised by the range of the whole image, on which each token depends"
        reasons = {key: reason for key, site in places.items() if site.layout is None or site.cls is None}
    stacks = second_stacks(
        [ObservedLayer(c.key[0], c.seen.queries * c.seen.batch // IMAGES) for c in candidates],
        dict(model.named_modules()),
    )
    parts = {key for site in places.values() for key in site.together}
    others = _other_paths(model)
    layers = [(c, stack) for c, stack in zip(candidates, stacks, strict=True) if c.key not in parts]
    for index, (candidate, _) in enumerate(layers):
        if candidate.overlooked:  # it mixes tokens in the forwards that ask for places too
            reason = (
                f"its tokens are mixed before, by layer {index} ({site_name(candidate.key)}), which cannot be ablated"
            )
            later = (c.key for c, _ in layers[index + 1 :])
            reasons |= {key: reason for key in later if key in places and places[key].layout is None}
    found = {**places, **{key: replace(places[key], layout=None, reason=reason) for key, reason in reasons.items()}}
    return tuple(
        _site(index, candidate, found.get(candidate.key, SitePlaces()), checks.get(candidate.key), stack, others)
        for index, (candidate, stack) in enumerate(layers)
    )


def _no_attention(model: nn.Module, overlooked: Sequence[Candidate], state: ForwardState) -> NoAttentionError:
    """Return the error for a model in which no attention was observed."""
    name = type(model).__name__
    if overlooked:
        paths = [site_name(candidate.key) for candidate in overlooked]
        many = len(paths) > 1
        listed = f"{paths[0]} to {paths[-1]}, {len(paths)} modules, mix" if many else f"{paths[0]} mixes"
        return NoAttentionError(f"no attention was observed in {name}: {listed} {_UNSEEN_KERNEL}")
    of_what = "batched products, none of them of a softmax over the last dimension with values"
    ran = of_what if state.products else "no batched product in its own thread"
    if state.unknown:
        ran += f", and operations that are not known as attention ({', '.join(sorted(state.unknown)[:3])})"
    return NoAttentionError(
        f"no attention was observed in {name}: its forward ran {ran}. If it has "
        "attention, use F.scaled_dot_product_attention, or a softmax over the last dimension that is multiplied with V "
        "by @"
    )


_UNSEEN_KERNEL = (
    "tokens in a kernel that PyTorch's dispatcher does not see (Triton, CuTe or a C++ extension). Use "
    'F.scaled_dot_product_attention, or what the library has for it, such as attn_implementation="sdpa" or '
    "XFORMERS_DISABLED=1"
)


def _with_overlooked(
    model: nn.Module,
    images: Tensor,
    forward: Forward,
    seen: Sequence[Candidate],
    observer: DiscoveringObserver,
) -> list[Candidate]:
    """Add modules that mix tokens in unseen kernels, or like siblings with attention, in order of execution."""
    by_path, entered, kernels = {c.seen.scope: c for c in reversed(seen)}, observer.entered, observer.memory.kernels
    others = overlooked(model, noise_images(images, 1), forward, by_path, entered, kernels)
    found = list(enumerate(seen))
    for path, (sibling, problem) in others.items():
        like = by_path[sibling].seen if sibling else None
        shape = {name: getattr(like, name, 0) for name in ("batch", "heads", "queries", "keys")}
        op = "not known" if problem else "not seen" if path in kernels else "not recognised"
        reason = (
            f"failed on other tokens ({problem}), so whether it mixes them is not known" if problem else f"it is {op}"
        )
        observation = RefusedObservation(op=op, scope=path, reason=reason, **shape)
        found.append((entered[path] - 1, Candidate((path, 0), observation, overlooked=True)))
    return [candidate for _, candidate in sorted(found, key=lambda one: one[0])]


def attends_to_images(model: nn.Module, images: Tensor) -> bool:
    """Return whether the module runs on images and attends to tokens that depend on them."""
    device, dtype = model_device_dtype(model)
    try:
        candidates, _ = look_at_noise(model, images.to(device=device, dtype=dtype), default_forward)
    except AttentionError:  # not a module for images
        return False
    return max((candidate.moving for candidate in candidates), default=0) > 1


def _shape_problem(seen: ObservedRows | RefusedObservation) -> str:
    """Return why the shape of an operation rules out a global row over patches; "" if it does not."""
    if isinstance(seen, RefusedObservation):
        return seen.reason
    if seen.batch < IMAGES:
        return f"{IMAGES} images do not run as one batch in it, but one after the other. {ONE_IMAGE}"
    if seen.batch % IMAGES:
        sequences = f"{seen.batch} sequence{'' if seen.batch == 1 else 's'}"
        return f"it runs on {sequences} for {IMAGES} images, which is no whole number for each"
    if seen.batch != IMAGES:
        return f"it runs on {seen.batch // IMAGES} sequences of {seen.keys} tokens for each image, such as windows"
    return ""


def _other_paths(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return, for each module's first path, its further paths: ALBERT's blocks are one module."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    return {first: tuple(others) for first, *others in paths.values()}


def _site(
    index: int,
    candidate: Candidate,
    places: SitePlaces,
    check: CheckResult | None,
    stack: str,
    others: Mapping[str, tuple[str, ...]],
) -> Site:
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
        "places": places,
        "overlooked": candidate.overlooked,
        "others": others.get(candidate.key[0], ()),
        "stack": stack,
    }
    where = f"layer {index} ({site_name(candidate.key)}{'' if candidate.overlooked else f', {seen.op}'})"
    refusal = _refusal(where, candidate, check)
    if refusal is None and layout is not None:
        return ReadableSite(**facts, layout=layout)
    no_places = UnsupportedAttentionError(
        f"{where} has {seen.queries} queries and {seen.keys} keys of which no map can be drawn: {places.reason}"
    )
    return RefusedSite(**facts, refusal=refusal or no_places)


def _refusal(where: str, candidate: Candidate, check: CheckResult | None) -> AttentionError | None:
    """Return why a site is unsupported whatever its token layout; None if it is supported."""
    if isinstance(candidate.seen, RefusedObservation) and candidate.seen.op == "not known":
        return UnsupportedAttentionError(
            f"{where} holds no attention that was observed, as its siblings do, and {candidate.seen.reason}. Choose "
            "other layers by their paths"
        )
    if candidate.overlooked and candidate.seen.op == "not seen":
        return UnsupportedAttentionError(f"{where} mixes {_UNSEEN_KERNEL}")
    if candidate.overlooked:
        return UnsupportedAttentionError(
            f"{where} mixes tokens in an operation that is not recognised as attention; use "
            "F.scaled_dot_product_attention, or a softmax over the last dimension that is multiplied with V by @"
        )
    problem = _shape_problem(candidate.seen)
    if problem:
        return UnsupportedAttentionError(f"{where} has no global attention row: {problem}")
    if check is not None and not check.finite:
        return NonFiniteAttentionError(f"{where}: its attention row holds NaN or infinity")
    if check is not None and not check.reproduces_output:
        return mismatch(where, check)
    if check is not None and check.kind != "distribution" and candidate.sums_rows:
        return UnsupportedAttentionError(
            f"{where}: the rows of its weights do not sum to 1, and a channel of V is one number for all keys, so that "
            "the product gives their sums too, as where weights are normalised after it and the rows are others"
        )
    if candidate.reordered:
        return UnsupportedAttentionError(
            f"{where}: two identical images gave equal tokens at other places in the batch, so the model puts a batch "
            "in another order before it attends. Pass a forward=lambda model, images: ... that leaves it as it is"
        )
    if candidate.of_batch:
        return ForwardError(
            f"{where}: two identical images in one batch gave different tokens, and the same ones again in another "
            "random state, so the tokens of an image depend on its place in the batch, on the images beside it, or on "
            f"a random generator of the model's own. {ONE_IMAGE}"
        )
    if not candidate.repeatable:
        return ForwardError(
            f"{where}: two identical images gave different tokens, so the forward is random even in eval mode. "
            "Pass a deterministic forward=lambda model, images: ..."
        )
    return None
