"""How long the tests took, as `make test` and `make test-slow` have left it in ``build``."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SuiteRun:
    """One run of one of the two commands."""

    command: str
    tests: int
    skipped: int
    minutes: float

    def __str__(self) -> str:
        return f"`make {self.command}` {self.minutes:.0f} minutes for {self.tests - self.skipped:,} tests"


def latest_runs(folder: Path = Path("build")) -> list[SuiteRun]:
    """Runs of which there is a report."""
    found = []
    for command in ("test", "test-slow"):
        if (report := folder / f"{command}.xml").is_file():
            facts = next(ET.parse(report).getroot().iter("testsuite")).attrib
            tests, skipped, seconds = int(facts["tests"]), int(facts["skipped"]), float(facts["time"])
            found.append(SuiteRun(command, tests, skipped, seconds / 60))
    return found
