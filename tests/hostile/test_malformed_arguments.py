"""Arguments of no kind that exists are errors of this package's own, which are ValueErrors and TypeErrors too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from attn_monitor import AttentionRecorder, AttnMonitorError, record_attention
from attn_monitor.errors import ArgumentError
from tests.support.helpers import tiny_vit

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(
            ("query", q)
            for q in (None, "", "CLS", 1.0, True, -1, (), (1, 2, 3, 4), (1.0, 2.0), (True, False), [1, [2]])
        ),
        *(("query", q) for q in (np.array([1, 2]), np.array(["cls"]), torch.tensor(3), {"cls"}, b"cls", float("nan"))),
        *(("layers", w) for w in (None, "", [], (), 1.0, True, [True], [None], [[1]], {1}, range(3), [""], b"all")),
        *(("layers", w) for w in (["all"], ["all", 1], np.array([0, 1]), torch.tensor(1), iter([1]))),
        *(("verify", v) for v in (None, "yes", 1, [])),
        *(("forward", f) for f in (1, "model", object(), [1], [])),
    ],
)
def test_a_malformed_argument_is_an_error_of_our_own(argument: str, value: Any) -> None:
    model: Any = tiny_vit()
    with pytest.raises(AttnMonitorError, match=f"^{argument}=.*: expected ") as error:
        record_attention(model, IMAGES, **{argument: value})
    assert isinstance(error.value, ArgumentError)
    assert isinstance(error.value, ValueError)
    assert isinstance(error.value, TypeError)
    assert repr(value)[:20] in str(error.value)


@pytest.mark.parametrize("value", ["rais", None, True])
def test_what_to_do_about_numbers_that_are_not_finite(value: Any) -> None:
    with pytest.raises(ArgumentError, match=r'nonfinite=.*: expected "raise" or "keep"'):
        AttentionRecorder(tiny_vit(), nonfinite=value)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"query": np.int64(3)}, {"query": 3}),
        ({"query": [np.int32(1), np.int32(2)]}, {"query": (1, 2)}),
        ({"layers": np.int64(0)}, {"layers": 0}),
        ({"layers": [np.int64(0)]}, {"layers": [0]}),
    ],
)
def test_numpy_numbers_are_numbers(given: dict[str, Any], meant: dict[str, Any]) -> None:
    model = tiny_vit()
    (one,), (other,) = record_attention(model, IMAGES, **given), record_attention(model, IMAGES, **meant)
    assert (one.layer, one.query) == (other.layer, other.query)
    torch.testing.assert_close(one.rows, other.rows, rtol=0, atol=0)
