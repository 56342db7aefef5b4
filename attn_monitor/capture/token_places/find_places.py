"""Assign the keys and queries of every attention operation to patches, by running the model.

A few forwards with ablated attention (`ablated_model`) on `synthetic_images` are enough. The place of a token is the
part of the image that it depends on, so neither names nor positions in the sequence are trusted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from attn_monitor.capture.observe.forward import Forward
from attn_monitor.capture.observe.observation import SiteKey
from attn_monitor.capture.observe.patch_grids import PatchConv, candidate_grids
from attn_monitor.capture.token_places.ablated_model import AblatedModel
from attn_monitor.capture.token_places.borders import place_by_borders
from attn_monitor.capture.token_places.centres import rank_centres
from attn_monitor.capture.token_places.channel_groups import channel_groups
from attn_monitor.capture.token_places.cls_and_queries import find_cls, find_queries
from attn_monitor.capture.token_places.counted_lines import counted_grids
from attn_monitor.capture.token_places.mosaics import describe_keys, keys_of_each_cell, read_mosaics
from attn_monitor.capture.token_places.other_mixing import (
    name_chunks_of_keys,
    refuse_changed_with_others,
    refuse_mixtures,
    refuse_other_mixing,
    refuse_side_by_side,
)
from attn_monitor.capture.token_places.output_places import check_outputs
from attn_monitor.capture.token_places.pixel_maps import locate_convs
from attn_monitor.capture.token_places.place_checks import (
    check_on_user_images,
    depend_on_batch,
    refuse_overlaps,
    refuse_partial_views,
)
from attn_monitor.capture.token_places.shared_cells import refuse_shared_cells
from attn_monitor.capture.token_places.site_places import ONE_IMAGE, PlaceSearch, SitePlaces
from attn_monitor.capture.token_places.synthetic_images import noise_images, small_strength
from attn_monitor.capture.token_places.tokens import SiteFormat
from attn_monitor.grid import Grid


def find_places(
    model: nn.Module,
    images: Tensor,
    forward: Forward,
    formats: Mapping[SiteKey, SiteFormat],
    *,
    keys: int,
    moving: Mapping[SiteKey, int],
    convs: Sequence[PatchConv],
    batch_size: int,
) -> Mapping[SiteKey, SitePlaces]:
    """Assign keys and queries to patches at the sites with a format, and check this on the user's images.

    Args:
        model: The model to run.
        images: The user's images, (B, C, *size), on the device of the model.
        forward: Calls the model on images.
        formats: Layout of the tensors at each site, in the order in which the sites run.
        keys: Number of keys of the first site.
        moving: For each site, how many keys depend on the image in an ordinary forward.
        convs: Convolutions that could be the patch embedding.
        batch_size: How many images run at once.

    Returns:
        For each site, its layout or the reason for having none.
    """
    around = {path for key in formats for path in _ancestors(key[0])}
    paths = around & dict(model.named_modules()).keys()
    ablated_model = AblatedModel(model, forward, formats, paths, images.device, batch_size)
    images = images.cpu()  # images derived from these wait on the host too
    convs = locate_convs(ablated_model, images, convs, keys)
    search = PlaceSearch(ablated_model, images, convs, {key: SitePlaces() for key in formats})
    grids = [*candidate_grids(search.size, keys, moving[next(iter(formats))], convs)]
    # Where the first attention is coarser than the patches, these show whether its heads read the same part of them.
    grids = [*(c for c in convs if c.disjoint and math.prod(c.grid) > keys), *grids]
    search = read_mosaics(search, grids)
    search = read_mosaics(search, counted_grids(search))
    if not any(search.placed()):  # where several tokens hold each patch, the reason should say so
        live = moving[next(iter(formats))]
        search = read_mosaics(search, [c for c in convs if c.disjoint and 0 < math.prod(c.grid) < live])
    if not search.mosaics:
        reason = f"no grid of patches that fits images of {Grid(search.size)} has so many keys"
        return search.refusing(dict.fromkeys(search.sites, reason)).sites
    # Without a site, what ran on the first noise images did not run on these: a kernel that is read by chance.
    strength = max((small_strength(site.dtype) for site in search.reference.sites.values()), default=0.0)
    chosen = _least_alike(images)
    search = check_on_user_images(search, chosen, strength)
    unplaced = [k for k, s in search.sites.items() if s.layout is None and not s.reason and k in search.reference.sites]
    if unplaced:
        search, ranked = rank_centres(search, chosen[0], strength, unplaced)
        search, measured = place_by_borders(search, unplaced)
        if measured:
            search = check_on_user_images(search, chosen, strength)
        search = refuse_shared_cells(search, ranked)
    for stage in _STAGES:
        search = stage(search)
    without = [key for key, site in search.sites.items() if site.layout is None and not site.reason]
    reasons = {key: describe_keys(key, search.mosaics, depends_on_image=moving[key] > 0) for key in without}
    seen = search.reference.sites
    reasons |= {key: _NOT_FINITE for key in without if key in seen and not bool(seen[key].v.isfinite().all())}
    search = search.refusing(reasons)
    refused = [key for key, site in search.sites.items() if site.layout is None]
    search = search.refusing(dict.fromkeys(depend_on_batch(search, refused), _OF_BATCH))
    several = {key: n for key in refused if (n := keys_of_each_cell(key, search.mosaics))}
    groups = channel_groups(search, several) if several and not any(search.placed()) else {}
    return search.with_sites({key: replace(search.sites[key], channel_groups=of) for key, of in groups.items()}).sites


_NOT_FINITE = "where results of attention are replaced to find its patches, its tokens are NaN or infinite"
_OF_BATCH = (
    f"an image alone has other tokens than the same image in a batch, so where its patches are cannot be found out. "
    f"{ONE_IMAGE}"
)
_STAGES: tuple[Callable[[PlaceSearch], PlaceSearch], ...] = (
    refuse_partial_views,
    refuse_overlaps,
    find_queries,
    find_cls,
    refuse_mixtures,
    refuse_other_mixing,
    refuse_side_by_side,
    check_outputs,
    refuse_changed_with_others,
    name_chunks_of_keys,
)


def _ancestors(path: str) -> list[str]:
    parts = path.split(".") if path else []
    return [".".join(parts[:depth]) for depth in range(len(parts) + 1)]


def _least_alike(images: Tensor) -> list[Tensor]:
    """Return the brightest and the darkest of the user's images; noise where all show one colour only."""
    spread = min(1.0, float(images.float().std(correction=0)))
    lively = images[images.flatten(1).float().std(1, correction=0) > 1e-3 * spread]
    if not len(lively):
        return [noise_images(images, 1, seed=3)[0]]
    brightness = lively.flatten(1).float().mean(1)
    return [lively[i] for i in dict.fromkeys([int(brightness.argmax()), int(brightness.argmin())])]
