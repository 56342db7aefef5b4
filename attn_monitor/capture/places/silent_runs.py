"""Put questions to a model: silent forwards on made-up images, a piece at a time."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attn_monitor.capture.forward import Forward, run_forward
from attn_monitor.capture.observer import SiteKey
from attn_monitor.capture.places.silent_forward import HowToRead, SilentObserver, SiteTokens, Tokens


class Asker:
    """Runs silent forwards on images, a piece at a time, each question in a random state of its own."""

    def __init__(
        self, model: nn.Module, forward: Forward, how: Mapping[SiteKey, HowToRead], calls: set[str], piece: int
    ) -> None:
        self.model, self.forward, self.how, self.calls, self.piece = model, forward, how, calls, max(piece, 3)
        self.modules = dict(model.named_modules())
        self.images_asked = 0

    def __call__(
        self,
        images: Tensor,
        seed: int,
        *,
        marks: Mapping[SiteKey, Tensor] | None = None,
        nudged: Sequence[tuple[nn.Module, str]] = (),
        by_head: int = 0,
    ) -> Tokens:
        parts = []
        for start in range(0, len(images), self.piece):
            piece = slice(start, start + self.piece)
            some = None if marks is None else {key: m[piece] for key, m in marks.items()}
            observer = SilentObserver(images[piece], self.how, marks=some, nudged=nudged, by_head=by_head)

            def seeded(model: nn.Module, x: Tensor) -> Any:
                _seed_everything(seed, x.device)
                return self.forward(model, x)

            with ExitStack() as stack:
                observer.watch_calls(stack, self.modules, self.calls)
                run_forward(self.model, images[piece], seeded, observer, self.modules.items())
            parts.append(observer.tokens)
        self.images_asked += len(images)
        return _joined(parts)


def _seed_everything(seed: int, device: torch.device) -> None:
    """Another random state, which the isolation around every forward undoes."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the state that models use


def _joined(parts: Sequence[Tokens]) -> Tokens:
    """What was read piece by piece, of what was there in every piece and of the same length."""
    if len(parts) == 1:
        return parts[0]

    def together(kept: Sequence[Mapping[Any, Tensor]]) -> dict[Any, Tensor]:
        alike = [k for k in kept[0] if all(k in other and other[k].shape[1:] == kept[0][k].shape[1:] for other in kept)]
        return {k: torch.cat([other[k] for other in kept]) for k in alike}

    sites: dict[SiteKey, SiteTokens] = {}
    for key, first in parts[0].sites.items():
        others = [p.sites[key] for p in parts if key in p.sites]
        if len(others) < len(parts) or any(o.v.shape[1:] != first.v.shape[1:] for o in others):
            continue
        tensors: dict[str, Any] = {}
        for name in ("v", "q", "k", "heads"):
            known = [t for t in (getattr(o, name) for o in others) if t is not None]
            tensors[name] = torch.cat(known) if len(known) == len(parts) else None
        sites[key] = SiteTokens(**tensors, queries=first.queries, dtype=first.dtype, within=first.within)
    entries, exits, again = (together([getattr(p, name) for p in parts]) for name in ("entries", "exits", "again"))
    return Tokens(sites, entries, exits, again, set().union(*(p.mixed for p in parts)))
