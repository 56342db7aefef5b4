"""Check during training, with a few images, that the token-to-patch assignment still holds.

Some cells of the user's image are replaced by noise. A token that was assigned exactly to a cell must not change while
that cell stays the same; if it does, the assignment is wrong. Only this counts as evidence: a token that does *not*
change may belong to a model with collapsed features, which is no other order. The replaced cells are drawn at random
for each check, so that one check finds two exchanged tokens with a probability of 4 in 5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attn_monitor.capture.observe.forward import Forward
from attn_monitor.capture.observe.observation import SiteKey
from attn_monitor.capture.observe.patch_grids import PatchConv
from attn_monitor.capture.observe.random_projections import relative_change
from attn_monitor.capture.sites import ReadableSite, Site
from attn_monitor.capture.token_places.ablated_model import AblatedModel
from attn_monitor.capture.token_places.decoding import shares
from attn_monitor.capture.token_places.layout import SEVERAL, STATIC, Places
from attn_monitor.capture.token_places.synthetic_images import (
    noise_images,
    pieced_together,
    ramps,
    small_strength,
)
from attn_monitor.capture.token_places.tokens import SiteFormat, SiteTokens
from attn_monitor.grid import Grid

_PARTITIONS = torch.tensor(
    [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [0, 1, 2]], device="cpu"
)  # three images by what they show
_SAME = _PARTITIONS[:, :, None] == _PARTITIONS[:, None]  # (5, 3, 3): whether two images show the same
_ROUNDS = 5  # images for the centres, as many as in `rank_centres`
_LEAST = 0.6  # least correlation of the centres of tokens with their rows and columns


def places_hold(model: nn.Module, images: Tensor, forward: Forward, sites: Sequence[Site], number: int) -> bool:
    """Check that nothing contradicts the assignment of any site.

    Three images are run for each grid of exact assignments, and four for assignments by centres, up to five times.

    Args:
        model: The model to run.
        images: The user's images, (B, C, *size); each check uses one, or several for centres.
        forward: Calls the model on images.
        sites: The sites; only readable ones are checked.
        number: Number of this check, from which the image and the random draws follow.

    Returns:
        False where a token changes that should not, or tokens do not follow the order of their patches.
    """
    readable = [site for site in sites if isinstance(site, ReadableSite)]
    formats = {site.key: SiteFormat(site.folding) for site in readable}
    ablated_model = AblatedModel(model, forward, formats, set(), images.device, min(len(images), 8))
    images = images.cpu()
    by_conv: dict[PatchConv, list[ReadableSite]] = {}
    for site in readable:
        if site.places.held is not None:
            by_conv.setdefault(site.places.held.conv, []).append(site)
    for conv, group in by_conv.items():
        image, seed = images[number % len(images)], 100 + number
        drawn = torch.randint(
            len(_PARTITIONS), (math.prod(conv.grid),), generator=torch.Generator().manual_seed(seed), device="cpu"
        )
        seen = ablated_model(_exchanged(image, conv, drawn, seed), seed).sites
        if not all(site.key in seen and _unmoved(seen[site.key], site, drawn) for site in group):
            return False
    return _centres_hold(ablated_model, images, [site for site in readable if site.places.held is None], number)


def _exchanged(image: Tensor, conv: PatchConv, drawn: Tensor, seed: int) -> Tensor:
    """Replace cells of an image by noise.

    Args:
        image: (C, *size).
        conv: The grid of cells.
        drawn: For each cell, the index of its partition of the three images.
        seed: Seed of the noise.

    Returns:
        (3, C, *size): the image and two versions of it; a cell is the same in those images that its partition groups.
    """
    # One bright and one dark: a token order that depends on brightness then differs.
    brightness = torch.tensor([0.5, -0.5], device="cpu")
    bright_and_dark = noise_images(image[None], 2, seed, brightness=brightness)
    cells = conv.cell_of_pixels(image.shape[1:])
    shown = _PARTITIONS[torch.where(cells >= 0, drawn[cells], 0)].to(image.device)  # (*size, 3); pixels in no cell stay
    return pieced_together(torch.cat([image[None], bright_and_dark]), shown.movedim(-1, 0))


def _unmoved(seen: SiteTokens, site: ReadableSite, drawn: Tensor) -> bool:
    """Check that no token of V, q or k changes between images that agree in its cell."""
    held = {} if site.places.held is None else site.places.held.places
    for name, places in held.items():
        sketches: Tensor | None = getattr(seen, name)
        if sketches is None:  # scores were no product of queries and keys this time
            continue
        if sketches.shape[1] != len(places):
            return False
        same = _same(places, drawn).to(sketches.device)
        changed = relative_change(sketches[:, None], sketches[None]) > seen.threshold  # (3, 3, T)
        finite = sketches.isfinite().all(-1).all(0)
        if bool((changed & same & finite).any()):
            return False
    return True


def _same(places: Places, drawn: Tensor) -> Tensor:
    """Return as (3, 3, T) between which images a token must not change."""
    places_ = torch.tensor(places, device="cpu")
    same = _SAME[drawn[places_.clamp_min(0)]].movedim(0, -1)
    return (same | (places_ == STATIC)) & (places_ != SEVERAL)


def _centres_hold(ablated_model: AblatedModel, images: Tensor, sites: Sequence[ReadableSite], number: int) -> bool:
    """Check that the centres of tokens rise with the rows and columns of their cells.

    One noise image shows centres roughly, so the mean over several decides where the first leaves doubts.
    """
    found: dict[SiteKey, list[Tensor]] = {}
    for seed in range(100 + _ROUNDS * number, 100 + _ROUNDS * (number + 1)):
        if not sites:
            break
        seen = ablated_model(ramps(images[seed % len(images)], small_strength(images.dtype), seed), seed).sites
        for site in sites:
            if site.key not in seen or seen[site.key].v.shape[1] != len(site.layout.order):
                return False
            tokens = seen[site.key]
            share = shares(tokens.v, tokens.threshold / 4)[:, list(site.layout.patches)]
            found.setdefault(site.key, []).append(share)
        sites = [site for site in sites if not _rise(torch.stack(found[site.key]).nanmean(0), site.layout.grid)]
    return not sites


def _rise(share: Tensor, grid: Sequence[int]) -> bool:
    """Check that the (axes, N) centres of tokens in row-major order are correlated with their rows and columns."""
    for axis, place in zip(share, Grid(grid).lines.to(share.device), strict=True):
        known = axis.isfinite()
        pair = torch.stack([axis[known], place[known].to(axis)])
        if int(known.sum()) > 2 and float(torch.corrcoef(pair)[0, 1]) < _LEAST:  # NaN where a grid has one row
            return False
    return True
