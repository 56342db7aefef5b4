"""Watch a vision transformer's attention form while it trains."""

from attn_monitor.backbone import TargetError, find_backbones
from attn_monitor.callback import AttentionMapCallback
from attn_monitor.capture import AttentionRecorder, LayerAttention, record_attention
from attn_monitor.errors import (
    AttentionError,
    ForwardError,
    LayerError,
    NoAttentionError,
    NonFiniteAttentionError,
    QueryError,
    UnsupportedAttentionError,
    VerificationError,
)
from attn_monitor.health import HealthFlag, HealthLimits
from attn_monitor.monitor import AttentionMonitor
from attn_monitor.probe import ProbeBatch, ProbeError
from attn_monitor.publisher import Publisher
from attn_monitor.rollout import attention_rollout
from attn_monitor.sharding import forward_within
from attn_monitor.snapshot import ArchiveError, AttentionSnapshot, load_snapshots
from attn_monitor.watch import Watch

__all__ = [
    "ArchiveError",
    "AttentionError",
    "AttentionMapCallback",
    "AttentionMonitor",
    "AttentionRecorder",
    "AttentionSnapshot",
    "ForwardError",
    "HealthFlag",
    "HealthLimits",
    "LayerAttention",
    "LayerError",
    "NoAttentionError",
    "NonFiniteAttentionError",
    "ProbeBatch",
    "ProbeError",
    "Publisher",
    "QueryError",
    "TargetError",
    "UnsupportedAttentionError",
    "VerificationError",
    "Watch",
    "attention_rollout",
    "find_backbones",
    "forward_within",
    "load_snapshots",
    "record_attention",
]
