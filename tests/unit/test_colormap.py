"""The colour tables are matplotlib's, to the bit."""

from __future__ import annotations

import numpy as np
import pytest

from attn_monitor.draw.colormap import COLORMAPS, colour_table


@pytest.mark.parametrize("name", COLORMAPS)
def test_tables_are_those_of_matplotlib(name: str) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    table = colour_table(name)
    assert (table.shape, table.dtype) == ((256, 3), np.uint8)
    assert np.array_equal(table, (matplotlib.colormaps[name](np.arange(256))[:, :3] * 255).astype(np.uint8))
    assert not table.flags.writeable  # it is cached
