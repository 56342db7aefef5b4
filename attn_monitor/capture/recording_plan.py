"""What can be decided before a recording: which sites are read, which row of each, and which modules are watched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attn_monitor.capture.attention_rows import Query
from attn_monitor.capture.block_tokens import block_of
from attn_monitor.capture.forward import is_sharded
from attn_monitor.capture.layer_selection import Layers, QuerySpec, Selection
from attn_monitor.capture.observation import SiteKey
from attn_monitor.capture.sites import ReadableSite, Site
from attn_monitor.errors import AttentionError, UnsupportedAttentionError


@dataclass(frozen=True)
class Block:
    """The transformer block around a site, and the order of the tokens that enter it."""

    module: nn.Module
    order: Tensor  # (T,): prefix first, CLS first of all, and patches row by row
    num_prefix: int
    has_cls: bool


@dataclass(frozen=True)
class SitePlan:
    """How one site is recorded."""

    site: ReadableSite
    query: Query
    order: Tensor | None  # token indices, prefix first and patches row by row; None where they stand so already
    block: Block | None  # only where its tokens are asked for


@dataclass(frozen=True)
class RecordingPlan:
    """How the wanted layers of a model are recorded; valid while its modules and the images' size stay the same.

    ``query`` is what is read in all of them. ``watched`` are the (path, module) pairs inside which operations are
    observed; after the site ``last`` the forward may be left (None: it must run to its end). Where layers were counted
    from the end, ``known`` are all sites, and others that run after the last one are an error.
    """

    query: QuerySpec
    sites: Mapping[SiteKey, SitePlan]
    watched: Sequence[tuple[str, nn.Module]]
    last: SiteKey | None
    known: frozenset[SiteKey] = frozenset()


def plan_recording(
    model: nn.Module,
    sites: Sequence[Site],
    query: QuerySpec,
    wanted: Selection,
    device: torch.device,
    *,
    tokens: bool,
    from_end: bool,
) -> RecordingPlan:
    """The plan for the ``wanted`` ones of all sites; ``tokens``: what enters their blocks is asked for too.

    ``from_end``: which ones they are hangs on how many layers the encoder has.
    """
    modules = dict(model.named_modules())
    planned = {
        key: SitePlan(site, index, _order(site, device), _block(site, sites, modules, device) if tokens else None)
        for key, (site, index) in wanted.items()
    }
    sites = [site for site in sites if not site.overlooked]  # those that can be seen running
    last = max(sites, key=lambda site: (site.key in wanted or (from_end and not site.stack), site.index))
    later = [site for site in sites if from_end and site.index >= last.index]
    roots, paths = {site.scope for site, _ in wanted.values()}, {site.key[0] for site in sites}
    roots |= {site.scope for site in later}
    roots = {_with_forward(path, modules) for path in roots}
    # Modules without attention of their own need no hooks: what runs in them is credited to the watched one around.
    watched = [(p, modules[p]) for p in modules if p in roots or (p in paths and any(_is_below(p, r) for r in roots))]
    if is_sharded(model) or any(isinstance(module, torch.jit.ScriptModule) for module in modules.values()):
        return RecordingPlan(query, planned, watched, None)  # TorchScript may not survive what is raised in it
    known = frozenset(key for site in sites for key in (site.key, *site.places.together) if from_end)
    return RecordingPlan(query, planned, watched, last.key, known)


def other_number(model: nn.Module, layers: Layers, plan: RecordingPlan, more: bool) -> AttentionError:
    """More layers ran than were found on noise, or fewer: what was counted from the end is another layer."""
    name, number, found = type(model).__name__, "more" if more else "fewer", len(plan.known)
    return UnsupportedAttentionError(
        f"{name} ran {number} attention layers on these images than on noise images of the same size ({found}): how "
        f"many run depends on the images, and layers={layers!r} names no layer in particular. Choose a layer by its "
        "path, or by its index from the front"
    )


def _with_forward(path: str, modules: dict[str, nn.Module]) -> str:
    """The innermost module around that is called: blocks that share weights have but their list in common."""
    while path and isinstance(modules[path], (nn.ModuleList, nn.ModuleDict)):
        path = path.rpartition(".")[0]
    return path


def _is_below(path: str, root: str) -> bool:
    return root == "" or path.startswith(f"{root}.")


def _order(site: ReadableSite, device: torch.device) -> Tensor | None:
    order = site.layout.order
    return None if order == tuple(range(len(order))) else torch.tensor(order, device=device)


def _block(
    site: ReadableSite, sites: Sequence[Site], modules: dict[str, nn.Module], device: torch.device
) -> Block | None:
    path = block_of(site.key[0], {s.key[0] for s in sites}, modules)
    entering, layout = None if path is None else site.places.entries.get(path), site.layout
    if path is None or entering is None:
        return None
    if (entering.grid, len(entering.prefix)) != (layout.grid, len(layout.prefix)):
        return None  # its tokens are not those of the rows
    order = torch.tensor(entering.order, device=device)
    return Block(modules[path], order, len(entering.prefix), "CLS" in site.places.prefix_names.values())


@dataclass(frozen=True)
class ModelSummary:
    """What was discovered in one model, to be printed."""

    model: str  # name of its class
    layers: tuple[int, ...]  # that are recorded
    num_layers: int
    heads: int
    grid: tuple[int, int]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        many = f"layers {', '.join(map(str, self.layers))}" if len(self.layers) > 1 else f"layer {self.layers[0]}"
        every = 1 < len(self.layers) == self.num_layers
        which = f"all {self.num_layers} layers" if every else f"{many} of 0 to {self.num_layers - 1}"
        return f"{self.model}, {which}, {self.heads} heads, grid {self.grid[0]} × {self.grid[1]}"
