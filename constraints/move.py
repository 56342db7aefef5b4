"""Move the bounds in tested.txt past the releases that pip has chosen, as `make pins` does.

    python constraints/move.py REPORT

REPORT is what ``pip install --report`` writes. A bound keeps its length: where 2.15.1
is the newest, ``<2.15`` becomes ``<2.16``, and ``<2`` becomes ``<3``.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

PINS = Path(__file__).parent / "tested.txt"


def moved(pin: str, releases: Mapping[str, str]) -> str:
    """Return a line of tested.txt with its bound just past the release of its package, if that is known."""
    name, _, bound = pin.partition("<")
    release = releases.get(_normal(name))
    if pin.startswith("#") or not bound or release is None:
        return pin
    *above, last = release.split(".")[: bound.count(".") + 1]
    return f"{name}<{'.'.join([*above, str(int(last) + 1)])}"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def main(report: Path) -> None:
    """Rewrite tested.txt, and print what has moved."""
    chosen = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    releases = {_normal(one["name"]): one["version"] for one in chosen}
    before = PINS.read_text().splitlines()
    after = [moved(pin, releases) for pin in before]
    PINS.write_text("\n".join(after) + "\n")
    for old, new in zip(before, after, strict=True):
        if old != new:
            print(f"{old} -> {new}")
    print("nothing has moved" if before == after else "run make test, and commit tested.txt if it passes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
