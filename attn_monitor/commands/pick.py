"""Rank a run's checkpoints for dense and for global use, and say which teacher to anchor Gram matrices to.

For dense use by DSE (arXiv 2510.17299), which needs no labels, and by its first term alone, separability: where the two
disagree, little is certain. For global use by kNN accuracy where labels were given (`evaluation=`), else by RankMe of
training's own features. How certain a pick is: its gap to the last checkpoint, next to the noise between neighbours.

Example: attn-monitor pick runs/version_0
     or: attn-monitor pick checkpoints --model timm:vit_small_patch16_224 --probe photos
"""

from __future__ import annotations

import json as jsonlib
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attn_monitor.commands.backfill import backfill_run, probe_of
from attn_monitor.commands.support.devices import choose_device, move_to
from attn_monitor.commands.support.results import notify, print_table
from attn_monitor.commands.support.runs import StoredRun
from attn_monitor.errors import ArchiveError, ArgumentError, CheckpointError
from attn_monitor.measure.checkpoint_scores import FEWEST, dense_scores, local_maxima, neighbour_noise
from attn_monitor.measure.dense_quality import DENSE, SEPARABILITY
from attn_monitor.measurements import TRAINING, Metrics, finite_or_none
from attn_monitor.metric_options import MetricOptions
from attn_monitor.monitor import AttentionMonitor
from attn_monitor.weights.models import load_model
from attn_monitor.weights.run_checkpoints import checkpoint_files, step_in_name

GLOBAL = ("knn_accuracy", "rankme")
"""What checkpoints are ranked by for global use, by the first of these that there is; more is better."""

CLEAR, LIKELY = 3.0, 1.0  # gaps in units of their noise


@dataclass(frozen=True)
class Ranking:
    """One role's checkpoints, ranked for one use.

    Attributes:
        use: "dense" or "global".
        role: of the model.
        measure: "DSE", or the metric that the scores are.
        steps: of the checkpoints that have a score, ascending.
        scores: one a step, more is better; of one run alone.
        noise: standard deviation of scores around their course.
    """

    use: str
    role: str
    measure: str
    steps: tuple[int, ...]
    scores: tuple[float, ...]
    noise: float

    @property
    def picks(self) -> tuple[int, ...]:
        """The steps of up to three highest local maxima, the best first; none of fewer than five checkpoints."""
        return tuple(self.steps[i] for i in local_maxima(self.scores)) if len(self.steps) >= FEWEST else ()

    def score(self, step: int) -> float:
        """Return the score of a step."""
        return self.scores[self.steps.index(step)]

    def gap(self, step: int) -> float:
        """Return how far a step is above the last one, in units of the noise of such a difference."""
        difference = self.score(step) - self.scores[-1]
        if difference == 0:
            return 0.0
        return difference / (self.noise * math.sqrt(2)) if self.noise > 0 else math.copysign(math.inf, difference)

    @property
    def certainty(self) -> str:
        """Say how certain it is that the best pick is better than the last checkpoint."""
        best = next(iter(self.picks), None)
        if best is None:
            return f"too few to choose: {len(self.steps)} checkpoints, expected at least {FEWEST}"
        if best == self.steps[-1]:
            return "the last checkpoint is the best"
        gap = self.gap(best)
        sure = "clear" if gap >= CLEAR else "likely" if gap >= LIKELY else "not certain: the last one may be as good"
        return f"{sure} ({gap:.1f} times the noise between neighbours above the last)"

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        scores = [{"step": step, "score": score} for step, score in zip(self.steps, self.scores, strict=True)]
        facts = {"use": self.use, "role": self.role, "measure": self.measure, "noise": finite_or_none(self.noise)}
        picks = [{"step": step, "gap": finite_or_none(self.gap(step))} for step in self.picks]
        return {**facts, "certainty": self.certainty, "picks": picks, "scores": scores}


