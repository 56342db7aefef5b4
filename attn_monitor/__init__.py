"""Watch a vision transformer's attention form while it trains."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from attn_monitor import functional as functional
    from attn_monitor.attention import LayerAttention as LayerAttention
    from attn_monitor.attention_snapshot import AttentionSnapshot as AttentionSnapshot
    from attn_monitor.attention_snapshot import load_snapshots as load_snapshots
    from attn_monitor.callback import AttentionMapCallback as AttentionMapCallback
    from attn_monitor.capture.backbones import find_backbones as find_backbones
    from attn_monitor.capture.recorder import AttentionRecorder as AttentionRecorder
    from attn_monitor.capture.recorder import record_attention as record_attention
    from attn_monitor.capture.rollout import attention_rollout as attention_rollout
    from attn_monitor.capture.sharded_models import forward_within as forward_within
    from attn_monitor.draw.options import DrawingOptions as DrawingOptions
    from attn_monitor.errors import ArchiveError as ArchiveError
    from attn_monitor.errors import AttentionError as AttentionError
    from attn_monitor.errors import AttnMonitorError as AttnMonitorError
    from attn_monitor.errors import ProbeError as ProbeError
    from attn_monitor.errors import TargetError as TargetError
    from attn_monitor.grid import Grid as Grid
    from attn_monitor.measure.health import HealthLimits as HealthLimits
    from attn_monitor.measurements import HealthFlag as HealthFlag
    from attn_monitor.measurements import MetricKey as MetricKey
    from attn_monitor.metric_options import MetricOptions as MetricOptions
    from attn_monitor.monitor import AttentionMonitor as AttentionMonitor
    from attn_monitor.probe.labelled import EvaluationOptions as EvaluationOptions
    from attn_monitor.probe.options import ProbeOptions as ProbeOptions
    from attn_monitor.probe.probe_batch import ProbeBatch as ProbeBatch
    from attn_monitor.watch import Watch as Watch

# Each is imported when it is asked for: the callback imports Lightning, others PyTorch, which takes seconds.
_MODULES = {
    "ArchiveError": "errors",
    "AttentionError": "errors",
    "AttentionMapCallback": "callback",
    "AttentionMonitor": "monitor",
    "AttentionRecorder": "capture.recorder",
    "AttentionSnapshot": "attention_snapshot",
    "AttnMonitorError": "errors",
    "DrawingOptions": "draw.options",
    "EvaluationOptions": "probe.labelled",
    "Grid": "grid",
    "HealthFlag": "measurements",
    "HealthLimits": "measure.health",
    "LayerAttention": "attention",
    "MetricKey": "measurements",
    "MetricOptions": "metric_options",
    "ProbeBatch": "probe.probe_batch",
    "ProbeError": "errors",
    "ProbeOptions": "probe.options",
    "TargetError": "errors",
    "Watch": "watch",
    "attention_rollout": "capture.rollout",
    "find_backbones": "capture.backbones",
    "forward_within": "capture.sharded_models",
    "load_snapshots": "attention_snapshot",
    "record_attention": "capture.recorder",
}

__all__ = ["__version__", "functional", *_MODULES]


def __getattr__(name: str) -> Any:
    if name == "functional":
        return importlib.import_module("attn_monitor.functional")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"attn_monitor.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
