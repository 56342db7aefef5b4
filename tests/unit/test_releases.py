"""What pyproject.toml promises is what `make test-oldest` runs on."""

from __future__ import annotations

import sys

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from constraints.move import moved
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


def test_pins_move_just_past_what_pip_has_chosen() -> None:
    chosen = {"torch": "2.15.1+cpu", "pillow": "14.0.0", "open-clip-torch": "3.4.0", "tifffile": "2027.1.2"}
    for before, after in {
        "torch<2.15": "torch<2.16",
        "torch<2.17": "torch<2.16",
        "pillow<14": "pillow<15",
        "open_clip_torch<3.4": "open_clip_torch<3.5",
        "tifffile<2027": "tifffile<2028",
        "numpy<2.5": "numpy<2.5",  # not in the report
        "# torch<2": "# torch<2",
        "": "",
    }.items():
        assert moved(before, chosen) == after


def test_each_package_has_one_pin() -> None:
    lines = (ROOT / "constraints/tested.txt").read_text().splitlines()
    names = [line.partition("<")[0] for line in lines if not line.startswith("#")]
    assert len(names) == len(set(names))
