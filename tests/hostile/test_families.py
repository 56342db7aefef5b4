"""Families from outside: each map equals float64 rows, and each token lies where float64 pixels move it, or is refused.

Nothing here asks attn_monitor where a token is: attention is silenced by replacing Python names, every cell of the
image is nudged, and tokens are assigned to cells by the centres of what moves them.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from attn_monitor.attention import LayerAttention
from attn_monitor.capture.recorder import AttentionRecorder, record_attention
from attn_monitor.capture.sites import Site
from attn_monitor.capture.token_places.ablated_model import AblatedModel
from attn_monitor.errors import AttentionError
from tests.support.families import FAMILIES, Family
from tests.support.oracle import _method, _replaced, attention_matrices
from tests.support.tiers import sweep

LIMIT = 2e-3  # of uniform attention: |difference| times the number of keys
MOST_IMAGES = 100


@pytest.fixture(autouse=True)
def _libraries_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        for module in ("timm", "transformers", "vit_pytorch", "einops"):
            warnings.filterwarnings("ignore", module=rf"{module}\..*")
        yield


@dataclass
class Quiet:
    """V and q of one attention in a silent forward: (L, T, D), images and heads folded together as the model does."""

    v: Tensor
    q: Tensor | None


@contextmanager
def silenced(seen: list[Quiet]) -> Iterator[None]:
    """Each query is its own result, so that no token learns of another."""
    softmax_, products, weights = torch.softmax, list[tuple[Tensor, Tensor]](), list[tuple[Tensor, Tensor | None]]()

    def own(q: Tensor | None, v: Tensor, out: Tensor) -> Tensor:
        seen.append(Quiet(v.flatten(0, -3), None if q is None else q.flatten(0, -3)))
        if q is None or q.shape[:-1] != out.shape[:-1]:
            return torch.zeros_like(out)
        width, generator = out.shape[-1], torch.Generator().manual_seed(3)
        mix = torch.randn(q.shape[-1], width, generator=generator, dtype=q.dtype) / math.sqrt(q.shape[-1])
        return q if q.shape[-1] == width else q @ mix

    def sdpa(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        return own(q, v, q.new_zeros(*q.shape[:-1], v.shape[-1]))

    def softmax(x: Tensor, dim: int = -1, *_: Any, **__: Any) -> Tensor:
        out = softmax_(x, dim)
        if x.ndim >= 3 and dim in (-1, x.ndim - 1):
            weights[:] = [(out, next((q for q, s in reversed(products) if s.shape == x.shape), None))]
        return out

    def product(original: Any, *args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        left, right = [*(a for a in args if isinstance(a, Tensor)), None, None][:2]
        if right is None or out.ndim < 3:
            return out
        if weights and left.shape[-2:] == weights[0][0].shape[-2:] and left.shape[-1] == right.shape[-2]:
            return own(weights.pop()[1], right, out)
        products[:] = [*products[-3:], (left, out)]
        return out

    with (
        _replaced(sdpa, softmax, product),
        mock.patch("torch.bmm", partial(product, torch.bmm)),
        mock.patch.object(torch.Tensor, "matmul", _method(product, torch.Tensor.matmul)),
    ):
        yield


def responses(case: Family, lattice: tuple[int, int]) -> list[tuple[Tensor, Tensor | None]]:
    """How much each cell of a lattice moves the tokens of V and q at each attention: (cells, T) float64 each."""
    model, total = case.model().double(), list[tuple[Tensor, Tensor | None]]()
    images = case.images(2).double()
    cells, (height, width) = math.prod(lattice), case.size
    rows, cols = (torch.arange(n) * g // n for n, g in ((height, lattice[0]), (width, lattice[1])))
    cell = rows[:, None] * lattice[1] + cols
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for image, nudge in zip(images, noise, strict=True):
        quiet: list[list[Quiet]] = []
        for some in torch.arange(-1, cells).split(17):  # the first is the image itself
            seen: list[Quiet] = []
            with torch.no_grad(), silenced(seen):
                case.forward(model, image + 1e-6 * nudge * (cell == some[:, None, None])[:, None])
            quiet.append([Quiet(*(None if t is None else _by_image(t, len(some)) for t in (s.v, s.q))) for s in seen])  # type: ignore[arg-type]
        found = [(_moved([s.v for s in site]), _moved([s.q for s in site])) for site in zip(*quiet, strict=True)]
        total = [(v + a, None if q is None or b is None else q + b)
                 for (v, q), (a, b) in zip(total or [(torch.zeros(()), torch.zeros(()))] * len(found), found,
                                           strict=True)]  # fmt: skip
    return total


def _by_image(x: Tensor, count: int) -> Tensor | None:
    """(B, T, C) of heads first in each image."""
    return None if len(x) % count else x.unflatten(0, (count, -1)).transpose(1, 2).flatten(2)


def _moved(parts: Any) -> Any:
    if any(p is None for p in parts):
        return None
    tokens = torch.cat(parts)
    return (tokens[1:] - tokens[:1]).square().sum(-1) * 1e12  # (cells, T)


def true_cells(response: Tensor, lattice: tuple[int, int], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The cells that all tokens are assigned to by their centres, and the (2, T) centres in cells of the grid."""
    weight = response / response.sum(0)
    rows = (torch.arange(lattice[0]).double() + 0.5) / lattice[0] * grid[0] - 0.5
    cols = (torch.arange(lattice[1]).double() + 0.5) / lattice[1] * grid[1] - 0.5
    by_cell = weight.unflatten(0, lattice)
    centre = torch.stack([(by_cell.sum(1) * rows[:, None]).sum(0), (by_cell.sum(0) * cols[:, None]).sum(0)])
    wanted = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).T.double()
    scaled = [(t - t.mean(1, keepdim=True)) / t.std(1, keepdim=True).clamp_min(1e-9) for t in (centre, wanted)]
    assigned = linear_sum_assignment(-(scaled[0].T @ scaled[1]).numpy())[1]
    return torch.tensor(assigned), centre


