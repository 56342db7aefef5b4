"""Plan a recording: the sites to read, the row of each, and the modules to watch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attn_monitor.capture.block_tokens import block_of
from attn_monitor.capture.layer_selection import Layers, QuerySpec, counts_from_end, select_sites
from attn_monitor.capture.observe.attention_rows import Query
from attn_monitor.capture.observe.forward import is_sharded
from attn_monitor.capture.observe.module_paths import is_inside
from attn_monitor.capture.observe.observation import SiteKey
from attn_monitor.capture.sites import ReadableSite, Site
from attn_monitor.errors import QueryError
from attn_monitor.grid import Grid


@dataclass(frozen=True)
class Block:
    """Hold the transformer block around a site and the order of the tokens that enter it."""

    module: nn.Module
    order: Tensor  # (T,) token indices: CLS, the rest of the prefix, patches row by row
    num_prefix: int
    has_cls: bool


@dataclass(frozen=True)
class SitePlan:
    """Describe how to record one site."""

    site: ReadableSite
    query: Query
    order: Tensor | None  # token indices, prefix first and patches row by row; None if already in this order
    block: Block | None  # None if its tokens are not requested


@dataclass(frozen=True)
class RecordingPlan:
    """Describe how to record the requested layers; valid while the modules and the image size stay the same.

    Attributes:
        query: The query to read in every layer.
        sites: The sites to record, in order of execution.
        watched: (path, module) pairs inside which operations are observed.
        last: The site after which the forward may be left; None if it must run to its end.
        known: All sites if layers are counted from the end: attention elsewhere is then an error. Empty otherwise.
    """

    query: QuerySpec
    sites: Mapping[SiteKey, SitePlan]
    watched: Sequence[tuple[str, nn.Module]]
    last: SiteKey | None
    known: frozenset[SiteKey] = frozenset()


def plan_recording(
    model: nn.Module,
    sites: Sequence[Site],
    layers: Layers,
    query: QuerySpec,
    device: torch.device,
    *,
    or_mean: bool,
    tokens: bool,
) -> RecordingPlan:
    """Plan the recording of the requested layers.

    Args:
        model: The model.
        sites: All of its sites.
        layers: The requested layers; if counted from the encoder's end, their number must stay as discovered.
        query: The query to read.
        device: The model's device.
        or_mean: Read query="mean" instead of "cls" if there is no CLS token.
        tokens: Measure the tokens that enter the blocks too.

    Raises:
        AttentionError: A requested layer cannot be read, with the reason.
    """
    try:
        wanted = select_sites(sites, layers, query)
    except QueryError:
        if not or_mean or query != "cls":
            raise
        query = "mean"
        wanted = select_sites(sites, layers, query)
    from_end = counts_from_end(layers)
    modules = dict(model.named_modules())
    planned = {
        key: SitePlan(site, index, _order(site, device), _block(site, sites, modules, device) if tokens else None)
        for key, (site, index) in wanted.items()
    }
    sites = [site for site in sites if not site.overlooked]  # the observable ones
    last = max(sites, key=lambda site: (site.key in wanted or (from_end and not site.stack), site.index))
    later = [site for site in sites if from_end and site.index >= last.index]
    roots, paths = {site.scope for site, _ in wanted.values()}, {site.key[0] for site in sites}
    roots |= {site.scope for site in later}
    roots = {_with_forward(path, modules) for path in roots}
    # Modules without attention of their own need no hooks: their operations count for the watched module around them.
    watched = [(p, modules[p]) for p in modules if p in roots or (p in paths and any(is_inside(p, r) for r in roots))]
    if is_sharded(model) or any(isinstance(module, torch.jit.ScriptModule) for module in modules.values()):
        return RecordingPlan(query, planned, watched, None)  # TorchScript may not survive an exception in it
    known = frozenset(key for site in sites for key in (site.key, *site.places.together) if from_end)
    return RecordingPlan(query, planned, watched, last.key, known)


def other_number(model: nn.Module, layers: Layers, plan: RecordingPlan, more: bool) -> str:
    """Return the message for more or fewer layers than on noise images, when layers were counted from the end."""
    name, number, found = type(model).__name__, "more" if more else "fewer", len(plan.known)
    return (
        f"{name} ran {number} attention layers on these images than on noise images of the same size ({found}): how "
        "many run depends on the images, on chance (as in layer drop) or on earlier calls, and "
        f"layers={layers!r} names no layer in particular. Choose a layer by its path, or by its index from the front"
    )


def _with_forward(path: str, modules: dict[str, nn.Module]) -> str:
    """Return the path of the innermost module with a forward: around blocks that share weights there is only a list."""
    while path and isinstance(modules[path], (nn.ModuleList, nn.ModuleDict)):
        path = path.rpartition(".")[0]
    return path


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
        return None  # other tokens than those of the rows
    order = torch.tensor(entering.order, device=device)
    return Block(modules[path], order, len(entering.prefix), "CLS" in site.places.prefix_names.values())


@dataclass(frozen=True)
class ModelSummary:
    """Hold what was discovered in one model, for printing."""

    model: str  # class name
    layers: tuple[int, ...]  # the recorded ones
    num_layers: int
    heads: int
    grid: Grid
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        many = f"layers {', '.join(map(str, self.layers))}" if len(self.layers) > 1 else f"layer {self.layers[0]}"
        every = 1 < len(self.layers) == self.num_layers
        which = f"all {self.num_layers} layers" if every else f"{many} (of layers 0 to {self.num_layers - 1})"
        return f"{self.model}, {which}, {self.heads} heads, grid {self.grid}"
