"""Find which channels each token depends on, where several tokens hold each patch."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from attn_monitor.capture.observe.observation import SiteKey
from attn_monitor.capture.observe.random_projections import relative_change
from attn_monitor.capture.token_places.site_places import PlaceSearch
from attn_monitor.capture.token_places.synthetic_images import noise_images

Groups = tuple[tuple[int, ...], ...]

_MOST = 256  # channels that are changed one by one


def channel_groups(search: PlaceSearch, several: Mapping[SiteKey, int]) -> dict[SiteKey, Groups]:
    """Return the groups of channels that the tokens at one place hold, in order of their first channels.

    Args:
        search: The search.
        several: How many tokens of a site hold each patch.

    Returns:
        For each of these sites as many groups, of which each channel is in one; none where tokens hold no such groups.
    """
    base, other = noise_images(search.images, 2, seed=13)
    channels = len(base)
    if not 1 < channels <= _MOST:
        return {}
    alone = torch.eye(channels, dtype=torch.bool, device="cpu").view(channels, channels, *(1 for _ in base.shape[1:]))
    seen = search.ablated_model(torch.cat([base[None], torch.where(alone, other, base)]), 1).sites
    found: dict[SiteKey, Groups] = {}
    for key in several.keys() & seen.keys():
        tokens = seen[key]
        moved = relative_change(tokens.v[1:], tokens.v[:1]) > tokens.threshold / 4  # (channels, tokens)
        groups = {tuple(of_token.nonzero().flatten().tolist()) for of_token in moved.T} - {()}
        if len(groups) == several[key] and sorted(c for group in groups for c in group) == list(range(channels)):
            found[key] = tuple(sorted(groups))
    return found