def check_place(case: Family, site: Site, response: tuple[Tensor, Tensor | None], lattice: tuple[int, int]) -> None:
    """Keys and queries said to be patches must be where pixels move them; no other key may hold some of the image."""
    layout = site.layout
    assert layout is not None
    moved, (gh, gw) = response[0], layout.grid
    patches, prefix = moved[:, list(layout.patches)], moved[:, list(layout.prefix)]
    assert moved.shape[1] == site.keys
    assert layout.evidence != "exact" or bool((patches.amax(0) > 0).all())
    cells, centre = true_cells(patches, lattice, layout.grid)
    assert cells.tolist() == list(range(gh * gw)), f"{site.name}: keys lie elsewhere"
    wanted = torch.stack([cells // gw, cells % gw])
    assert float((centre - wanted).mean(1).abs().amax()) <= 0.5, f"{site.name}: a crop, or another grid"
    seen = prefix > 1e-12 * patches.amax()  # of a token that is no patch, all cells or none
    assert bool((seen.all(0) == seen.any(0)).all()), f"{site.name}: hidden patches"
    held, grid = site.places.patch_queries, site.places.query_grid or layout.grid
    if held and response[1] is not None:
        queries = response[1][:, [held[p] for p in sorted(held)]]
        if len(held) == grid[0] * grid[1]:
            assert true_cells(queries, lattice, grid)[0].tolist() == sorted(held), f"{site.name}: queries"
        else:
            assert queries.argmax(0).tolist() == sorted(held), f"{site.name}: queries"


def moved_by_class_token(case: Family) -> list[set[int] | None]:
    """Queries that move when a class parameter is nudged, at each attention in a silent forward."""
    model, image = case.model().double(), case.images(1).double()
    moved: list[set[int]] = []
    for name in case.class_parameter.split():
        runs = []
        changed = copy.deepcopy(model)
        parameter = next(p for n, p in changed.named_parameters() if n.endswith(name))
        parameter.data += 1e-3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)).double()
        for one in (model, changed):
            seen: list[Quiet] = []
            with torch.no_grad(), silenced(seen):
                case.forward(one, image)
            runs.append(seen)
        moved = moved or [set() for _ in runs[0]]
        for found, a, b in zip(moved, *runs, strict=True):
            if a.q is not None and b.q is not None:
                found |= set((a.q - b.q).abs().amax((0, 2)).nonzero().flatten().tolist())
    return list(moved)


