"""The hostile models' own truths: lively, of the places that their authors say, and told from false ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attn_monitor import record_attention
from tests.support.hostile import CASES
from tests.support.hostile_held_out import HELD_OUT
from tests.support.hostile_judge import Hostile, compare, expected, judge
from tests.support.hostile_tape import Grid, Truth, taped
from tests.support.styles import PATCH

EVERY = [*CASES, *HELD_OUT]
PARAMETERS = [pytest.param(c, id=c.id) for c in EVERY]
BLURRED = ("stem that blurs", "enlarged smoothly")  # a token sees its neighbours' pixels too
UNSEEN = ("pooled queries", "queries and keys pooled")  # silence leaves nothing of the image there


def named(name: str, kind: str = "") -> Hostile:
    """The open case of this name."""
    return next(c for c in CASES if c.name == name and c.kind.startswith(kind))


def test_names_are_unique_and_there_are_many() -> None:
    assert len({c.id for c in EVERY}) == len(EVERY) >= 120
    assert len(HELD_OUT) >= len(EVERY) / 4


@pytest.mark.parametrize("case", PARAMETERS)
def test_a_false_order_would_be_seen(case: Hostile) -> None:
    for truth in case.truths().values():
        for query in case.queries:
            if (true := expected(truth, query)) is not None and case.name != "softmax over queries":  # uniform mean
                for false in (true.maps.flip(-1, -2), true.maps.roll(1, -1 if truth.grid[1] > 1 else -2)):
                    assert float((false - true.maps).abs().amax()) * truth.keys.shape[1] > 100 * min(
                        case.tolerance, 5e-3
                    )


def changed_pixels(case: Hostile, grid: Grid) -> Iterator[Tensor]:
    """The first image, then as often as there are patches on the grid, each time with the next one changed a little."""
    image = case.images()[0].double()
    yield image
    (height, width), (gh, gw) = (s // PATCH * PATCH for s in image.shape[-2:]), grid
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for patch in range(gh * gw):
        rows = slice(patch // gw * (height // gh), (patch // gw + 1) * (height // gh))
        columns = slice(patch % gw * (width // gw), (patch % gw + 1) * (width // gw))
        mask = torch.zeros_like(image)
        mask[:, rows, columns] = 1e-6
        yield image + mask * noise


def silent_truths(case: Hostile, images: Tensor) -> list[Truth]:
    """Truths of a forward in which no attention mixes tokens."""
    with torch.no_grad(), taped(silent=True) as tape:
        case.model().double()(images)
    quiet = next((i for i, t in enumerate(tape.truths) if t.values is None), len(tape.truths))
    return tape.truths[:quiet]


def apart(moved: Tensor, said: Tensor, grid: Grid) -> Tensor:
    """Rows and columns between the patches that move the tokens most and those that they are said to hold: (2, N)."""
    return torch.stack([moved // grid[1] - said // grid[1], moved % grid[1] - said % grid[1]]).double()


@pytest.mark.parametrize("case", [p for p in PARAMETERS if p.values[0].name not in UNSEEN])
def test_places_are_where_the_pixels_go(case: Hostile) -> None:
    if case.kind == "changing order" or "batch" in case.name or "each second image" in case.name:
        pytest.skip("each image of a batch has an order of its own")
    if case.name == "cropped":
        pytest.skip("its patches lie in a part of the image, and pixels are changed in all of it")
    grids = {t.grid for t in case.truths().values()}
    for grid in grids:
        images = torch.stack(list(changed_pixels(case, grid)))
        for truth in silent_truths(case, images):
            places = truth.keys[0]
            if (
                truth.grid != grid
                or truth.void
                or sorted(p for p in places.tolist() if p >= 0) != list(range(len(images) - 1))
            ):
                continue
            assert truth.values is not None
            change = (truth.values[1:] - truth.values[:1]).square().sum((1, 3))  # (patches, K)
            patches = places >= 0
            far = apart(change[:, patches].argmax(0), places[patches], grid)
            blurred = case.kind in BLURRED or case.name in BLURRED or case.kind == "hierarchies"
            assert float(far.abs().amax()) <= blurred, case.name
            assert float(far.mean(1).abs().amax()) <= 0.5 * blurred, "all of them lie elsewhere"
            assert bool((change[:, patches].amax(0) > 0).all())


def test_the_judge_tells_right_from_wrong() -> None:
    case = named("explicit softmax")
    assert {j.verdict for j in judge(case)} == {"right"}
    (truth, _), (model, images) = case.truths().values(), (case.model(), case.images())
    (got,) = record_attention(model, images, layers=0)
    true = expected(truth, "cls")
    assert true is not None
    assert compare(got, true, "cls", 1e-3) == "right"
    assert compare(got, replace(true, maps=true.maps.flip(-1)), "cls", 1e-3).startswith("wrong: ")
    assert compare(got, replace(true, cls=true.cls + 0.1), "cls", 1e-3).startswith("wrong: ")
    assert compare(got, replace(true, maps=true.maps.mT), "cls", 1e-3) == "wrong: (2, 4, 4, 6) for (2, 4, 6, 4)"
    assert compare(got, replace(true, others=2), "cls", 1e-3) == "wrong: 1 tokens before the patches, not 2"
    assert compare(got, None, "cls", 1e-3) == "wrong: there is no true map"


def test_an_order_by_content_differs_between_images() -> None:
    for name in ("sorted by score", "rolled by content", "reversed by the first patch", "by index in the batch"):
        truth = list(named(name).truths().values())[-1]
        assert not torch.equal(truth.keys[0], truth.keys[1]), name
