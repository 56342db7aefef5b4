"""What is known of an attention operation's tokens: their places, and what mosaics of one grid told."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from attn_monitor.capture.observer import SiteKey
from attn_monitor.capture.places import layout as lay
from attn_monitor.capture.places.layout import PatchConv, Places, TokenLayout
from attn_monitor.capture.places.silent_forward import Call, SiteTokens


@dataclass
class SitePlaces:
    """What is known of one attention operation's keys and queries.

    ``layout`` is that of the keys, None with the reason in ``why``. ``cls`` is the query index of the CLS token, None
    with the reason in ``no_cls``; ``patch_queries`` maps a cell to the query that holds it. ``part`` says that its
    queries are not just the tokens (some of them, or more), so that a mean over them is none over the tokens.
    ``entries`` are the layouts of the tokens that enter the modules around.
    """

    layout: TokenLayout | None = None
    why: str = ""
    cls: int | None = None
    no_cls: str = ""
    patch_queries: Mapping[int, int] = field(default_factory=dict)
    part: bool = False
    entries: Mapping[str, TokenLayout] = field(default_factory=dict)


@dataclass
class Mosaic:
    """What one grid's mosaics told: places of V, q and k at each site, and of tokens at modules' ends."""

    conv: PatchConv
    v: dict[SiteKey, Places] = field(default_factory=dict)
    q: dict[SiteKey, Places] = field(default_factory=dict)
    k: dict[SiteKey, Places] = field(default_factory=dict)
    entries: dict[Call, Places] = field(default_factory=dict)
    exits: dict[Call, Places] = field(default_factory=dict)
    apart: dict[SiteKey, Tensor] = field(default_factory=dict)  # (M, M, T): changes between images, where not exact
    dilated: set[SiteKey] = field(default_factory=set)  # sites whose heads hold different cells of this grid

    @property
    def cells(self) -> int:
        """How many cells the grid has."""
        return math.prod(self.conv.grid)


def limit_of(site: SiteTokens) -> float:
    """By how much one of its tokens has to differ to count as changed."""
    return lay.threshold(site.dtype, site.v.device)


def mosaic_of(mosaics: Sequence[Mosaic], layout: TokenLayout) -> Mosaic | None:
    """The mosaic of a layout's grid, if that was asked."""
    return next((m for m in mosaics if m.conv.grid == layout.grid), None)


def grid_of(site: SitePlaces) -> tuple[int, int]:
    """Rows and columns of its keys' patches; (0, 0) without a layout."""
    return (0, 0) if site.layout is None else site.layout.grid
