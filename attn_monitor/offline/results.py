"""What commands have in common: a folder for results, and a table of metrics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attn_monitor.record.snapshot import AttentionSnapshot


@contextmanager
def writing_to(folder: Path) -> Iterator[Path]:
    """A folder for results; that it cannot be written to is told with its name."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except OSError as error:
        reason = "it is a file" if folder.is_file() else error.strerror or error
        raise OSError(f"out={folder}: cannot be written to ({reason}); pass another folder, or make room") from error


def print_metrics(snapshot: AttentionSnapshot) -> None:
    """Means over heads and images, one line for each role and layer."""
    print(f"metrics at step {snapshot.step:,}:")
    for role, layer in snapshot.layers:
        values = snapshot.metrics.of_layer(role, layer)
        print(f"  {role}, layer {layer}: " + ", ".join(f"{name} {value:.3g}" for name, value in values.items()))
