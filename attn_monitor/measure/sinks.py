"""Attention sinks of a layer: tokens on which attention collects, and what their values carry.

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
"""A token is a sink if it receives at least this many times the uniform share, which is 1 / T for T tokens."""
LEAST_SHARE = 0.01
"""Smallest share of all attention, beyond uniform shares, that makes a place a sink."""
CARRIES = 0.5
"""Smallest norm of V, relative to the median token's, with which a sink carries something."""


@dataclass(frozen=True)
class AttentionSink:
    """One place on which attention collects, as means over images and heads."""

    token: str  # "CLS", "register 1", "patches", or "token 27" if its kind is unknown
    tokens: float  # number of such tokens in an image
    share: float  # of all attention, on all of them together
    times_uniform: float  # attention on one of them, relative to the uniform share
    value: float | None  # norm of its V relative to the median token's; None if V was not read

    @property
    def verdict(self) -> str:
        """Name the kind of sink."""
        if self.value is None or not math.isfinite(self.value):
            return "a sink"
        return "a sink that broadcasts" if self.value >= CARRIES else "a sink that carries nothing"


def received_shares(attention: LayerAttention, *, cls: bool = False) -> Tensor | None:
    """Return the share of attention on each token, (B, T), or None if it is unknown.

    Args:
        attention: A layer's attention.
        cls: Count the CLS query's attention alone, instead of the mean over every query.
    """
    if attention.kind == "signed" or (cls and attention.query != "cls"):
        return None
    if cls or attention.query == "mean":
        return _shares(attention.rows.mean(1))
    return None if attention.received is None else _shares(attention.received)


def _shares(weights: Tensor) -> Tensor:
    """Scale weights (B, T) to sum to 1, which the rows of some models do not."""
    return weights / weights.sum(-1, keepdim=True)


def sink_tokens(shares: Tensor, num_prefix: int) -> Tensor:
    """Mark tokens that are sinks, bool (B, T): prefix tokens by their mean over images, patches image by image."""
    held = shares.clone()
    held[:, :num_prefix] = shares[:, :num_prefix].mean(0)
    return held * shares.shape[-1] >= TIMES_UNIFORM


def sink_share(shares: Tensor, num_prefix: int) -> Tensor:
    """Sum the attention on sinks beyond uniform shares, (B, T) to (B,): 0 to 1, NaN where a share is not finite."""
    beyond = (shares - 1 / shares.shape[-1]).clamp_min(0)  # keeps NaN
    sinks = sink_tokens(shares, num_prefix) | ~shares.isfinite()
    return torch.where(sinks, beyond, 0).sum(-1)


def find_sinks(attention: LayerAttention) -> tuple[str, list[AttentionSink] | None]:
    """Find the sinks of a layer.

    Returns:
        The queries that were counted, "every query" or "the CLS query", and the sinks; None instead of these if the
        attention is unknown or not finite.
    """
    queries, shares = "every query", received_shares(attention)
    if shares is None:
        queries, shares = "the CLS query", received_shares(attention, cls=True)
    if shares is None or not shares.isfinite().all():
        return queries, None
    return queries, list(_sinks(attention, shares))


def _sinks(attention: LayerAttention, shares: Tensor) -> Iterator[AttentionSink]:
    prefix = attention.num_prefix
    found = sink_tokens(shares, prefix)  # (B, T)
    parts = {name: slice(i, i + 1) for i, name in enumerate(attention.prefix_names)} | {"patches": slice(prefix, None)}
    for name, part in parts.items():
        sinks, of_part = found[:, part], shares[:, part]
        if not sinks.any():
            continue
        held = of_part[sinks]
        value = None if attention.value_norms is None else _weighted(attention.value_norms[:, part][sinks], held)
        share, count = float(of_part.where(sinks, 0).sum(-1).mean()), float(sinks.sum(-1).float().mean())
        if share - count / shares.shape[-1] >= LEAST_SHARE:
            yield AttentionSink(name, count, share, float(held.mean()) * shares.shape[-1], value)


def has_cls(attention: LayerAttention) -> bool:
    """Return True if the first prefix token is known to be the CLS token."""
    return attention.prefix_names[:1] == ("CLS",)


def _weighted(values: Tensor, weights: Tensor) -> float:
    return float((values * weights).sum() / weights.sum())


def register_verdict(sinks: Sequence[AttentionSink], attention: LayerAttention) -> str:
    """Describe whether registers take attention off the patches; empty if no CLS token or no sink is known."""
    registers = sum(name.startswith("register") for name in attention.prefix_names)
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
