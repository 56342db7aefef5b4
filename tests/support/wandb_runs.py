"""Read offline W&B runs back from their own `.wandb` files, LevelDB-format logs of protobuf records."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7


def parts(folder: Path) -> list[Path]:
    """The folders of all runs below one, and of a resumed run's parts, in order of time."""
    return sorted(path.parent for path in folder.rglob("run-*.wandb"))


def records(folder: Path) -> list[Any]:
    """Every record of the one finished run below a folder."""
    deadline = time.monotonic() + 30
    while True:
        # W&B's own process may make the file, and write its end, after `finish` has returned.
        files = list(folder.rglob("run-*.wandb"))
        found = _read(files[0].read_bytes()) if len(files) == 1 else []
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        assert time.monotonic() < deadline, f"{folder} does not hold one finished run: {files}"
        time.sleep(0.1)


def _read(data: bytes) -> list[Any]:
    from wandb.proto import wandb_internal_pb2

    offset, piece, found = 7, b"", []  # 7 bytes of W&B's own header come first
    while offset + HEADER <= len(data):
        if BLOCK - offset % BLOCK < HEADER:  # the rest of a block is too short for a header
            offset += BLOCK - offset % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[offset : offset + HEADER])
        if offset + HEADER + length > len(data):  # still being written
            break
        piece += data[offset + HEADER : offset + HEADER + length]
        offset += HEADER + length
        if kind in (1, 4):  # whole, or the last piece
            found.append(wandb_internal_pb2.Record.FromString(piece))
            piece = b""
    return found


def history(folder: Path) -> list[dict[str, Any]]:
    """What was logged, in order, as nested dicts."""
    rows = []
    for record in records(folder):
        if record.WhichOneof("record_type") == "history":
            row: dict[str, Any] = {}
            for item in record.history.item:
                *above, last = item.nested_key or [item.key]
                place = row
                for key in above:
                    place = place.setdefault(key, {})
                place[last] = json.loads(item.value_json)
            rows.append(row)
    return rows


def summary(folder: Path) -> dict[str, Any]:
    """What was put into the summary of the run beside what W&B puts there itself."""
    updates = [r.summary.update for r in records(folder) if r.WhichOneof("record_type") == "summary"]
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for some in updates for item in some}


def axes(folder: Path) -> dict[str, str]:
    """The step metric of each pattern of names that one was defined for."""
    metrics = [r.metric for r in records(folder) if r.WhichOneof("record_type") == "metric"]
    return {m.glob_name or m.name: m.step_metric for m in metrics if m.step_metric}


def without_wandb(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which a process starts a W&B service of its own, and not this one's, which may have ended."""
    return {name: value for name, value in environment.items() if not name.startswith("WANDB_")}
