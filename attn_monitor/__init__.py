"""Watch a vision transformer's attention form while it trains."""

import importlib
from typing import TYPE_CHECKING, Any

from attn_monitor.attention import LayerAttention
from attn_monitor.capture.backbones import find_backbones
from attn_monitor.capture.recorder import AttentionRecorder, record_attention
from attn_monitor.capture.rollout import attention_rollout
from attn_monitor.capture.sharded_models import forward_within
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.errors import ArchiveError, AttentionError, AttnMonitorError, ProbeError, TargetError
from attn_monitor.measure.health import HealthFlag, HealthLimits
from attn_monitor.monitor import AttentionMonitor
from attn_monitor.probe.probe_batch import ProbeBatch
from attn_monitor.publish.publisher import Publisher
from attn_monitor.record.archive import load_snapshots
from attn_monitor.record.snapshot import AttentionSnapshot
from attn_monitor.watch import Watch

if TYPE_CHECKING:
    from attn_monitor.callback import AttentionMapCallback
    from attn_monitor.offline.report import snapshot_player

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

_LAZY = {"AttentionMapCallback": "attn_monitor.callback", "snapshot_player": "attn_monitor.offline.report"}


def __getattr__(name: str) -> Any:
    """What is imported when it is asked for: Lightning takes seconds, and `record_attention` needs none of it."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
