"""A verdict on a run: healthy, or what is wrong with it, since when, by what evidence, and what people do about it.

A pure function of the metrics of all snapshots so far, so that it is the same live and from files. Its thresholds are
chosen on small trainings with and without faults, see `benchmarks.calibration` and docs/reading-the-curves.md.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from attn_monitor.measure.run_history import Point, RunHistory
from attn_monitor.measurements import State, Verdict


@dataclass(frozen=True)
class Thresholds:
    """Where each rule begins. ``snapshots`` in a row must agree, and so many must be there before any verdict."""

    snapshots: int = 3
    uniform: float = 0.99  # mean entropy of an image's answer, over ln K
    same: float = 0.015  # entropy of the mean answer less that of each, over ln K
    cosine: float = 0.98  # mean cosine between images
    rank: float = 0.3  # effective rank over its highest value, each less one, the least that there is
    loss: float = 0.3  # rise of the loss above its start, over that
    swing: float = 1.0  # way of the loss to and fro, over ln K
    alike: float = 0.3  # share of prototypes with a near copy
    low_entropy: float = 0.15  # of attention
    high_entropy: float = 0.995
    dense: float = 0.15  # fall of dense separability below its highest value
    at_ln_k: float = 0.002  # relative distance of a loss from ln K that counts as equal


THRESHOLDS = Thresholds()

FROM_START = 8  # snapshots in a row for what every run begins with: answers that are uniform, and the same
APART = 0.95  # a mean cosine below which features must have been, to become alike
FORMED = 1.05  # times its first value that dense separability must have reached, to decay
INTERVALS = 5  # between snapshots in which a loss that swings is looked for
LIKELY_K = tuple(2**power for power in range(9, 19))  # where the number of prototypes is not known


def judge(history: RunHistory, thresholds: Thresholds = THRESHOLDS) -> Verdict:
    """Judge a run by its metrics so far.

    Args:
        history: the metrics of all snapshots.
        thresholds: where each rule begins.

    Returns:
        The first finding among: divergence to NaN, a complete collapse, divergence, collapsed attention, a collapse of
        prototypes, a dimensional collapse; else healthy, perhaps with something that is worth a look, or no verdict
        while there are too few snapshots.
    """
    most = max(len(history.of(metric)) for metric in ("mean_cosine", "loss"))
    noted = Verdict("healthy" if most > thresholds.snapshots else "no verdict yet")
    for rule in RULES:
        found = rule(history, thresholds)
        if found is not None and found.is_bad:
            return found
        if found is not None and not noted.evidence:
            noted = replace(found, state=noted.state)
    return noted


def _not_finite(history: RunHistory, t: Thresholds) -> Verdict | None:
    for metric, words in (("loss", "the loss"), ("mean_cosine", "global features")):
        since = _streak(history.of(metric, "student"), lambda p: not math.isfinite(p.value), 1)
        if since is not None:
            return Verdict("diverging", since, (f"{words} is NaN or infinite",), _GO_BACK)
    return None


def _uniform(history: RunHistory, t: Thresholds) -> Verdict | None:
    """Answers are uniform: by the head's entropies, or a loss that stands at ln K."""
    each = history.of("assignment_entropy_each", "student")
    since = _streak_unless_from_start(each, lambda p: p.value >= t.uniform, t.snapshots)
    evidence = []
    if since is not None:
        evidence.append(f"the mean entropy of an answer is {each[-1].value:.3f} of ln K")
    loss, k = history.of("loss"), history.of("prototypes", "student")
    for count in [int(k[-1].value)] if k else LIKELY_K if history.has_teacher else ():
        at = _streak_unless_from_start(loss, partial(_is_near, value=math.log(count), by=t.at_ln_k), t.snapshots)
        if at is not None and (since is not None or not each):
            since = at if since is None else min(since, at)
            evidence.append(f"the loss stands at {loss[-1].value:.4f} = ln {count:,}, that of a uniform answer")
    if since is None:
        return None
    return Verdict(
        "complete collapse",
        since,
        ("all images get a uniform answer", *evidence),
        "Targets are too soft, or the step is too large: lower the teacher's temperature (0.04) or lengthen its "
        "warm-up, lower the learning rate, check the number of different images",
    )