def sites_asked(case: Family) -> tuple[tuple[Site, ...], int]:
    """The sites of a model, and how many images were asked about."""
    asked = 0
    original = AblatedModel.__call__

    def counted(self: Any, images: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal asked
        asked += len(images)
        return original(self, images, *args, **kwargs)

    with mock.patch.object(AblatedModel, "__call__", counted):
        sites = AttentionRecorder(case.model(), query="mean", forward=case.forward).sites(case.images())
    return sites, asked


def query_index(site: Site, query: Any) -> int:
    """The query's own token by what the site says, which `check_place` has proven."""
    if query == "cls":
        assert site.places.cls is not None
        return site.places.cls
    assert site.layout is not None
    return site.places.patch_queries[query[0] * (site.places.query_grid or site.layout.grid)[1] + query[1]]


def recorded(model: nn.Module, case: Family, site: Site, query: Any) -> LayerAttention | None:
    try:
        return record_attention(model, case.images(), layers=site.index, query=query, forward=case.forward)[0]
    except AttentionError:
        return None


@pytest.mark.parametrize("case", sweep([pytest.param(c, id=c.name.replace(" ", "_")) for c in FAMILIES], quick=1))
def test_each_map_is_right_or_refused(case: Family) -> None:
    sites, asked = sites_asked(case)
    placed = [s for s in sites if s.layout is not None and s.refusal is None]
    print(row(case, sites, asked))
    assert len(placed) >= case.placed
    assert asked <= MOST_IMAGES
    model = case.model()
    matrices = attention_matrices(model, case.images(), case.forward)
    assert len(matrices) == len(sites)
    assert all(len(str(s.refusal)) > 60 for s in sites if s.refusal is not None)
    layouts = [s.layout for s in placed if s.layout is not None]
    grids = [o.grid for o in layouts] + [s.places.query_grid for s in placed if s.places.query_grid]
    lattice = (max(grid[0] for grid in grids), max(grid[1] for grid in grids))
    if lattice == (2, 2):
        lattice = (4, 4)
    moved, classes = responses(case, lattice), moved_by_class_token(case)
    for site in placed:
        assert site.layout is not None
        check_place(case, site, moved[site.index], lattice)
        for query in ("mean", "cls", (0, 1)):
            attention = recorded(model, case, site, query)
            if attention is None:
                continue
            matrix = matrices[site.index]
            if query == "cls":
                assert classes, f"{site.name}: there is no class token"
                assert classes[site.index] == {query_index(site, query)}
            # Padding of a window and text are no queries of the image.
            several: Any = slice(None)
            padded = case.name == "Twins-SVT" and site.queries == site.keys
            if padded or "language_model" in site.name:
                several = list(site.layout.patches)
            wanted = matrix[:, :, several].mean(2) if query == "mean" else matrix[:, :, query_index(site, query)]
            wanted = wanted[..., list(site.layout.order)]
            assert attention.grid == site.layout.grid
            apart = (attention.rows.double() - wanted).abs().amax() * site.keys
            assert float(apart) <= LIMIT, (site.name, query, float(apart))


def row(case: Family, sites: tuple[Site, ...], asked: int) -> str:
    """A line of the table: layers, those with places, how they are known, and images asked."""
    layouts = [s.layout for s in sites if s.layout is not None and s.refusal is None]
    evidence = sorted({layout.evidence for layout in layouts})
    grids = sorted({"{}x{}".format(*layout.grid) for layout in layouts})
    weights = "redrawn" if case.lively else "as built"
    return (
        f"| {case.name} | {weights} | {len(sites)} | {len(layouts)} | {', '.join(evidence)} | {', '.join(grids)} "
        f"| {asked} |"
    )


if __name__ == "__main__":
    print("| family | weights | layers | with places | known by | grids | images asked |\n|" + " --- |" * 7)
    for family in FAMILIES:
        print(row(family, *sites_asked(family)))
