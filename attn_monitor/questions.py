"""Questions that are put to a model by running it on made-up inputs: which patch, and which token, is which key?"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from attn_monitor import layout as lay
from attn_monitor.observer import AttentionObserver, SiteKey
from attn_monitor.operations import Observation
from attn_monitor.running import Forward, is_sharded, run_forward, subtrees
from attn_monitor.sources import Folding


def patch_codes(
    model: nn.Module, images: Tensor, forward: Forward, key: SiteKey, folding: Folding | None, conv: lay.PatchConv
) -> Tensor:
    """The patch number that each key of a site spells out, 0 for none: (K,). See `layout`."""
    values: list[Tensor] = []
    coded = lay.code_images(images, conv)

    def report(_: SiteKey, seen: Observation) -> None:
        seen = seen.regrouped(len(coded), folding)
        if seen.values is not None:
            values.append(seen.values)

    last = None if is_sharded(model) else key
    # Only V is looked at, so the attention of all these images need not be computed.
    observer = AttentionObserver(report, lambda k: 0 if k == key else None, images=coded, verify=False, last=last)
    run_forward(model, coded, forward, observer, subtrees(model, {key[0]}))
    return lay.read_codes(values[0])


_MARKS = 4  # identical images; copies 1 to 3 get tokens changed whose number has the binary digit 0, 1 or 2


def keys_that_are_tokens(
    model: nn.Module, images: Tensor, forward: Forward, sites: dict[SiteKey, Folding | None]
) -> dict[SiteKey, int]:
    """For each site (with its folding) how many of its last keys are the tokens that enter its module.

    At the entrance of each attention module, some tokens are changed. Keys that are tokens change with their own
    token alone, at any depth; the keys of channel attention and of linear attention all change with any token.
    """
    lengths: dict[str, set[int]] = {}
    confirmed: dict[SiteKey, int] = {}

    def report(key: SiteKey, seen: Observation) -> None:
        values = seen.regrouped(_MARKS, sites[key]).values
        if values is None or len(values) != _MARKS:
            return
        changed = lay.changed_tokens(values[1:], values[:1])  # (3, K)
        for length in lengths[key[0]]:  # the module may put prefix tokens in front of those it was given
            if length <= seen.keys and torch.equal(changed[:, seen.keys - length :], _marks(length, values)):
                confirmed[key] = max(length, confirmed.get(key, 0))

    image = lay.noise_images(images, 1).expand(_MARKS, -1, -1, -1)
    observer = AttentionObserver(report, lambda key: 0 if key in sites else None, images=image, verify=False)
    paths = {path for path, _ in sites}
    with ExitStack() as stack:
        for path, module in model.named_modules():
            if path in paths:
                lengths[path] = set()
                hook = _marking_hook(lengths[path])
                stack.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        run_forward(model, image, forward, observer, subtrees(model, paths))
    return confirmed


def _marks(length: int, like: Tensor) -> Tensor:
    """Which token is changed in which of the copies: bool (3, length)."""
    number = torch.arange(length, device=like.device)
    return torch.stack([(number >> digit & 1).bool() for digit in range(_MARKS - 1)])


def _marking_hook(lengths: set[int]) -> Callable[..., tuple[Any, Any]]:
    def mark(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 3 or _MARKS not in x.shape[:2]:
            return x
        batch, tokens = (0, x.ndim - 2) if x.shape[0] == _MARKS else (1, 0)  # (B, …, N, C), or (N, B, C)
        x = x.movedim((batch, tokens), (0, 1))[:1]  # the copies have drifted apart in the layers before
        lengths.add(x.shape[1])
        other = lay.noise_images(x, 1, seed=2) * x.std() + x
        marks = torch.cat([torch.zeros_like(_marks(x.shape[1], x)[:1]), _marks(x.shape[1], x)])
        marks = marks.reshape(*marks.shape, *(1 for _ in x.shape[2:]))
        return torch.where(marks, other, x).movedim((0, 1), (batch, tokens))

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return tuple(mark(a) for a in args), {name: mark(a) for name, a in kwargs.items()}

    return hook
