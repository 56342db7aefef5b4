"""Every model of the zoo: each map equals an independent float64 reference, at the last layer and at all layers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from attn_monitor.attention import LayerAttention
from attn_monitor.capture.observe.forward import default_forward
from attn_monitor.capture.recorder import AttentionRecorder, record_attention
from tests.support.oracle import attention_matrices
from tests.support.tiers import sweep
from tests.support.zoo import CASES, Case, make_eager

LIMIT = 1e-3  # of uniform attention: |difference| times the number of keys
PARAMETERS = [pytest.param(c, id=c.id, marks=[pytest.mark.slow] if c.slow else []) for c in CASES]


@pytest.fixture(autouse=True)
def _libraries_may_warn() -> Iterator[None]:
    """What a library warns of about itself is not ours; our own warnings still fail the test."""
    with warnings.catch_warnings():
        for module in ("timm", "transformers", "torchvision", "open_clip", "vit_pytorch", "lightly", "einops"):
            warnings.filterwarnings("ignore", module=rf"{module}\..*")
        yield


def reference_row(matrix: Tensor, attention: LayerAttention, query: object) -> Tensor:
    """The row of a (B, H, Q, K) matrix that a query means: CLS first, or a single query, or the mean."""
    if query == "mean":
        return matrix.mean(-2)
    if isinstance(query, tuple):
        return matrix[..., attention.num_prefix + query[0] * attention.grid[1] + query[1], :]
    return matrix[..., 0, :]


def difference(attention: LayerAttention, matrix: Tensor, query: object) -> float:
    """Largest difference to the reference in units of uniform attention."""
    expected = reference_row(matrix, attention, query)
    assert expected.shape == attention.rows.shape, (expected.shape, attention.rows.shape)
    assert float(expected.amax()) * expected.shape[-1] > 1.2, "a flat reference agrees with anything"
    return float((attention.rows.double() - expected).abs().amax()) * expected.shape[-1]


@pytest.mark.parametrize("case", sweep(PARAMETERS, quick=24))
def test_maps_equal_the_float64_reference(case: Case) -> None:
    model, images = case.model(), case.images()
    matrices = attention_matrices(model, images, case.forward or default_forward, case.method)
    assert len(matrices) == case.layers

    left_out = case.refused + case.without_query
    with pytest.warns(UserWarning, match=f"leaves out {len(left_out)} of") if left_out else nullcontext():
        every = record_attention(model, images, layers="all", query=case.query, forward=case.forward)
    assert [a.layer for a in every] == [i for i in range(case.layers) if i not in left_out]
    for attention in every:
        assert difference(attention, matrices[attention.layer], case.query) <= LIMIT
        assert attention.mixed == (attention.layer in case.mixed)
        shape = case.shapes.get(attention.layer, (case.prefix, case.grid))
        assert (attention.num_prefix, attention.grid) == shape
        assert attention.maps.shape[-2:] == attention.grid

    last = max(a.layer for a in every)
    (alone,) = record_attention(model, images, layers=last, query=case.query, forward=case.forward)
    assert torch.equal(alone.rows, every[-1].rows)
    assert (alone.layer, alone.name) == (last, every[-1].name)


@pytest.mark.parametrize("case", sweep(PARAMETERS, quick=12))
def test_other_queries_equal_the_reference(case: Case) -> None:
    model, images = case.model(), case.images(1)
    matrices = attention_matrices(model, images, case.forward or default_forward, case.method)
    sites = AttentionRecorder(model, query="mean", forward=case.forward).sites(images)
    layers = [s.index for s in sites if s.refusal is None and s.queries > 1 and s.layout and s.layout.grid[1] > 2]
    if not layers:
        pytest.skip("has class attention only")
    for query in ("mean", (1, 2)):
        for attention in record_attention(model, images, layers=layers, query=query, forward=case.forward):
            assert difference(attention, matrices[attention.layer], query) <= LIMIT


HUGGING_FACE = [p for p in PARAMETERS if p.values[0].library == "transformers"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("case", sweep(HUGGING_FACE, quick=4))
def test_maps_equal_output_attentions(case: Case) -> None:
    """Hugging Face's own eager path in float64, asked for its attentions."""
    model, images = copy.deepcopy(case.model()).double(), case.images()
    make_eager(model)
    model.config.output_attentions = True
    with torch.no_grad():
        attentions = (case.forward or default_forward)(model, images.double()).attentions
    seen = record_attention(case.model(), images, layers=[0, 1], query="mean", forward=case.forward)
    assert len(attentions) == len(seen) == 2
    for attention, matrix in zip(seen, attentions, strict=True):
        assert difference(attention, matrix, "mean") <= LIMIT


def test_documentation_lists_every_model() -> None:
    """docs/models.md is made by docs/make_models.py; make it again after a change of the list."""
    written = (Path(__file__).parent.parent.parent / "docs" / "models.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[:2] for line in written.splitlines() if line.startswith("| ")]
    listed = {(library.removeprefix("| "), name) for library, name in rows}
    assert {(c.library, c.name) for c in CASES} <= listed


def test_heads_that_are_mixed_for_one_image() -> None:
    """A mix of heads has the shape of scores then, with one query, and is not taken for them."""
    (case,) = (c for c in CASES if c.id == "vit-pytorch-CaiT")
    model, images = case.model(), case.images()
    (of_two,) = record_attention(model, images, query=case.query)
    (of_one,) = record_attention(model, images[:1], query=case.query)
    assert torch.allclose(of_one.rows, of_two.rows[:1], atol=1e-5)
