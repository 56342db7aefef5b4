"""Describe the attention sites of a model: each can be read, or is refused with the reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attn_monitor.capture.observe.attention_rows import Folding
from attn_monitor.capture.observe.observation import SiteKey
from attn_monitor.capture.token_places.layout import TokenLayout
from attn_monitor.capture.token_places.site_places import SitePlaces
from attn_monitor.errors import AttentionError


def site_name(key: SiteKey) -> str:
    """Return the module path, with ``#n`` for the module's n-th further attention in a forward."""
    path, count = key
    return f"{path or '(root)'}#{count}" if count else path or "(root)"


@dataclass(frozen=True, kw_only=True)
class _Site:
    """Describe one place in the model where attention runs."""

    index: int  # in order of execution
    key: SiteKey
    op: str
    heads: int
    queries: int
    keys: int
    mixed: bool  # the weights that meet V differ from the softmax
    error: float | None  # relative difference between row·V and the model's own output; None if not compared
    folding: Folding | None  # of batch and heads, if they are folded or swapped
    scope: str  # path of the innermost module around all of it
    places: SitePlaces
    overlooked: bool = False  # it mixes tokens, but no attention was observed in it
    others: tuple[str, ...] = ()  # further paths of the module, where it is in the model several times
    stack: str = ""  # path of the second stack around it, such as an MAE's decoder; "" in the encoder

    @property
    def name(self) -> str:
        """Return the site's name, see `site_name`."""
        return site_name(self.key)


@dataclass(frozen=True, kw_only=True)
class ReadableSite(_Site):
    """Describe a site with a known token-to-patch assignment."""

    layout: TokenLayout
    refusal: ClassVar[None] = None


@dataclass(frozen=True, kw_only=True)
class RefusedSite(_Site):
    """Describe a site that cannot be shown as a map."""

    refusal: AttentionError
    layout: ClassVar[None] = None


Site = ReadableSite | RefusedSite


def prefix_names(site: ReadableSite) -> tuple[str, ...]:
    """Return the names of a site's prefix tokens, see `LayerAttention.prefix_names`."""
    names, registers = [], 0
    for token in site.layout.prefix:
        name = site.places.prefix_names.get(token, f"token {token}")
        registers += name == "register"
        names.append(f"register {registers}" if name == "register" else name)
    return tuple(names)
