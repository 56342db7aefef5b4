"""Hold what is known at a stage of the search for the token-to-patch assignment, for each site and each grid.

All are values: each stage of `find_places` takes a `PlaceSearch` and returns one that knows more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from attn_monitor.capture.observe.observation import SiteKey
from attn_monitor.capture.observe.patch_grids import PatchConv
from attn_monitor.capture.token_places.ablated_model import AblatedModel
from attn_monitor.capture.token_places.layout import Places, TokenLayout
from attn_monitor.capture.token_places.tokens import Call, Tokens
from attn_monitor.grid import GridGeometry

ONE_IMAGE = "Record one image at a time"
"""The remedy where tokens depend on the batch."""


@dataclass(frozen=True)
class Held:
    """Hold the cells of V, q and k (keys "v", "q", "k") in the mosaics of a grid, to be checked again in training."""

    conv: PatchConv
    places: Mapping[str, Places]


@dataclass(frozen=True)
class SitePlaces:
    """Hold what is known of one attention operation's keys and queries.

    Attributes:
        layout: Layout of the keys, None where there is none, for the ``reason``.
        reason: Why the keys have no layout, "" where they have one.
        channel_groups: The channels that each of several keys at one place holds, where that is the reason; else empty.
        cls: Query index of the CLS token, None where there is none, for the ``no_cls_reason``.
        no_cls_reason: Why no query is the CLS token, "" also where every query is a patch.
        cls_of_sequences: The CLS token of each sequence, where an image has several, such as one for each frame.
        patch_queries: The query of each cell.
        query_grid: Grid of these cells, where queries are a finer one than the keys; None for that of the keys.
        counted: Queries that are patches or the model's own tokens, in ascending order; a mean is over these.
        prefix_names: Names of keys in the prefix, "CLS" or "register".
        partial_queries: Whether the queries are not exactly the tokens, so that their mean is no mean over the tokens.
        entries: Layouts of the tokens that enter the modules around, by path.
        cls_at: Index of the CLS token among the tokens that enter the modules around, by path.
        held: The exact assignment to check again, None where the layout is by centres.
        together: The other operations of a layer that consists of several, such as heads in a loop; the layer is
            counted by its first operation.
    """

    layout: TokenLayout | None = None
    reason: str = ""
    channel_groups: tuple[tuple[int, ...], ...] = ()
    cls: int | None = None
    no_cls_reason: str = ""
    cls_of_sequences: tuple[int, ...] = ()
    patch_queries: Mapping[int, int] = field(default_factory=dict)
    query_grid: tuple[int, ...] | None = None
    counted: tuple[int, ...] = ()
    prefix_names: Mapping[int, str] = field(default_factory=dict)
    partial_queries: bool = False
    entries: Mapping[str, TokenLayout] = field(default_factory=dict)
    cls_at: Mapping[str, int] = field(default_factory=dict)
    held: Held | None = None
    together: tuple[SiteKey, ...] = ()


@dataclass(frozen=True)
class Mosaic:
    """Hold the assignments that the mosaics of one grid show.

    Attributes:
        conv: The grid, with its cells in the image.
        geometry: Where the cells lie in the image, None where they tile it.
        codes: For each cell, the picture that it shows in each of the M images.
        v: Cells of the values at each site.
        q: Cells of the queries at each site.
        k: Cells of the keys at each site.
        entries: Cells of the tokens that enter each call of a module.
        exits: Cells of the tokens in each tensor that a call returns.
        changes: (M, M, T) relative changes of V between the images, at sites where V is not exact.
        dilated: Sites with heads that hold different cells.
    """

    conv: PatchConv
    geometry: GridGeometry | None
    codes: Sequence[tuple[int, ...]]
    v: dict[SiteKey, Places] = field(default_factory=dict)
    q: dict[SiteKey, Places] = field(default_factory=dict)
    k: dict[SiteKey, Places] = field(default_factory=dict)
    entries: dict[Call, Places] = field(default_factory=dict)
    exits: dict[Call, tuple[Places, ...]] = field(default_factory=dict)
    changes: dict[SiteKey, Tensor] = field(default_factory=dict)
    dilated: set[SiteKey] = field(default_factory=set)

    def held(self, key: SiteKey) -> Held:
        """Return the cells that the tokens of a site hold."""
        places = {"v": self.v, "q": self.q, "k": self.k}
        return Held(self.conv, {name: of_sites[key] for name, of_sites in places.items() if key in of_sites})

    @property
    def cells(self) -> int:
        """Return the number of cells of the grid."""
        return math.prod(self.conv.grid)


@dataclass(frozen=True)
class PlaceSearch:
    """Hold what is known of all sites of a model, on images of one size.

    Attributes:
        ablated_model: The model with ablated attention.
        images: The user's images, (B, C, *size).
        convs: Convolutions that could be the patch embedding.
        sites: The sites, with what is known of each.
        mosaics: The grids that were tried.
        reference: The tokens in the images of the first mosaic.
        nudged: The tokens in the first of these images, once with each parameter changed that could be a token.
    """

    ablated_model: AblatedModel
    images: Tensor
    convs: Sequence[PatchConv]
    sites: Mapping[SiteKey, SitePlaces]
    mosaics: tuple[Mosaic, ...] = ()
    reference: Tokens = field(default_factory=Tokens)
    nudged: tuple[Tokens, ...] = ()

    @property
    def size(self) -> tuple[int, ...]:
        """Return the number of pixels on each axis of the images."""
        return tuple(self.images.shape[2:])

    def with_sites(self, changed: Mapping[SiteKey, SitePlaces]) -> PlaceSearch:
        """Return the search with other knowledge of some sites."""
        return replace(self, sites={**self.sites, **changed})

    def refusing(self, reasons: Mapping[SiteKey, str]) -> PlaceSearch:
        """Return the search without the layouts of some sites, for these reasons."""
        return self.with_sites({k: replace(self.sites[k], layout=None, reason=r) for k, r in reasons.items()})

    def placed(self) -> Iterator[tuple[SiteKey, SitePlaces, TokenLayout]]:
        """Iterate over the sites with a layout so far."""
        for key, site in self.sites.items():
            if site.layout is not None:
                yield key, site, site.layout

    def mosaic_of(self, layout: TokenLayout | None) -> Mosaic | None:
        """Return the mosaic of a layout's grid, None where there is none."""
        if layout is None:
            return None
        grid = layout.grid, layout.geometry
        return next((m for m in self.mosaics if (m.conv.grid, m.geometry) == grid), None)
