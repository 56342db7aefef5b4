"""The commands as functions, for notebooks and scripts: no training has to run.

    >>> from attn_monitor.offline import compare_runs, load_model, summarise_run
    >>> summarise_run("runs/version_0").verdict  # doctest: +SKIP
    ['No health flag was raised.', 'teacher, layer 11: entropy fell from 0.99 to 0.71.']
    >>> compare_runs("runs/a", "runs/b").table()  # doctest: +SKIP
    [('teacher', 11, 'entropy', 0.71, 0.83)]

Each name is imported when it is first used, as PyTorch takes seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attn_monitor.commands.backfill import backfill_run
    from attn_monitor.commands.compare import compare_runs
    from attn_monitor.commands.leaderboard import compare_many
    from attn_monitor.commands.pick import pick_checkpoints
    from attn_monitor.commands.report import snapshot_player
    from attn_monitor.commands.support.matrices import save_matrices
    from attn_monitor.commands.support.patch_rows import attention_player
    from attn_monitor.commands.support.run_summary import summarise_run
    from attn_monitor.commands.video import attention_video
    from attn_monitor.weights.loading import load_checkpoint
    from attn_monitor.weights.models import load_model

__all__ = [
    "attention_player",
    "attention_video",
    "backfill_run",
    "compare_many",
    "compare_runs",
    "load_checkpoint",
    "load_model",
    "pick_checkpoints",
    "save_matrices",
    "snapshot_player",
    "summarise_run",
]

_MODULES = {
    "attention_player": "commands.support.patch_rows",
    "attention_video": "commands.video",
    "backfill_run": "commands.backfill",
    "compare_many": "commands.leaderboard",
    "compare_runs": "commands.compare",
    "load_checkpoint": "weights.loading",
    "load_model": "weights.models",
    "pick_checkpoints": "commands.pick",
    "save_matrices": "commands.support.matrices",
    "snapshot_player": "commands.report",
    "summarise_run": "commands.support.run_summary",
}


def __getattr__(name: str) -> Any:
    """Import the function of this name."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"attn_monitor.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    """List the public functions, for completion."""
    return __all__
