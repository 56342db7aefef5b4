"""The `attn-monitor` commands: the same values from checkpoints and archives, when no training runs."""