@dataclass(frozen=True)
class Picked:
    """The rankings of a run, teachers first; ``broken`` says what could not be read."""

    archive: Path
    rankings: tuple[Ranking, ...]
    broken: tuple[str, ...] = ()

    def best(self, use: str) -> Ranking | None:
        """Return the ranking to go by: the teacher's where there is one, for dense use by DSE."""
        return next((ranking for ranking in self.rankings if ranking.use == use), None)

    @property
    def anchor(self) -> int | None:
        """The step of the teacher to anchor Gram matrices to: the best of a teacher for dense use."""
        dense = self.best("dense")
        return dense.picks[0] if dense is not None and dense.role == "teacher" and dense.picks else None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        rankings = [ranking.as_dict() for ranking in self.rankings]
        return {"archive": str(self.archive), "anchor": self.anchor, "rankings": rankings, "broken": list(self.broken)}


def pick_checkpoints(run: str | Path, *, start: int = 1) -> Picked:
    """Rank the snapshots of a run, for dense and for global use.

    Args:
        run: an archive, or a log directory that holds one.
        start: the first step to rank. A model that is trained from scratch is not one to pick at step 0; 0 includes
            it, for a run that continues a trained model.

    Returns:
        The rankings; ``broken`` lists snapshots that could not be read.

    Raises:
        FileNotFoundError: there are no snapshots.
        ArchiveError: none can be read, or none has a metric to rank by.
    """
    found = StoredRun(run)
    metrics = {snapshot.step: snapshot.metrics for snapshot in found if snapshot.step >= start}
    rankings = rank(metrics)
    if not rankings:
        raise ArchiveError(
            f"{found.folder}: no snapshot from step {start} on has a metric to rank by ({', '.join(DENSE)}; "
            f'{", ".join(GLOBAL)}). Watch with metrics that include "dense", or rank the checkpoints: attn-monitor '
            "pick CHECKPOINTS --model MODEL --probe PHOTOS"
        )
    return Picked(found.folder, tuple(rankings), tuple(found.broken))


def rank(metrics: Mapping[int, Metrics]) -> list[Ranking]:
    """Rank checkpoints by their metrics, by step: for dense use, then for global use, in each the teacher first."""
    roles = sorted({key.role for m in metrics.values() for key in m} - {TRAINING}, key=lambda r: (r != "teacher", r))
    rankings = [_ranking("dense", role, "DSE", _dense(metrics, role)) for role in roles]
    rankings += [_ranking("dense", role, SEPARABILITY, _curve(metrics, role, SEPARABILITY)) for role in roles[:1]]
    for role in roles:
        curves = {name: _curve(metrics, role, name) for name in GLOBAL}
        name = next((name for name in GLOBAL if curves[name]), GLOBAL[-1])
        rankings.append(_ranking("global", role, name, curves[name]))
    return [ranking for ranking in rankings if ranking.steps]


def pick(
    path: str,
    *,
    model: str | None = None,
    probe: str | None = None,
    out: str | None = None,
    key: str | None = None,
    size: int | tuple[int, ...] | None = None,
    num_images: int = 8,
    large_images: bool = False,
    evaluation: str | None = None,
    checkpoints: str | None = None,
    start: int = 1,
    device: str = "cpu",
    json: bool = False,
) -> None:
    """Run `attn-monitor pick`, which this module describes.

    Args:
        path: the archive of a run, or the log directory that holds it; or, with a model and a probe, a folder of
            checkpoints, which are measured as `backfill` does.
        model: for checkpoints: the backbone, as in `backfill`.
        probe: for checkpoints: a folder of images, or the probe.npz of an archive.
        out: for checkpoints: the log directory to keep what was measured in, so that it is not measured again.
        key: for checkpoints: what to take from them, as in `backfill`.
        size: for checkpoints: size of images from a folder in pixels, one number or [height, width]; by default
            what the model takes.
        num_images: for checkpoints: how many images of a folder; multiples of 8 are the score's own groups.
        large_images: for checkpoints: read images of more than Pillow's limit of 89 million pixels.
        evaluation: for checkpoints: a folder with a folder of images for each class, to rank by kNN for global use.
        checkpoints: for a run: its folder of checkpoints, to name the nearest to each pick.
        start: the first step to rank; 0 for a run that continues a trained model.
        device: for checkpoints: where the model runs, such as cuda.
        json: print JSON, for scripts.
    """
    files: dict[int, Path] = {} if checkpoints is None else _files(Path(checkpoints))
    if model is None and probe is None:
        found = pick_checkpoints(path, start=start)
    elif model is None or probe is None:
        missing = "model" if model is None else "probe"
        raise ArgumentError(f"{missing}: is missing; checkpoints are measured with --model MODEL and --probe PHOTOS")
    else:
        with tempfile.TemporaryDirectory() as folder:
            backbone = load_model(model)
            images = probe_of(probe, backbone, size, num_images, None, large_images=large_images)
            monitor = AttentionMonitor(images, metrics=MetricOptions(["dense"]), or_mean=True)
            move_to(choose_device(device), backbone)
            backfill_run(path, backbone, monitor, out or folder, key=key, loggers="none", evaluation=evaluation)
            found, files = pick_checkpoints(out or folder, start=start), _files(Path(path))
    if json:
        print(jsonlib.dumps(found.as_dict(), indent=1))
    else:
        _print(found, files)
    if found.broken:
        raise ArchiveError(f"the ranking is without {'; '.join(found.broken)}")


