"""`AttentionMonitor`: capture attention on a probe and compute its metrics, in any training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from attn_monitor import distributed
from attn_monitor.attention import on_host
from attn_monitor.attention_snapshot import AttentionSnapshot
from attn_monitor.capture.choose_forward import ForwardOption
from attn_monitor.capture.layer_selection import Layers, QuerySpec, check_layers, check_query
from attn_monitor.capture.observe.forward import Forward
from attn_monitor.capture.recording_plan import ModelSummary
from attn_monitor.draw.history import History
from attn_monitor.errors import HeadError
from attn_monitor.measure.health import Health, HealthLimits
from attn_monitor.measure.metrics import TOKEN_METRICS, measure, summarise
from attn_monitor.measure.patch_features import with_features
from attn_monitor.measure.threshold import check_threshold
from attn_monitor.measurements import HealthFlag, MetricKey, Metrics
from attn_monitor.metric_options import MetricOptions
from attn_monitor.probe.probe_batch import ProbeBatch
from attn_monitor.record.curves import Curves
from attn_monitor.role_recorders import RoleRecorders
from attn_monitor.run_past import RunPast, layers_before
from attn_monitor.snapshot import Same, Snapshot


class AttentionMonitor:
    """Take snapshots of one or more models on a fixed probe.

    ``previous`` is the latest snapshot, ``history`` the past of the drawn layers, thinned evenly to at most 24,
    ``curves`` a few metrics of every layer over the run, and ``health.flags`` the health flags so far. A model that may
    have changed is examined again, as in `AttentionRecorder`; a flag "order" is raised if maps may have been drawn in
    an old order of tokens.

    Args:
        probe: the images.
        layers: which layers to record, see `record_attention`.
        query: which query to record, see `record_attention`.
        threshold: share of attention mass that DINO's mask keeps, from 0 to 1.
        metrics: names of metrics, "all", or `MetricOptions`; None is all but "distance", with every query of the last
            layer only.
        health: when a health flag is raised.
        forward: calls a model if ``model(images)`` is not right.
        or_mean: whether to read query="mean" of a model without a CLS token.
        features: whether to keep the patch features of the drawn layers, in at most 32 dimensions, and to measure Gram
            drift.
        distributed: whether the processes of the group share the probe. All must call `snapshot` at the same steps, and
            each gets the whole result. Otherwise a process works alone.
        alone: whether a role that fails is left out while others work; ``failed`` holds its error. Otherwise the first
            error is raised.

    Raises:
        ArgumentError: An argument is invalid.

    Example:
        >>> import torch
        >>> from timm.models import VisionTransformer
        >>> model = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
        >>> probe = ProbeBatch(torch.randn(3, 3, 32, 32), mean=(0, 0, 0), std=(1, 1, 1))
        >>> snapshot = AttentionMonitor(probe).snapshot({"backbone": model}, step=0)
        >>> snapshot.maps("backbone").shape
        torch.Size([3, 2, 4, 4])
    """

    def __init__(
        self,
        probe: ProbeBatch,
        *,
        layers: Layers = -1,
        query: QuerySpec = "cls",
        threshold: float = 0.6,
        metrics: MetricOptions | Sequence[str] | str | None = None,
        health: HealthLimits = HealthLimits(),
        forward: Forward | Sequence[ForwardOption] | None = None,
        or_mean: bool = False,
        features: bool = False,
        distributed: bool = False,
        alone: bool = False,
    ) -> None:
        options = MetricOptions.of(metrics, features=features)
        self.probe, self.metrics = probe, options.selected
        self.layers, self.query, self.threshold = check_layers(layers), check_query(query), check_threshold(threshold)
        self.features, self.gram_step = features, options.gram_step or 0
        self.roles = RoleRecorders(
            {
                "layers": self.layers,
                "query": self.query,
                "forward": forward,
                "or_mean": or_mean,
                "axes": probe.axes,
                "verify": options.verify,
                "nonfinite": "keep",
                "distance": "distance" in self.metrics,
                "logits": "max_logit" in self.metrics,
                "sinks": "sinks" in self.metrics,
                "every_query": "last" if options.names is None else "all",  # by name: every layer
                "tokens": not TOKEN_METRICS.isdisjoint(self.metrics),
                "patches": True,
                "follow": False,
            },
            images_at_a_time=len(probe),
            alone=alone,
            distributed=distributed,
        )
        gram_step = self.gram_step if features else None
        self.past = RunPast(health, dense="dense" in self.metrics, gram_step=gram_step)

    @property
    def previous(self) -> Snapshot | None:
        """Return the latest snapshot, None before the first."""
        return self.past.previous

    @property
    def history(self) -> History:
        """Return the past of the drawn layers."""
        return self.past.history

    @property
    def curves(self) -> Curves:
        """Return a few metrics of every layer over the run."""
        return self.past.curves

    @property
    def health(self) -> Health:
        """Return the health flags of the run."""
        return self.past.health

    def check(self, models: Mapping[str, nn.Module]) -> None:
        """Find the wanted layers in each model on images of the probe's size; `AttentionError` if one is unreadable."""
        self.roles.check(models, self.probe.images)

    def confirm(self, models: Mapping[str, nn.Module], *, step: int) -> tuple[HealthFlag, ...]:
        """Check at the end of a run which patch each token is.

        A `snapshot` with ``last=True`` includes this check.

        Returns:
            Flags for roles with maps that may have been drawn in an old order of tokens.
        """
        self.roles.confirm(models, self.probe.images, step)
        return self._take_reordered()

    def found(self) -> dict[str, ModelSummary]:
        """Return what was found of each role's model."""
        return {role: recorder.summary() for role, recorder in self.roles.items()}

    def snapshot(
        self,
        models: Mapping[str, nn.Module],
        *,
        step: int,
        epoch: int = 0,
        flags: Sequence[HealthFlag] = (),
        last: bool = False,
        others: Mapping[MetricKey, float] = MappingProxyType({}),
        late: Callable[[], Metrics] | None = None,
    ) -> AttentionSnapshot:
        """Capture every role's attention on the probe and compute its metrics, compared with the snapshot before.

        Args:
            models: the models by role.
            step: optimizer steps done.
            epoch: from 0 on.
            flags: health flags from elsewhere to store with the snapshot.
            last: whether the run ends with it, so that the order of tokens is checked in any case.
            others: metrics from elsewhere to store with the snapshot.
            late: waits for more of them, on the thread that writes the snapshot; None if there are none.

        Returns:
            The snapshot, on the CPU.

        Raises:
            AttentionError: A model's attention cannot be read, or is not what the model computed.
        """
        layers = self.roles.record(models, self.probe.images, step, last=last)
        if self.features:
            layers = with_features(layers, {} if self.previous is None else self.previous.layers)
        measured = measure(
            layers,
            layers_before(self.past.previous, step) or {},
            metrics=self.metrics,
            threshold=self.threshold,
            truth=self.probe.masks,
            reference=layers_before(self.past.reference, step),
        )
        if self.roles.is_shared and not distributed.is_rank_zero():  # only rank zero draws and writes
            layers = {key: replace(attention, patches=None) for key, attention in layers.items()}
        layers = on_host(layers)
        self.health.add(flags)
        found = (*flags, *self._take_reordered(), *self.health.examine(step, layers, measured))
        metrics = Metrics({**summarise(measured), **others})
        verdict = self.past.judge(step, metrics)
        if verdict is not None and verdict.is_bad:
            found += self.health.add([verdict.flag(step)])
        raised = len(self.health.flags)
        snapshot = AttentionSnapshot(step, epoch, self.probe.names, layers, metrics, found, raised, verdict)
        self.remember(snapshot, late=late)
        return snapshot

    def colored(self, snapshot: Same) -> Same:
        """Return a snapshot of this run with colours of its patches, which continue those before, and "dense" metrics.

        This takes a decomposition and clusters of the patch tokens, which the callback leaves to the threads that draw
        and write. A snapshot that is saved without it has neither.
        """
        return self.history.colored(snapshot)

    @contextmanager
    def forwards(self, role: str, model: nn.Module) -> Iterator[tuple[Callable[[Tensor], Any], bool]]:
        """Yield a function that runs a checked model in isolation, and whether its first token is CLS."""
        with self.roles.of(role, model).forwards() as found:
            yield found

    def check_heads(self, heads: Sequence[int] | None) -> None:
        """Raise `HeadError` if a watched layer lacks one of these heads; call it after `check` or `snapshot`."""
        for role, recorder in self.roles.items():
            for layer, count in recorder.heads.items():
                missing = [str(head) for head in heads or () if head >= count]
                if missing:
                    raise HeadError(
                        f"heads={list(heads or ())}: layer {layer} of {role} has heads 0 to {count - 1}, so no "
                        f"{', '.join(missing)}. Choose among these"
                    )

    def left_out(self) -> list[str]:
        """Describe which layers layers="all" leaves out of each role, which lack statistics, and why."""
        texts = []
        for role, recorder in self.roles.items():
            texts += [f"{role}, {reason}" for reason in recorder.without_statistics.values()]
            if reasons := recorder.left_out.values():
                lines = "".join(f"\n  {reason}" for reason in reasons)
                texts.append(f'layers="all" leaves out {len(reasons)} of the layers of {role}:{lines}')
        return texts

    def let_go(self) -> None:
        """Release the models; the next snapshot finds their layers again."""
        self.roles.let_go()

    def forget(self) -> None:
        """Drop the past, so that the next snapshot is the first of a run."""
        self.past.clear()

    @property
    def failed(self) -> dict[str, Exception]:
        """Return the errors of roles that failed in the latest call, by role."""
        return self.roles.failed

    @property
    def images_at_a_time(self) -> int:
        """Return how many images run together: the whole probe, or fewer after memory ran out."""
        return self.roles.images_at_a_time

    @property
    def draws_every_layer(self) -> bool:
        """Whether each captured layer is drawn, as for a list of layers; otherwise the last one is."""
        return isinstance(self.layers, (list, tuple))

    def drawn_layers(self, snapshot: Snapshot) -> tuple[int, ...]:
        """Return the layers of a snapshot that are drawn."""
        return snapshot.drawn_layers(self.draws_every_layer)

    def state_dict(self) -> dict[str, Any]:
        """Return probe, latest snapshot and history as tensors and plain values, for ``weights_only`` loading.

        The history has at most 24 snapshots of the drawn layers in float16; only the few numbers that the verdict reads
        are kept of every snapshot.
        """
        return {"probe": self.probe.state_dict(), **self.past.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the images and the past from `state_dict`."""
        self.probe = ProbeBatch.from_state_dict(state["probe"])
        self.roles.options = {**self.roles.options, "axes": self.probe.axes}
        self.roles.images_at_a_time = len(self.probe)
        self.past.load_state_dict(state)

    def remember(self, snapshot: Snapshot, *, late: Callable[[], Metrics] | None = None) -> None:
        """Make a snapshot the latest one, which the next is compared with; ``late`` is as in `snapshot`."""
        self.past.add(snapshot, self.drawn_layers(snapshot), late)

    def _take_reordered(self) -> tuple[HealthFlag, ...]:
        found, self.roles.reordered = self.health.add(self.roles.reordered), []
        return found
