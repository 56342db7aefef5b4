"""Attention sinks of a layer: tokens where attention collects, what their values carry, and a verdict in words.

Attention that has nowhere to go collects on a few tokens. Where their values are small it is thrown away, a sink that
carries nothing; where they are not, every query receives the same, a sink that broadcasts. Sources: Darcet et al. 2023,
arXiv 2309.16588 (registers); Gu et al. 2024, arXiv 2410.10781. The cut-offs are rules of thumb of this package.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_monitor.attention import LayerAttention

TIMES_UNIFORM = 5.0
"""A token is a sink from so many times the uniform share on, 1 / T for T tokens."""
LEAST_SHARE = 0.01
"""Of all attention, beyond uniform shares: where less collects it is no sink."""
CARRIES = 0.5
"""Values of this norm and above, next to the median token's, carry something."""


@dataclass(frozen=True)
class Sink:
    """One place where attention collects, as means over images and heads."""

    token: str  # "CLS", "register 1", "patches"; "token 27" where it is not known what it is
    tokens: float  # how many of an image
    share: float  # of all attention, on all of them
    times_uniform: float  # of one of them
    value: float | None  # norm of its V next to the median token's; None where V was not read

    @property
    def verdict(self) -> str:
        """What kind of sink it is."""
        if self.value is None or not math.isfinite(self.value):
            return "a sink"
        return "a sink that broadcasts" if self.value >= CARRIES else "a sink that carries nothing"


def received(attention: LayerAttention, *, cls: bool = False) -> Tensor | None:
    """The share of attention on each token, (B, T): from every query, or from the CLS query alone; None if unknown."""
    if attention.kind == "signed" or (cls and attention.query != "cls"):
        return None
    if cls or attention.query == "mean":
        return _shares(attention.rows.mean(1))
    return None if attention.received is None else _shares(attention.received)


def _shares(weights: Tensor) -> Tensor:
    """Of the whole, as some models' rows do not sum to 1."""
    return weights / weights.sum(-1, keepdim=True)


def sink_tokens(shares: Tensor, num_prefix: int) -> Tensor:
    """Which tokens are sinks, bool (B, T): prefix tokens by their mean over images, patches in each image."""
    held = shares.clone()
    held[:, :num_prefix] = shares[:, :num_prefix].mean(0)
    return held * shares.shape[-1] >= TIMES_UNIFORM


def sink_share(shares: Tensor, num_prefix: int) -> Tensor:
    """Attention that sinks hold beyond uniform shares, (B, T) to (B,): 0…1, NaN where a share is not finite."""
    beyond = (shares - 1 / shares.shape[-1]).clamp_min(0)  # NaN stays
    sinks = sink_tokens(shares, num_prefix) | ~shares.isfinite()
    return torch.where(sinks, beyond, 0).sum(-1)


def find_sinks(attention: LayerAttention) -> tuple[str, list[Sink] | None]:
    """Of which queries is told ("every query" or "the CLS query"), and the sinks found; None where nothing is known."""
    queries, shares = "every query", received(attention)
    if shares is None:
        queries, shares = "the CLS query", received(attention, cls=True)
    if shares is None or not shares.isfinite().all():
        return queries, None
    return queries, list(_sinks(attention, shares))


def _sinks(attention: LayerAttention, shares: Tensor) -> Iterator[Sink]:
    prefix = attention.num_prefix
    found = sink_tokens(shares, prefix)  # (B, T)
    names = names_of_prefix(attention)
    parts = {name: slice(i, i + 1) for i, name in enumerate(names)} | {"patches": slice(prefix, None)}
    for name, part in parts.items():
        sinks, of_part = found[:, part], shares[:, part]
        if not sinks.any():
            continue
        held = of_part[sinks]
        value = None if attention.value_norms is None else _weighted(attention.value_norms[:, part][sinks], held)
        share, count = float(of_part.where(sinks, 0).sum(-1).mean()), float(sinks.sum(-1).float().mean())
        if share - count / shares.shape[-1] >= LEAST_SHARE:
            yield Sink(name, count, share, float(held.mean()) * shares.shape[-1], value)


def has_cls(attention: LayerAttention) -> bool:
    """Whether the first prefix token is known to be CLS."""
    return names_of_prefix(attention)[:1] == ["CLS"]


def names_of_prefix(attention: LayerAttention) -> list[str]:
    """What each prefix token was found to be, see `LayerAttention`; of archives without names, what they tell."""
    if attention.prefix_names:
        return list(attention.prefix_names)
    cls = attention.query == "cls" or attention.cosine is not None
    return [("CLS", f"register {i}")[i > 0] if cls else f"prefix token {i}" for i in range(attention.num_prefix)]


def _weighted(values: Tensor, weights: Tensor) -> float:
    return float((values * weights).sum() / weights.sum())


def on_registers(sinks: Sequence[Sink], attention: LayerAttention) -> str:
    """Whether registers do their work, in words; empty where no token is known to be CLS, or there is no need."""
    registers = sum(name.startswith("register") for name in names_of_prefix(attention))
    if not sinks or not has_cls(attention):
        return ""
    tokens = {sink.token.split(" ")[0] for sink in sinks}
    if not registers:
        return "attention collects on patches: registers would take it" if "patches" in tokens else ""
    if "patches" in tokens:
        return "attention collects on patches in spite of the registers"
    if "register" in tokens:
        return "the registers work: attention collects on them and on no patch"
    return "attention collects on no register and on no patch"
