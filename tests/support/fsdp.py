"""FSDP2 and DTensor, from where the release that runs the tests holds them."""

from __future__ import annotations

__all__ = ["CPUOffloadPolicy", "DTensor", "MixedPrecisionPolicy", "fully_shard"]

try:
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
except ImportError:  # before PyTorch 2.6
    from torch.distributed._composable.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
try:
    from torch.distributed.tensor import DTensor
except ImportError:  # PyTorch 2.4
    from torch.distributed._tensor import DTensor
