"""Watch a vision transformer's attention form while it trains."""

from attn_monitor.capture import AttentionRecorder, LayerAttention, record_attention

__all__ = ["AttentionRecorder", "LayerAttention", "record_attention"]
