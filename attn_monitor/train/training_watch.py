"""`TrainingWatch`: measure what backbones and heads return in training's own forwards, shortly before snapshots.

Hooks copy results on their device in at most `WINDOW` steps before a snapshot. The batch before the snapshot is left
out where it can be: while it runs, a thread computes the metrics. Training does not wait for it: what is not ready at
the snapshot is added to it on the thread that draws and writes it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attn_monitor.background.failures import Failures
from attn_monitor.capture.observe.isolation import all_modules
from attn_monitor.measure.global_features import measure_features
from attn_monitor.measure.prototypes import measure_assignments, prototypes_alike, total
from attn_monitor.measurements import TRAINING, MetricKey, Metrics
from attn_monitor.train.head_features import Head, HeadFeatures, HeadSums, find_centres, find_heads
from attn_monitor.train.role_features import FeatureRows, RoleFeatures, images_in, marks_of
from attn_monitor.train.weak_hooks import add_hook, compiles
from attn_monitor.workers import Worker

WINDOW = 16  # optimizer steps before a snapshot
GRACE = 0.05  # seconds that a snapshot waits for the thread
PART = "measuring features in training"  # the part's name in `Failures`
NOT_MEASURED = "global features of {} are not measured: {}"
COMPILED = "this process uses torch.compile, in training or in a library, and a hook could make it compile again"


class TrainingWatch:
    """Watch the models of one run on rank zero.

    Call `watch_models` at a snapshot, `begin` and `end` around each batch, and `values` before the next snapshot.

    Args:
        failures: records failures; after one, models are watched again from the next snapshot on.
        inform: shows once what cannot be measured and why.
    """

    def __init__(self, failures: Failures, inform: Callable[[str], None]) -> None:
        self._failures, self._inform = failures, inform
        self._models: dict[str, nn.Module] = {}
        self._roles: list[RoleFeatures] = []
        self._heads: list[HeadFeatures] = []
        self._handles: list[Any] = []
        self._losses: deque[Tensor] = deque(maxlen=WINDOW)
        self._views: deque[tuple[int, Tensor, Tensor]] = deque(maxlen=WINDOW * 4)  # by batch: marks of two views
        self._batches = 0
        self._watched = False  # whether a batch was watched since the latest snapshot
        self._compiled = False
        self._work: _Work | None = None
        self.late: Callable[[], Metrics] | None = None  # waits for what was not ready at the latest snapshot

    def watch_models(
        self, models: Mapping[str, nn.Module], around: Sequence[nn.Module], first_is_cls: Mapping[str, bool]
    ) -> None:
        """Watch these models from the next batch on.

        Args:
            models: the backbones by role.
            around: the modules that hold them and their heads.
            first_is_cls: by role, whether a backbone's first token is known to be the CLS token.
        """

        def watch() -> None:
            if self._models != models:
                self.stop()
                self._models = dict(models)
                self._roles = [RoleFeatures(role, first_is_cls.get(role, False)) for role in models]
                self._heads = self._find_heads(around)
                self._compiled = compiles(m for module in (*around, *models.values()) for m in all_modules(module))

        self._try(watch)

    def begin(self, step: int, due: int | None, batch: Any) -> None:
        """Begin a batch.

        Args:
            step: optimizer steps done.
            due: step of the next snapshot, None if it is unknown.
            batch: what the step receives.
        """
        if not self._roles:
            return
        self._remove()
        self._batches += 1
        is_last = due is not None and step >= due - 1
        if is_last and self._watched:
            if self._work is None:
                self._try(lambda: self._compute(step))
            return
        self._work = None  # of a snapshot that was put off
        if due is None or is_last or step >= due - 1 - WINDOW:
            self._try(lambda: self._hook(step, batch))

    def end(self, loss: Tensor | float | None) -> None:
        """End a batch; a loss of one number is kept as it is, and read with the next snapshot."""
        self._remove()
        if isinstance(loss, (int, float)):
            loss = torch.tensor(float(loss), dtype=torch.float64, device="cpu")
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._losses.append(loss.detach())

    def values(self, step: int, *, wait: bool = True) -> Metrics:
        """Return the metrics of the latest steps, empty if there are none.

        Args:
            step: optimizer steps done.
            wait: whether to wait for the thread that computes them; else ``late`` does, if it has not ended yet.
        """
        found = Metrics()
        self.late = None

        def collect() -> None:
            self._remove()
            if self._work is None and self._has_rows(step):
                self._compute(step)
            work, self._work, self._watched = self._work, None, False
            if work is not None and work.is_ready(None if wait else GRACE):
                found.update(work.result())
            elif work is not None:
                self.late = work.result
            losses, self._losses = list(self._losses), deque(maxlen=WINDOW)
            if losses:
                mean = torch.stack([loss.double().flatten() for loss in losses]).mean()
                found[MetricKey(TRAINING, None, "loss")] = float(mean)
            if step > 0 and self._roles:
                self._explain()

        self._try(collect)
        return found

    def stop(self) -> None:
        """Remove all hooks, and forget the models."""
        self._remove()
        self._models, self._roles, self._heads, self._work = {}, [], [], None
        self._views.clear()

    def _find_heads(self, around: Sequence[nn.Module]) -> list[HeadFeatures]:
        """Find heads in a run with a teacher; without one, a wide last layer is a classifier."""
        if not any(role.role.endswith("teacher") for role in self._roles):
            return []
        heads: list[Head] = find_heads(around, self._models.values())
        centres = find_centres(around, self._models.values(), {head.last.out_features for head in heads})
        return [HeadFeatures(head, self._roles, centres) for head in heads]

    def _hook(self, step: int, batch: Any) -> None:
        # Not in the first batch, which shows whether training compiles: the hook would cause a recompilation.
        if self._batches == 1 or self._compiled or compiles(()):
            return
        views = _two_views(batch)
        if views is not None:
            self._views.append((self._batches, marks_of(views[0]), marks_of(views[1])))
        self._watched = True
        for role in self._roles:
            role.begin(step, self._batches, step - WINDOW)
            hook = add_hook(self._models[role.role].register_forward_hook, role.ran, with_kwargs=True)
            self._handles.append(hook)
        for head in self._heads:
            head.begin(step - WINDOW)
            self._handles.append(add_hook(head.head.module.register_forward_hook, head.ran, with_kwargs=True))

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _has_rows(self, step: int) -> bool:
        return any(chunk.step >= step - WINDOW - 1 for role in self._roles for chunk in role.chunks)

    def _compute(self, step: int) -> None:
        """Start to compute the metrics, on a thread."""
        since = step - WINDOW - 1
        chunks = {role.role: [c for c in role.chunks if c.step >= since] for role in self._roles}
        heads = [([part for part in head.parts if part.step >= since], head.take_weight()) for head in self._heads]
        self._work = _Work(chunks, list(self._views), heads)

    def _explain(self) -> None:
        """Say once which roles are not measured, and raise errors of hooks."""
        errors = [role.error for role in self._roles] + [head.error for head in self._heads]
        for error in filter(None, errors):
            raise error
        for role in self._roles:
            reason = COMPILED if self._compiled or compiles(()) else ""
            reason = reason or role.unread or "training does not call it, or another method than its forward"
            if not role.chunks and self._batches > 1 and self._failures.is_new((PART, role.role)):
                self._inform(NOT_MEASURED.format(role.role, reason))

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._failures.failed(PART, error)
            self.stop()


class _Work:
    """Compute the metrics of some copies on a thread."""

    def __init__(
        self,
        chunks: Mapping[str, Sequence[FeatureRows]],
        views: Sequence[tuple[int, Tensor, Tensor]],
        heads: Sequence[tuple[Sequence[HeadSums], Tensor | None]],
    ) -> None:
        self._chunks, self._views, self._heads = chunks, views, heads
        self._found, self._error = Metrics(), list[BaseException]()
        self._ready: list[torch.cuda.Event] = []
        for device in {c.rows.device for role in chunks.values() for c in role if c.rows.is_cuda}:
            self._ready.append(torch.cuda.Event())
            self._ready[-1].record(torch.cuda.current_stream(device))
        self._worker = Worker("features", self._run)
        self._worker.start()

    def is_ready(self, seconds: float | None) -> bool:
        """Whether the metrics are there after so many seconds at most; None waits for them."""
        self._worker.join(seconds)
        return not self._worker.is_alive()

    def result(self) -> Metrics:
        """Wait for the metrics; an error of the thread is raised here."""
        self._worker.join()
        if self._error:
            raise self._error[0]
        return self._found

    @torch.no_grad()
    def _run(self) -> None:
        try:
            for event in self._ready:
                event.synchronize()
            for role, chunks in self._chunks.items():
                if chunks:
                    self._of_role(role, chunks)
            for role in self._chunks:
                self._of_head(role)
        except BaseException as error:
            self._error.append(error)

    def _of_role(self, role: str, chunks: Sequence[FeatureRows]) -> None:
        rows = torch.cat([chunk.rows for chunk in chunks]).cpu()
        self._add(role, measure_features(rows, _pairs(rows, chunks, self._views)))

    def _of_head(self, role: str) -> None:
        """Add the metrics of the head that most of a role's features have entered."""
        of_role = [([part for part in parts if part.role == role], weight) for parts, weight in self._heads]
        sums = [(total([part.sums for part in parts]), parts, weight) for parts, weight in of_role if parts]
        if not sums:
            return
        found, parts, weight = max(sums, key=lambda item: float(item[0].images))
        values = measure_assignments(found)
        norms = [part.centre_norm for part in parts if part.centre_norm is not None]
        if values and norms:
            values["centre_norm"] = float(norms[-1])
        if values and weight is not None:
            values["prototypes_alike"] = prototypes_alike(weight)
        self._add(role, values)

    def _add(self, role: str, values: Mapping[str, float]) -> None:
        self._found.update({MetricKey(role, None, name): value for name, value in values.items()})


