"""`RunOptions`: what the callback and `Watch` are given, valid and in groups."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from attn_monitor.background.disk_reserve import check_reserve
from attn_monitor.capture.layer_selection import Layers, QuerySpec, check_layers, check_query
from attn_monitor.capture.observe.forward import Forward
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.errors import ArgumentError, check_whole
from attn_monitor.measure.health import HealthLimits
from attn_monitor.metric_options import MetricOptions
from attn_monitor.monitor import AttentionMonitor
from attn_monitor.probe.labelled import EvaluationOptions, Labelled
from attn_monitor.probe.options import Images, ProbeOptions
from attn_monitor.probe.probe_batch import ProbeBatch
from attn_monitor.trackers.publisher import Heads

OnError = Literal["warn", "raise"]


class RunOptions:
    """Hold what to watch in a run and how, in groups and valid. `AttentionMapCallback` documents the arguments.

    ``num_images``, ``image_size`` and ``threshold``, unless they are None, replace the values in their groups.

    Raises:
        ArgumentError: An argument is invalid.
    """

    def __init__(
        self,
        probe: ProbeOptions | Images | None,
        *,
        num_images: int | None,
        image_size: int | tuple[int, ...] | None,
        threshold: float | None,
        layers: Layers,
        query: QuerySpec,
        metrics: MetricOptions | Sequence[str] | str | None,
        features: bool,
        evaluation: EvaluationOptions | Labelled | None,
        drawing: DrawingOptions,
        health: HealthLimits,
        forward: Forward | str | None,
        on_error: OnError,
        heads: Heads,
        keep_pictures: int | None,
        disk_reserve: int | None = None,
    ) -> None:
        for name, value, kind in (("drawing", drawing, DrawingOptions), ("health", health, HealthLimits)):
            if not isinstance(value, kind):
                raise ArgumentError(f"{name}: received a {type(value).__name__}, expected {kind.__name__}(...)")
        if on_error not in get_args(OnError):
            raise ArgumentError(f'on_error={on_error!r}: expected "warn" or "raise"')
        if heads not in get_args(Heads):
            raise ArgumentError(f'heads={heads!r}: expected "pictures" or "curves"; which are drawn is DrawingOptions')
        check_whole("keep_pictures", keep_pictures, 1, "a number of at least 1, or None for all")
        self.heads, self.keep_pictures = heads, keep_pictures
        self.probe = ProbeOptions.of(probe, num_images=num_images, image_size=image_size)
        self.layers, self.query = check_layers(layers), check_query(query)
        self.metrics, self.features = MetricOptions.of(metrics, features=features), features
        self.evaluation = EvaluationOptions.of(evaluation)
        self.drawing = drawing if threshold is None else replace(drawing, threshold=threshold)
        self.health, self.forward, self.on_error = health, import_forward(forward), on_error
        self.disk_reserve = check_reserve(disk_reserve)

    def monitor(self, probe: ProbeBatch, **others: Any) -> AttentionMonitor:
        """Make the monitor of a probe, with other arguments of `AttentionMonitor`."""
        return AttentionMonitor(
            probe,
            layers=self.layers,
            query=self.query,
            threshold=self.drawing.threshold,
            metrics=self.metrics,
            health=self.health,
            features=self.features,
            **others,
        )


def check_dirpath(dirpath: str | os.PathLike[str] | Literal[False] | None) -> Path | Literal[False] | None:
    """Return the archive's folder, None for one in the run's folder, or False for no archive."""
    if dirpath is None or dirpath is False:
        return dirpath
    if not isinstance(dirpath, (str, os.PathLike)) or os.fspath(dirpath) == "" or "://" in os.fspath(dirpath):
        raise ArgumentError(
            f"dirpath={dirpath!r}: expected a local folder, None for one in the run's folder, or False for no archive"
        )
    return Path(dirpath)


def import_forward(forward: Forward | str | None) -> Forward | None:
    """Return a function, imported if it is given as "package.module:function" or "package.module.function"."""
    if forward is None or callable(forward):
        return forward
    if not isinstance(forward, str):
        raise ArgumentError(f"forward: received a {type(forward).__name__}, expected a function or its import path")
    module, separator, name = forward.rpartition(":" if ":" in forward else ".")
    problem = "that is no import path"
    if separator and module and name:
        try:
            found: Any = importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            problem = f"{type(error).__name__}: {error}"
        else:
            if callable(found):
                return found  # type: ignore[no-any-return]
            problem = f"that is a {type(found).__name__}"
    raise ArgumentError(
        f'forward={forward!r}: {problem}; expected a function of (model, images), as "package.module:function"'
    )