def _same_answer(history: RunHistory, t: Thresholds) -> Verdict | None:
    """All images get the same answer."""
    each = {p.step: p.value for p in history.of("assignment_entropy_each", "student")}
    both = history.of("assignment_entropy_mean", "student")
    apart = [Point(p.step, p.value - each[p.step]) for p in both if p.step in each]
    return _found(
        "complete collapse",
        _streak_unless_from_start(apart, lambda p: p.value <= t.same, t.snapshots),
        lambda: f"all images get the same answer: mean and single ones differ in entropy by {apart[-1].value:.4f} ln K",
        "Check that the teacher's outputs are centred or balanced, that the teacher is an average that lags behind, "
        "and that batches hold different images; lower the learning rate",
    )


def _alike(history: RunHistory, t: Thresholds) -> Verdict | None:
    """Global features have become alike; in some models they are so from the start, and stay useful."""
    cosine = history.of("mean_cosine", "teacher")
    if all(p.value >= APART for p in cosine):
        return None
    return _found(
        "complete collapse",
        _streak(cosine, lambda p: p.value >= t.cosine, t.snapshots),
        lambda: (
            f"global features of different images have a mean cosine of {cosine[-1].value:.3f}, up from "
            f"{min(p.value for p in cosine):.3f}"
        ),
        "Check what keeps answers apart (centring, temperature, negatives, variance terms), that batches hold "
        "different images, and the learning rate",
    )


def _loss_and_scale(history: RunHistory, least: int) -> tuple[list[Point], float]:
    """Return the loss, if there are more points than so many, and ln K.

    Without a head there is no scale: losses of prediction begin low, rise while features form, and vary with the data.
    """
    loss, k = history.of("loss"), history.of("prototypes", "student")
    return (loss, math.log(k[-1].value)) if k and len(loss) > least else ([], 1.0)


def _worse_than_uniform(history: RunHistory, t: Thresholds) -> Verdict | None:
    """The loss stays above what it began with, and above that of a uniform answer."""
    loss, scale = _loss_and_scale(history, t.snapshots)
    start = max(loss[0].value, scale) if loss else scale
    return _found(
        "diverging",
        _streak(loss[1:], lambda p: p.value >= start * (1 + t.loss), t.snapshots),
        lambda: f"the loss is {loss[-1].value:.3g}, above {start:.3g} of the start",
        _GO_BACK,
    )


def _swings(history: RunHistory, t: Thresholds) -> Verdict | None:
    """The loss goes up and down: how far within the latest intervals, beyond the way from their start to their end."""
    loss, scale = _loss_and_scale(history, INTERVALS)
    swings = list[Point]()
    for window in (loss[i : i + INTERVALS + 1] for i in range(len(loss) - INTERVALS)):
        ways = [Point(a.step, abs(b.value - a.value)) for a, b in itertools.pairwise(window)]
        beyond = sum(way.value for way in ways) - abs(window[-1].value - window[0].value)
        longest = max(ways, key=lambda way: way.value)
        swings.append(Point(longest.step, beyond / scale))
    latest = [p.value for p in loss[-INTERVALS - 1 :]]
    return _found(
        "diverging",
        _streak(swings, lambda p: p.value >= t.swing, 1),
        lambda: f"the loss swings between {min(latest):.3g} and {max(latest):.3g} within {INTERVALS + 1} snapshots",
        _GO_BACK,
    )


def _attention(history: RunHistory, t: Thresholds) -> Verdict | None:
    """Attention of the last layer is on a few patches, or uniform again, which is only noted."""
    entropy = history.of("entropy", "teacher")
    spread = any(p.value > 0 for p in entropy)  # a grid of one patch has no entropy
    formed = any(p.value < 1 - 10 * (1 - t.high_entropy) for p in entropy)
    high = _streak(entropy, lambda p: p.value >= t.high_entropy, t.snapshots) if formed else None
    advice = "Use q/k normalisation, a lower learning rate or a longer warm-up"
    if high is not None:
        text = f"attention of the last layer is uniform again since step {high:,}: entropy {entropy[-1].value:.3f}"
        return _noted(text, advice)
    return _found(
        "attention collapsed",
        _streak(entropy, lambda p: p.value <= t.low_entropy, t.snapshots) if spread else None,
        lambda: f"attention of the last layer lies on a few patches: entropy {entropy[-1].value:.3f}",
        advice,
    )