def _print(found: Picked, files: Mapping[int, Path]) -> None:
    for ranking in found.rankings:
        print(f"{ranking.role} for {ranking.use} use, by {ranking.measure} of {_course(ranking)}: {ranking.certainty}")
        rows = [
            (f"  {step:,}", f"{ranking.score(step):.3g}", f"{ranking.gap(step):+.1f}", _nearest(step, files))
            for step in ranking.picks
        ]
        if rows:
            print_table([("  step", "score", "above the last, in noise", "checkpoint" if files else ""), *rows])
    if found.anchor is not None:
        print(f"Anchor Gram matrices to the teacher of step {found.anchor:,}.")
    if found.best("global") is None:
        notify(
            'no ranking for global use: neither evaluation= nor global features ("rankme") were recorded. Checkpoints '
            "are ranked by labels: --evaluation FOLDER"
        )


def _course(ranking: Ranking) -> str:
    return f"{len(ranking.steps)} checkpoints, steps {ranking.steps[0]:,} to {ranking.steps[-1]:,}"


def _nearest(step: int, files: Mapping[int, Path]) -> str:
    if not files:
        return ""
    near = min(files, key=lambda other: (abs(other - step), other))
    return files[near].name if near == step else f"{files[near].name} (of step {near:,})"


def _files(folder: Path) -> dict[int, Path]:
    """Return the checkpoints of a folder whose names hold a step."""
    found: dict[int, Path] = {}
    for path in checkpoint_files(folder):
        try:
            found.setdefault(step_in_name(path), path)
        except CheckpointError as error:
            notify(str(error))
    return found


def _ranking(use: str, role: str, measure: str, curve: Mapping[int, float]) -> Ranking:
    steps, scores = tuple(curve), tuple(curve.values())
    return Ranking(use, role, measure, steps, scores, neighbour_noise(steps, scores))


def _dense(metrics: Mapping[int, Metrics], role: str) -> dict[int, float]:
    """Score the steps that have all terms in the role's last layer with any."""
    terms = [_curve(metrics, role, name) for name in DENSE]
    steps = [step for step in terms[0] if all(step in term for term in terms)]
    separability, spread, ranks = ([term[step] for step in steps] for term in terms)
    scores: Sequence[float] = dense_scores(separability, spread, ranks).tolist()
    return dict(zip(steps, scores, strict=True))


def _curve(metrics: Mapping[int, Metrics], role: str, name: str) -> dict[int, float]:
    """Return a metric's finite means by step, of the last layer that has any."""
    wanted = (role, name, None)
    keys = {key for values in metrics.values() for key in values if (key.role, key.metric, key.head) == wanted}
    last = max(keys, key=lambda key: -1 if key.layer is None else key.layer, default=None)
    curve = {step: values.get(last, math.nan) for step, values in sorted(metrics.items())}
    return {step: value for step, value in curve.items() if np.isfinite(value)}
