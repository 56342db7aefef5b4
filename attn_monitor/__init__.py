"""Watch a vision transformer's attention form while it trains."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attn_monitor.attention import LayerAttention
    from attn_monitor.attention_snapshot import AttentionSnapshot, load_snapshots
    from attn_monitor.callback import AttentionMapCallback
    from attn_monitor.capture.backbones import find_backbones
    from attn_monitor.capture.recorder import AttentionRecorder, record_attention
    from attn_monitor.capture.rollout import attention_rollout
    from attn_monitor.capture.sharded_models import forward_within
    from attn_monitor.commands.report import snapshot_player
    from attn_monitor.draw.options import DrawingOptions
    from attn_monitor.errors import ArchiveError, AttentionError, AttnMonitorError, ProbeError, TargetError
    from attn_monitor.measure.health import HealthLimits
    from attn_monitor.measurements import HealthFlag
    from attn_monitor.monitor import AttentionMonitor
    from attn_monitor.probe.probe_batch import ProbeBatch
    from attn_monitor.publish.publisher import Publisher
    from attn_monitor.watch import Watch

__all__ = [
    "ArchiveError",
    "AttentionError",
    "AttentionMapCallback",
    "AttentionMonitor",
    "AttentionRecorder",
    "AttentionSnapshot",
    "AttnMonitorError",
    "DrawingOptions",
    "HealthFlag",
    "HealthLimits",
    "LayerAttention",
    "ProbeBatch",
    "ProbeError",
    "Publisher",
    "TargetError",
    "Watch",
    "attention_rollout",
    "find_backbones",
    "forward_within",
    "load_snapshots",
    "record_attention",
    "snapshot_player",
]

_MODULES = {
    "ArchiveError": "errors",
    "AttentionError": "errors",
    "AttentionMapCallback": "callback",
    "AttentionMonitor": "monitor",
    "AttentionRecorder": "capture.recorder",
    "AttentionSnapshot": "attention_snapshot",
    "AttnMonitorError": "errors",
    "DrawingOptions": "draw.options",
    "HealthFlag": "measure.health",
    "HealthLimits": "measure.health",
    "LayerAttention": "attention",
    "ProbeBatch": "probe.probe_batch",
    "ProbeError": "errors",
    "Publisher": "publish.publisher",
    "TargetError": "errors",
    "Watch": "watch",
    "attention_rollout": "capture.rollout",
    "find_backbones": "capture.backbones",
    "forward_within": "capture.sharded_models",
    "load_snapshots": "attention_snapshot",
    "record_attention": "capture.recorder",
    "snapshot_player": "commands.report",
}


def __getattr__(name: str) -> Any:
    """Public names when they are asked for: the callback imports Lightning, others PyTorch, which takes seconds."""
    if name == "functional":
        return importlib.import_module("attn_monitor.functional")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"attn_monitor.{_MODULES[name]}"), name)