def _prototypes(history: RunHistory, t: Thresholds) -> Verdict | None:
    """Many prototypes are copies."""
    alike = history.of("prototypes_alike", "student")
    return _found(
        "prototype collapse",
        _streak(alike, lambda p: p.value >= t.alike, t.snapshots),
        lambda: f"{alike[-1].value:.0%} of the prototypes have a near copy",
        "Use fewer prototypes, start them apart and give them more channels, or keep them apart (KoLeo on prototypes, "
        "arXiv 2410.14060)",
    )


def _rank(history: RunHistory, t: Thresholds) -> Verdict | None:
    """The effective rank has fallen; ranks of far fewer samples than usual are left out.

    Without a teacher that is only noted: a classifier needs no more directions than classes, and a masked autoencoder
    does not train its global features.
    """
    samples = {p.step: p.value for p in history.of("feature_samples", "teacher")}
    usual = sorted(samples.values())[len(samples) // 2] if samples else 0.0
    rank = [p for p in history.of("effective_rank", "teacher") if samples.get(p.step, usual) >= usual / 2]
    highest, shares = 0.0, list[Point]()
    for point in rank:
        highest = max(highest, point.value)
        shares.append(Point(point.step, (point.value - 1) / (highest - 1) if highest > 1 else math.nan))
    since = _streak(shares, lambda p: p.value <= t.rank, t.snapshots)
    advice = (
        "Look at the loss on features (KoLeo, variance and covariance terms), at augmentations that leave little to "
        "distinguish, and at the learning rate"
    )
    text = f"the effective rank of global features is {rank[-1].value:.3g}, and was {highest:.3g}" if rank else ""
    if since is not None and not history.has_teacher:
        return _noted(f"{text}, low since step {since:,}", advice)
    return _found("dimensional collapse", since, lambda: text, advice)


def _dense(history: RunHistory, t: Thresholds) -> Verdict | None:
    """Dense separability was higher before, which may or may not harm; the latest snapshot's is known after it."""
    apart = [p for p in history.of("dense_separability", "teacher") if p.step < history.last_step]
    highest, falls = 0.0, list[Point]()
    for point in apart:
        highest = max(highest, point.value)
        falls.append(Point(point.step, 1 - point.value / highest if highest > 0 else 0.0))
    if _streak(falls, lambda p: p.value >= t.dense, t.snapshots) is None:
        return None
    best = max(apart, key=lambda p: p.value)
    if best.value < FORMED * apart[0].value:  # random weights separate patches well, and it falls while features form
        return None
    return _noted(
        f"dense features may be decaying: separability is {apart[-1].value:.3g}, and was {best.value:.3g} at step "
        f"{best.step:,}",
        "Keep the checkpoint of about that step for dense tasks until labels decide; use a loss on patches, or anchor "
        "Gram matrices to that teacher",
    )


Rule = Callable[[RunHistory, Thresholds], Verdict | None]

# In order of precedence.
RULES: tuple[Rule, ...] = (
    *(_not_finite, _uniform, _same_answer, _alike, _worse_than_uniform, _swings),
    *(_attention, _prototypes, _rank, _dense),
)

_GO_BACK = (
    "Go back to an earlier checkpoint; lower the learning rate or lengthen its warm-up, clip gradients, keep the head "
    "and the loss in float32, and let the teacher lag further behind"
)


def _found(state: State, since: int | None, evidence: Callable[[], str], advice: str) -> Verdict | None:
    """Return a verdict since this step, None without one."""
    return None if since is None else Verdict(state, since, (evidence(),), advice)


def _noted(text: str, advice: str) -> Verdict:
    """Return what is worth a look in a healthy run: no trainings have shown how often such a rule is right."""
    return Verdict("healthy", None, (f"worth a look: {text}",), advice)


def _streak(points: Sequence[Point], holds: Callable[[Point], bool], least: int) -> int | None:
    """Return the first step of the latest points in a row for which a condition holds, None if they are too few."""
    row = list(_latest(points, holds))
    return row[-1].step if len(row) >= least else None


def _streak_unless_from_start(points: Sequence[Point], holds: Callable[[Point], bool], least: int) -> int | None:
    """As `_streak`, with more points where the condition has held from the start, as every run begins like that."""
    row = list(_latest(points, holds))
    return row[-1].step if len(row) >= (FROM_START if len(row) == len(points) else least) else None


def _is_near(point: Point, value: float, by: float) -> bool:
    return abs(point.value / value - 1) <= by


def _latest(points: Sequence[Point], holds: Callable[[Point], bool]) -> Iterator[Point]:
    for point in reversed(points):
        if not holds(point):
            return
        yield point
