"""Run one forward of a model by a plan, and turn what was observed into `LayerAttention`."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attn_monitor.attention import LayerAttention
from attn_monitor.capture.block_tokens import TokenStatistics, watch_tokens
from attn_monitor.capture.choose_forward import Discovery
from attn_monitor.capture.every_query import QueryStatistics, query_statistics
from attn_monitor.capture.layer_selection import Layers
from attn_monitor.capture.observe.attention_rows import Query, Sequences
from attn_monitor.capture.observe.forward import run_forward
from attn_monitor.capture.observe.observation import (
    Observation,
    ObservedRows,
    ReadObservation,
    RefusedObservation,
    SiteKey,
)
from attn_monitor.capture.observe.observer import AttentionObserver
from attn_monitor.capture.recording_options import RecordingOptions
from attn_monitor.capture.recording_plan import RecordingPlan, SitePlan, other_number
from attn_monitor.capture.sites import ReadableSite, prefix_names
from attn_monitor.capture.verification import CheckResult, fetch_checks, mismatch, no_statistics
from attn_monitor.errors import NonFiniteAttentionError, UnsupportedAttentionError
from attn_monitor.grid import Grid

OnLayer = Callable[[ReadableSite, ReadObservation], Tensor | None]


class OtherLayersError(UnsupportedAttentionError):
    """Other layers ran than were discovered, so the discovery is void."""


@dataclass
class Recording:
    """Record the layers of a plan, once for each call.

    Attributes:
        discovery: The sites, and how to call the model.
        plan: The sites to read.
        layers: The requested layers, for messages and for which tokens are kept.
        options: What to measure.
        verified: Whether an earlier call has compared rows with the model's output; the caller sets it.
        without_statistics: The layers without statistics over many queries, because rows failed the check, with the
            reasons.
    """

    discovery: Discovery
    plan: RecordingPlan
    layers: Layers
    options: RecordingOptions
    verified: bool = False
    without_statistics: dict[int, str] = field(default_factory=dict)

    def __call__(
        self, model: nn.Module, images: Tensor, verify: bool, on_layer: OnLayer | None
    ) -> list[LayerAttention]:
        """Run the model on images (B, C, *size), and return an entry for each planned site.

        Raises:
            OtherLayersError: Not the sites that were discovered have run.
            AttentionError: A row is not what the model computed.
        """
        plan, options, axes = self.plan, self.options, self.discovery.axes.spatial
        observed: dict[SiteKey, ObservedRows] = {}
        measured: dict[SiteKey, QueryStatistics] = {}
        last = list(plan.sites)[-1]

        def report(key: SiteKey, seen: Observation) -> None:
            site = plan.sites[key].site
            if isinstance(seen, RefusedObservation):
                return
            seen = seen.regrouped(len(images), site.folding)
            if seen.rows.shape != (len(images), site.heads, site.keys):
                return
            if isinstance(site.folding, Sequences):
                seen = seen.of_query(plan.sites[key].query)
            whole = options.every_query == "all" or (options.every_query == "last" and key == last)
            measured[key] = query_statistics(seen, plan.sites[key], plan.query, options, whole, images.shape[2:], axes)
            error = seen.error
            if on_layer is not None and (others := on_layer(site, seen)) is not None:
                error = others if error is None else torch.maximum(error, others)
            observed[key] = replace(seen.rows_alone(), error=error, error_of_all=measured[key].error)

        # Queries of sequences are numbered over all of them, and read when these are joined.
        joined = {key for key, planned in plan.sites.items() if isinstance(planned.site.folding, Sequences)}
        queries: dict[SiteKey, Query] = {
            key: 0 if key in joined else planned.query for key, planned in plan.sites.items()
        }
        observer = AttentionObserver(
            images,
            report,
            queries.get,
            queries=set(queries.values()),
            verify=verify,
            last=plan.last,
            known=plan.known,
            logits=options.logits,
        )
        with ExitStack() as stack:
            kept = list(plan.sites)[-1:] if self.layers == "all" else plan.sites
            tokens = _watch_tokens(stack, len(images), plan, kept if options.patches else ())
            run_forward(model, images, self.discovery.forward, observer, plan.watched)
        if observer.beyond or (plan.known and not observer.passed_last):
            raise OtherLayersError(other_number(model, self.layers, plan, more=observer.beyond))
        missing = [planned.site for key, planned in plan.sites.items() if key not in observed]
        if missing:
            raise OtherLayersError(
                f"layer {missing[0].index} ({missing[0].name}): attention was not where it had been found on the first "
                "look; the model takes another path for these images, by chance (as in layer drop), or in later calls"
            )
        checks = fetch_checks([observed[key] for key in plan.sites])
        return [
            self._layer_attention(
                type(model).__name__, axes, planned, observed[key], check, measured[key], tokens.get(key)
            )
            for (key, planned), check in zip(plan.sites.items(), checks, strict=True)
        ]

    def _layer_attention(
        self,
        model: str,
        axes: Sequence[str],
        planned: SitePlan,
        seen: ObservedRows,
        check: CheckResult,
        found: QueryStatistics,
        tokens: TokenStatistics | None,
    ) -> LayerAttention:
        """Check the rows of one site, and order their keys: the prefix first, then patches row by row."""
        site = planned.site
        if self.options.nonfinite == "raise" and not check.finite:
            raise NonFiniteAttentionError(f"layer {site.index} ({site.name}): its attention row holds NaN or infinity")
        if check.finite and not check.reproduces_output:
            raise mismatch(f"layer {site.index} ({site.name}, {seen.op})", check)
        measured: dict[str, Any] = {**found.of_row, **(found.of_many if self._holds(site, found, check) else {})}
        if check.kind == "signed":
            measured.pop("distance", None)
        entering = tokens if self.options.tokens else None
        rows = seen.rows.float() if planned.order is None else seen.rows.float()[..., planned.order]
        return LayerAttention(
            layer=site.index,
            name=site.name,
            rows=rows,
            num_prefix=len(site.layout.prefix),
            grid=Grid(site.layout.grid, site.layout.geometry, axes),
            mixed=check.mixed,
            verified_error=check.error,
            kind=check.kind,
            places=site.layout.evidence,
            norms=None if entering is None else entering.norms.float(),
            cosine=None if entering is None or entering.cosine is None else entering.cosine.float(),
            model=model,
            query=str(self.plan.query),
            prefix_names=prefix_names(site),
            patches=None if tokens is None else tokens.patches,
            **measured,
        )

    def _holds(self, site: ReadableSite, found: QueryStatistics, check: CheckResult) -> bool:
        """Return whether the rows behind statistics over many queries passed their latest check."""
        if math.isnan(check.error_of_all) or not check.finite:  # not compared, or the model's own NaN
            return site.index not in self.without_statistics
        if not check.all_reproduce_output and site.index not in self.without_statistics:
            absent = found.of_many.keys() - found.of_row.keys()
            self.without_statistics[site.index] = no_statistics(
                f"layer {site.index} ({site.name}, {site.op})", check, absent
            )
        return check.all_reproduce_output


def _watch_tokens(
    stack: ExitStack, batch: int, plan: RecordingPlan, kept: Collection[SiteKey]
) -> dict[SiteKey, TokenStatistics]:
    """Return the statistics of the tokens that enter each block, filled during the forward (first run of each block).

    The sites in ``kept`` keep their patch tokens too.
    """
    seen: dict[SiteKey, TokenStatistics] = {}
    for key, planned in plan.sites.items():
        block, report = planned.block, partial(seen.setdefault, key)
        if block is not None:
            watch_tokens(stack, block.module, batch, block.order, block.num_prefix, block.has_cls, key in kept, report)
    return seen
