"""What computing the metrics of an all-layers snapshot takes, next to the forward that it is made from."""

from __future__ import annotations

from dataclasses import replace

from attn_monitor import AttentionRecorder
from attn_monitor.measure.metrics import METRICS, measure, summarise
from benchmarks.measure import Spread, take_turns
from benchmarks.peers import Size, no_grad, timm_vit

THRESHOLD = 0.6


def measure_metrics(size: Size, budget: float) -> Spread:
    """Time of all default metrics of two roles, drift and divergence included, over two plain forwards."""
    model, images = timm_vit(size), size.images()
    record = AttentionRecorder(model, layers="all", tokens=True)
    layers = {(role, a.layer): a for role in ("student", "teacher") for a in record(images)}
    before = {key: replace(a, rows=a.rows.flip(0)) for key, a in layers.items()}
    names = [name for name, metric in METRICS.items() if metric.default]
    forward = no_grad(model, images)

    def twice() -> None:
        forward()
        forward()

    def metrics() -> None:
        summarise(measure(layers, before, metrics=names, threshold=THRESHOLD))

    return take_turns({"forward": twice, "metrics": metrics}, budget=budget).ratio("metrics", "forward")
