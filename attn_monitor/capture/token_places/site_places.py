"""What is known of the places of tokens, while it is being found out: at each site, and in each grid's mosaics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from attn_monitor.capture.observation import SiteKey
from attn_monitor.capture.patch_grids import PatchConv
from attn_monitor.capture.token_places.layout import Places, TokenLayout
from attn_monitor.capture.token_places.silent_model import SilentModel
from attn_monitor.capture.token_places.tokens import Call, Tokens
from attn_monitor.grid import GridGeometry


@dataclass(frozen=True)
class Held:
    """What each token of V, q and k ("v", "q", "k") held in the mosaics of a grid, to be asked about again."""

    conv: PatchConv
    places: Mapping[str, Places]


@dataclass
class SitePlaces:
    """What is known of one attention operation's keys and queries.

    ``layout`` is that of the keys, None with the ``reason``. ``cls`` is the query index of the CLS token, None with the
    ``no_cls_reason``; ``patch_queries`` maps a cell to the query that holds it; ``counted`` are the queries that were
    found to be patches or tokens of the model's own, which a mean is over, in ascending order; ``prefix_names`` are the
    keys that were found to be "CLS" or a "register". ``partial_queries`` says that its
    queries are not just the tokens (some of them, or more), so that a mean over them is none over the tokens.
    ``entries`` are the layouts of the tokens that enter the modules around, by path. ``held`` is None where places are
    known by centres. ``together`` are the other parts of a layer that several operations make up, such as heads in a
    loop, and which is counted by its first one.
    """

    layout: TokenLayout | None = None
    reason: str = ""
    cls: int | None = None
    no_cls_reason: str = ""
    patch_queries: Mapping[int, int] = field(default_factory=dict)
    counted: tuple[int, ...] = ()
    prefix_names: Mapping[int, str] = field(default_factory=dict)
    partial_queries: bool = False
    entries: Mapping[str, TokenLayout] = field(default_factory=dict)
    held: Held | None = None
    together: tuple[SiteKey, ...] = ()

    def refuse(self, reason: str) -> None:
        """There is no layout of its keys after all."""
        self.layout, self.reason = None, reason


@dataclass
class Mosaic:
    """What the mosaics of one grid show: places of V, q and k at sites, and of tokens where modules begin and end."""

    conv: PatchConv
    geometry: GridGeometry | None  # of its grid, None where that tiles the image
    codes: Sequence[tuple[int, ...]]  # for each cell, which of the pictures it shows in each image
    v: dict[SiteKey, Places] = field(default_factory=dict)
    q: dict[SiteKey, Places] = field(default_factory=dict)
    k: dict[SiteKey, Places] = field(default_factory=dict)
    entries: dict[Call, Places] = field(default_factory=dict)
    exits: dict[Call, tuple[Places, ...]] = field(default_factory=dict)  # of each tensor that a call returns
    changes: dict[SiteKey, Tensor] = field(default_factory=dict)  # (M, M, T) between images, where V is not exact
    dilated: set[SiteKey] = field(default_factory=set)  # sites whose heads hold different cells of this grid

    def held(self, key: SiteKey) -> Held:
        """What the tokens of a site hold."""
        places = {"v": self.v, "q": self.q, "k": self.k}
        return Held(self.conv, {name: of_sites[key] for name, of_sites in places.items() if key in of_sites})

    @property
    def cells(self) -> int:
        """How many cells the grid has."""
        return math.prod(self.conv.grid)


@dataclass
class PlaceSearch:
    """A search for the places of all sites of a model on images of one size.

    ``reference`` are the tokens in the first mosaic's images.
    """

    silent_model: SilentModel
    images: Tensor  # the user's, (B, C, H, W)
    convs: Sequence[PatchConv]
    sites: dict[SiteKey, SitePlaces]
    mosaics: list[Mosaic] = field(default_factory=list)
    reference: Tokens = field(default_factory=Tokens)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.images.shape[-2], self.images.shape[-1]

    def placed(self) -> Iterator[tuple[SiteKey, SitePlaces, TokenLayout]]:
        """The sites whose keys have a layout so far."""
        for key, site in self.sites.items():
            if site.layout is not None:
                yield key, site, site.layout

    def mosaic_of(self, layout: TokenLayout | None) -> Mosaic | None:
        """The mosaic of a layout's grid, if there was one."""
        if layout is None:
            return None
        grid = layout.grid, layout.geometry
        return next((m for m in self.mosaics if (m.conv.grid, m.geometry) == grid), None)
