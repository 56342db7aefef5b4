"""What pyproject.toml promises is what `make test-oldest` runs on."""

from __future__ import annotations

import sys

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.support.processes import ROOT


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_the_oldest_set_pins_every_floor() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    promised = [*map(Requirement, [*project["dependencies"], *extras["lightning"], *extras["cli"]])]
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints/oldest.txt").read_text().splitlines()]
    pins = {r.name: Version(s.version) for r in map(Requirement, filter(None, lines)) for s in r.specifier}
    for requirement in promised:
        for floor in requirement.specifier:
            assert floor.operator == ">=", requirement
            pinned, wanted = pins[requirement.name], Version(floor.version)
            assert pinned.release[: len(wanted.release)] == wanted.release, f"{requirement} is run on {pinned}"
