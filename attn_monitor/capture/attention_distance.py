"""Mean attention distance of a layer, from its whole attention matrix while it can still be read."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attn_monitor import functional as F
from attn_monitor.capture.observation import ReadObservation
from attn_monitor.capture.sites import ReadableSite


def has_query_of_each_patch(site: ReadableSite) -> bool:
    """Whether the distance is defined: every patch must be a query too."""
    return len(site.places.patch_queries) == math.prod(site.layout.grid)


@F.full_precision()
def mean_distance(site: ReadableSite, seen: ReadObservation, image_size: tuple[int, int]) -> Tensor:
    """Mean attention distance over all patches as queries, a few at a time: (B, H) pixels."""
    (gh, gw), device = site.layout.grid, seen.rows.device  # FSDP may have moved the images to another device
    rows, cols = torch.arange(gh, device=device), torch.arange(gw, device=device)
    centres = torch.cartesian_prod(rows * (image_size[0] / gh), cols * (image_size[1] / gw))  # (N, 2) pixels
    patches = torch.tensor(site.layout.patches, device=device)
    patch_of_query = torch.full((site.queries,), -1, device=device)  # -1 for the prefix
    for patch, query in site.places.patch_queries.items():
        patch_of_query[query] = patch
    total = torch.zeros((), device=device)
    for start, chunk in seen.source.chunks():
        queries = patch_of_query[start : start + chunk.shape[2]]
        p = chunk[:, :, queries >= 0][..., patches]  # (B, H, queries, N)
        total = total + F.attention_distance(p, centres[queries[queries >= 0]], centres).sum(-1)
    return total / len(patches)
