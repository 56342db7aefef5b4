"""`Evaluation`: judge the features of a run's backbones on labelled images, at chosen snapshots."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from attn_monitor.background.failures import Failures
from attn_monitor.capture.observe.isolation import is_sharded, random_state_restored
from attn_monitor.errors import ProbeError, UnsupportedAttentionError
from attn_monitor.measure.label_probes import accuracy, knn_predictions, ridge_predictions
from attn_monitor.measurements import HealthFlag, MetricKey, Metrics
from attn_monitor.monitor import AttentionMonitor
from attn_monitor.probe.labelled import EvaluationOptions, Labelled, batches, held_out
from attn_monitor.train.role_features import global_rows

KNN, RIDGE = "knn_accuracy", "ridge_accuracy"
PART = "evaluating on labels"  # the part's name in `Failures`
CERTAIN = 3.0  # standard errors that a loss must exceed


class Evaluation:
    """Evaluate the backbones of a run on rank zero.

    Args:
        options: which images, and how often.
        first: kNN accuracy of each role at the run's first evaluation, which later ones are compared with; what is
            missing is added.
        failures: records failures, which cost the evaluation alone.
        inform: shows the cost once.
    """

    def __init__(
        self,
        options: EvaluationOptions,
        first: dict[str, float],
        failures: Failures,
        inform: Callable[[str], None],
    ) -> None:
        self.options, self._first = options, first
        self._failures, self._inform = failures, inform
        self._snapshots, self._step = 0, -1
        self._cost_reported = False

    def __call__(
        self, monitor: AttentionMonitor, models: Mapping[str, nn.Module], step: int, *, last: bool
    ) -> tuple[Metrics, tuple[HealthFlag, ...]]:
        """Return metrics and flags of the models, empty if no evaluation is due or if it failed.

        Args:
            monitor: knows how to call the models, after its `check`.
            models: the backbones by role.
            step: optimizer steps done.
            last: whether the run ends with this snapshot.
        """
        if step != self._step:  # else a snapshot that is taken again
            self._snapshots, self._step = self._snapshots + 1, step
        if (self._snapshots - 1) % self.options.every and not last:
            return Metrics(), ()
        found = self._failures.result_of(PART, lambda: self._evaluate(monitor, models, step))
        return found or (Metrics(), ())

    def _evaluate(
        self, monitor: AttentionMonitor, models: Mapping[str, nn.Module], step: int
    ) -> tuple[Metrics, tuple[HealthFlag, ...]]:
        """Evaluate all models, and report once how much that is."""
        metrics, flags, started = Metrics(), list[HealthFlag](), time.perf_counter()
        images, forwards = "", 0
        for role, model in models.items():
            if is_sharded(model):
                raise UnsupportedAttentionError(f"{role} is sharded by FSDP, and labels are evaluated in one process")
            train, labels, test, truth = self._features(monitor, role, model)
            knn = accuracy(knn_predictions(train, labels, test, k=self.options.k), truth)
            metrics[MetricKey(role, None, KNN)] = knn
            metrics[MetricKey(role, None, RIDGE)] = accuracy(ridge_predictions(train, labels, test), truth)
            classes = int(labels.max()) + 1
            if flag := self._loss(role, knn, 1 / classes, len(truth), step):
                flags.append(flag)
            images = f"{len(train):,} images of {classes} classes, and {len(test):,} for the test"
            forwards = len(train) + len(test)
        if not self._cost_reported:
            self._cost_reported, seconds = True, time.perf_counter() - started
            count = "at each snapshot" if self.options.every == 1 else f"every {self.options.every} snapshots"
            self._inform(
                f"evaluation of {' and '.join(models)} on {images}: {forwards:,} extra forwards of each, which took "
                f"{seconds:.1f} s, {count}. EvaluationOptions(every=…, max_images=…) makes them fewer"
            )
        return metrics, tuple(flags)

    def _features(
        self, monitor: AttentionMonitor, role: str, model: nn.Module
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return features and labels of the images to learn from, then of those of the test."""
        options = self.options
        with random_state_restored(model):  # of the data sets
            rows, labels = self._rows(monitor, role, model, options.data)
            if options.test is None:
                test = torch.tensor(held_out(labels.tolist()), device="cpu")
                parts = rows[~test], labels[~test], rows[test], labels[test]
            else:
                parts = rows, labels, *self._rows(monitor, role, model, options.test)
        kinds = parts[1].unique()
        known = torch.isin(parts[3], kinds)
        if len(kinds) < 2 or not known.any():
            raise ProbeError(
                f"evaluation: {len(parts[1])} images of {len(kinds)} classes to learn from and {int(known.sum())} of "
                "these classes for the test; expected two classes, and four images of one where no test= is given"
            )
        return (
            parts[0],
            torch.searchsorted(kinds, parts[1]),
            parts[2][known],
            torch.searchsorted(kinds, parts[3][known]),
        )

    def _rows(self, monitor: AttentionMonitor, role: str, model: nn.Module, source: Labelled) -> tuple[Tensor, Tensor]:
        """Return a backbone's global features of images, (n, D) float32 on the host, and their labels, (n,)."""
        rows: list[Tensor] = []
        labels: list[int] = []
        options = self.options
        with monitor.forwards(role, model) as (forward, first_is_cls):
            for images, kinds in batches(source, monitor.probe, options.max_images, options.batch_size):
                found = global_rows(forward(images), len(images), first_is_cls=first_is_cls)
                if found is None:
                    raise ProbeError(f"evaluation: what {role} returns holds no features of whole images")
                rows.append(found.float().cpu())
                labels += kinds
        together = torch.cat(rows)
        if not together.isfinite().all():
            raise ProbeError(f"evaluation: features of {role} hold NaN or infinity")
        return together, torch.tensor(labels, device="cpu")

    def _loss(self, role: str, knn: float, chance: float, tested: int, step: int) -> HealthFlag | None:
        """Return a flag where kNN has lost what it had at the first evaluation."""
        first = self._first.setdefault(role, knn)
        error = math.sqrt((first * (1 - first) + knn * (1 - knn)) / tested)
        if first - knn <= max(self.options.tolerance * (first - chance), CERTAIN * error):
            return None
        text = (
            f"kNN accuracy on labels is {knn:.1%}, and was {first:.1%} at the first snapshot: training loses what the "
            "features could do. For continued pretraining lower the learning rate, or keep an earlier checkpoint"
        )
        return HealthFlag("labels", role, None, (), step, knn, text)
