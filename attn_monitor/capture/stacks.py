"""Separate the encoder's attention layers from a second stack of blocks, such as an MAE's decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from attn_monitor.capture.block_tokens import CONTAINERS, block_of
from attn_monitor.capture.observe.module_paths import children_with, words_of

DECODER = {"decoder", "dec", "predictor"}


class ObservedLayer(NamedTuple):
    """Describe an attention that ran."""

    path: str  # of its module
    queries: int  # per image, over all windows


def second_stacks(ran: Sequence[ObservedLayer], modules: dict[str, nn.Module]) -> list[str]:
    """Return the path of the second stack around each attention, in order of execution; "" for the encoder's.

    The encoder is the longest list of blocks (the first of equal ones). A list that runs entirely after it is a second
    stack, unless it has at most half as many queries, like later stages of a pyramid or class attention. A decoder or
    predictor by name is always a second stack, unless nothing else has attention.
    """
    paths = [path for path, _ in ran]
    named = [_named_decoder(path) for path in paths]
    if all(named):
        return [""] * len(ran)
    lists = ["" if name else _list_of(path, paths, modules) for path, name in zip(paths, named, strict=True)]
    blocks = [block_of(path, paths, modules) for path in paths]
    lengths = {one: len({b for b, of in zip(blocks, lists, strict=True) if of == one}) for one in lists if one}
    if not lengths:
        return named
    encoder = max(lengths, key=lambda one: lengths[one])
    end = max(index for index, one in enumerate(lists) if one == encoder)
    queries, after = ran[end].queries, set[str]()
    for one in dict.fromkeys(lists[end + 1 :]):
        first = lists.index(one)
        if one and first > end:
            if after or 2 * ran[first].queries > queries:
                after.add(one)
            queries = ran[first].queries
    return [name or (one if one in after else "") for name, one in zip(named, lists, strict=True)]


def _named_decoder(path: str) -> str:
    """Return the path down to the first name with a word for a decoder; "" if there is none."""
    parts = path.split(".")
    for depth, part in enumerate(parts, 1):
        if not DECODER.isdisjoint(words_of(part)):
            return ".".join(parts[:depth])
    return ""


def _list_of(path: str, others: Sequence[str], modules: dict[str, nn.Module]) -> str:
    """Return the outermost list around a path in which several items hold attention; "" if there is none."""
    parts = path.split(".")
    for depth in range(1, len(parts)):
        parent = ".".join(parts[:depth])
        if isinstance(modules.get(parent), CONTAINERS) and len(children_with(others, parent)) > 1:
            return parent
    return ""