def _two_views(batch: Any) -> tuple[Tensor, Tensor] | None:
    """Return the first two of a batch's largest tensors of images, if there are several of one shape.

    Or the first two views of a tensor (B, views, channels, H, W). Of a clip these are frames, which enter no model.
    """
    images = images_in(batch)
    if len(images) == 1 and images[0].ndim == 5:
        images = list(images[0][:, :2].unbind(1))
    largest = max((t.shape[-2] * t.shape[-1] for t in images), default=0)
    big = [t for t in images if t.shape[-2] * t.shape[-1] == largest]
    return (big[0], big[1]) if len(big) > 1 and big[0].shape == big[1].shape else None


def _pairs(
    rows: Tensor, chunks: Sequence[FeatureRows], views: Sequence[tuple[int, Tensor, Tensor]]
) -> tuple[Tensor, Tensor] | None:
    """Return the rows of two views of the same images, which are known where images enter as the batch holds them."""
    found: dict[tuple[int, tuple[float, ...]], int] = {}
    keys = [(c.batch, tuple(mark)) for c in chunks for mark in c.marks.cpu().tolist()]
    found = {key: index for index, key in enumerate(keys)}
    pairs = []
    for batch, *marks in views:
        for one, other in zip(*(m.cpu().tolist() for m in marks), strict=True):
            indices = found.get((batch, tuple(one))), found.get((batch, tuple(other)))
            if indices[0] is not None and indices[1] is not None and indices[0] != indices[1]:
                pairs.append(indices)
    if not pairs:
        return None
    first, second = zip(*pairs, strict=True)
    return rows[list(first)], rows[list(second)]
