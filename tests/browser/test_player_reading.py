"""What a reader of the player is told, and where: numbers at the cursor, verdicts, words, keys, axes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from attn_monitor import AttentionSnapshot, ProbeBatch, load_snapshots
from attn_monitor import functional as F
from attn_monitor.capture.observe.forward import default_forward
from attn_monitor.commands.report import report
from attn_monitor.measurements import Verdict
from attn_monitor.offline import attention_player
from attn_monitor.record.archive import snapshot_path
from tests.support.browser import CHROMIUM, Watched, browsing
from tests.support.helpers import tiny_vit
from tests.support.oracle import attention_matrices
from tests.support.runs import write_run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")]

COLLAPSE = Verdict(
    "complete collapse", 40, ("all images get a uniform answer", "the loss is ln 512"), "Sharpen targets"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that ends at 30, and one that ends at 60 and has collapsed; their first attention is uniform."""
    root = tmp_path_factory.mktemp("runs")
    masks = torch.zeros(2, 1, 32, 32, dtype=torch.bool)
    masks[:, 0, 4:20, 6:26] = True
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    probe = ProbeBatch(images, masks=masks)
    short, long = root / "short" / "attn_monitor", root / "long" / "attn_monitor"
    torch.manual_seed(3)
    write_run(short, (0, 10, 30), sharpness=(0, 3, 6), probe=probe, features=True)
    write_run(long, (0, 20, 40, 60), sharpness=(0, 3, 0.01, 0), probe=probe, features=True)
    for snapshot in load_snapshots(long):
        verdict = COLLAPSE if snapshot.step >= 40 else Verdict("healthy")
        dataclasses.replace(snapshot, verdict=verdict).save(snapshot_path(long, snapshot.step))
    return short, long


@pytest.fixture(scope="module")
def pages(folders: tuple[Path, Path]) -> dict[str, Path]:
    short, long = folders
    root = short.parent.parent
    report(str(short), out=str(root / "short.html"))
    report(str(long), out=str(root / "long.html"))
    report(str(short), str(long), out=str(root / "both.html"))
    return {name: root / f"{name}.html" for name in ("short", "long", "both")}


@pytest.fixture(scope="module")
def browser() -> Iterator[Watched]:
    with browsing() as watched:
        yield watched


@pytest.fixture
def watched(browser: Watched) -> Iterator[Watched]:
    yield browser
    browser.check()


def large(page: Any, role: str = "student") -> Any:
    return page.locator(f"section.column[aria-label^='{role}'] figure canvas").first


def at_patch(canvas: Any, row: int, column: int, side: int = 4) -> tuple[float, float]:
    box = canvas.bounding_box()
    return box["x"] + box["width"] * (column + 0.5) / side, box["y"] + box["height"] * (row + 0.5) / side


@pytest.mark.parametrize("width", [1080, 420])
def test_numbers_of_a_patch_are_beside_it_where_the_card_is_far(
    watched: Watched, pages: dict[str, Path], folders: tuple[Path, Path], width: int
) -> None:
    last: AttentionSnapshot = load_snapshots(folders[0])[-1]
    page = watched.open(pages["short"], width=width)
    canvas, readout = large(page), page.locator(".readout")
    assert readout.is_hidden()
    x, y = at_patch(canvas, 1, 2)
    page.mouse.move(x, y)
    watched.settle()
    expected = [float(last.maps(role)[0].mean(0)[1, 2]) * 16 for role in last.roles]
    assert readout.locator("b").first.inner_text() == "Patch 1, 2 · mean of heads"
    shown = [float(text.rstrip("×")) for text in readout.locator(".value b").all_inner_texts()]
    assert shown == pytest.approx(expected, rel=0.01, abs=0.006)
    box = readout.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    assert abs(box["y"] + box["height"] / 2 - y) < canvas.bounding_box()["height"] / 4, "beside the patch"
    page.mouse.move(*at_patch(page.locator(".heads canvas").nth(1), 1, 2))
    watched.settle()
    assert "head 1" in readout.inner_text(), "of the head below the cursor"
    assert float(readout.locator(".value b").first.inner_text().rstrip("×")) == pytest.approx(
        float(last.maps("student")[0, 1, 1, 2]) * 16, rel=0.01, abs=0.006
    )
    page.mouse.click(x, y)
    page.mouse.move(2, 2)
    watched.settle()
    assert readout.is_visible(), "of a pinned patch they stay, as on touch screens"
    watched.open(pages["short"], "pin=3", width=1400)
    assert readout.is_hidden(), "the card is beside the pictures"


def test_one_slider_spans_two_runs(watched: Watched, pages: dict[str, Path]) -> None:
    page = watched.open(pages["both"])
    slider, step = page.get_by_label("step", exact=True), page.locator("output.step")
    details = page.locator(".detail")
    assert [slider.get_attribute("min"), slider.get_attribute("max")] == ["0", "60"]
    assert step.inner_text() == "step 60"
    assert details.all_inner_texts()[:2] == ["step 30, its last", "step 60"]
    found = []
    for _ in range(5):
        page.keyboard.press("ArrowLeft")
        watched.settle()
        found.append((step.inner_text(), *details.all_inner_texts()[:2]))
    assert [t for t, *_ in found] == ["step 40", "step 30", "step 20", "step 10", "step 0"]
    assert found[1] == ("step 30", "step 30", "step 20"), "the nearest of each"
    watched.open(pages["both"], "step=40&metric=entropy")
    assert step.inner_text() == "step 40"
    ends = page.evaluate(
        "() => [...document.querySelectorAll('.curves path')].map(p => p.getAttribute('d').split('L').pop())"
    )
    assert max(float(end.split()[0]) for end in ends[2:]) > 1.5 * max(float(end.split()[0]) for end in ends[:2])


def test_uniform_attention_has_neither_mask_nor_overlap(watched: Watched, pages: dict[str, Path]) -> None:
    page = watched.open(pages["short"], "step=0")
    caption = page.locator("figcaption").first
    assert re.search(r"entropy 1\.00.*uniform: no mask, no IoU", " ".join(caption.inner_text().split()))
    assert "IoU" not in page.locator(".heads").first.inner_text()
    watched.open(pages["short"], "step=30")
    assert re.search(r"mask \d+ %.*IoU 0\.\d\d", " ".join(caption.inner_text().split()))


def test_axes_are_not_stretched_to_noise(watched: Watched, pages: dict[str, Path], tmp_path: Path) -> None:
    """Entropies of 0.999 to 1 are a line at the top of an axis that begins at 0.9; labels are beside the curves."""
    torch.manual_seed(3)
    write_run(tmp_path / "flat", (0, 1, 2), sharpness=(0, 0.02, 0.03))
    report(str(tmp_path / "flat"), out=str(tmp_path / "flat.html"))
    page = watched.open(tmp_path / "flat.html", "metric=entropy")
    labels = [page.locator(f".curves .axis.{end}").inner_text() for end in ("top", "bottom")]
    assert labels == ["1.00", "0.90"]
    path = page.locator(".curves path").first.get_attribute("d")
    heights = [float(y) for y in re.findall(r"[ML]\S+ ([\d.]+)", path)]
    assert len(heights) == 3
    assert max(heights) - min(heights) < 3
    for chart in (".curves", ".history"):
        watched.open(pages["short"], "pin=5")
        label, plot = (page.locator(f"{chart} {part}").first.bounding_box() for part in (".axis.top", ".plot"))
        assert label["x"] + label["width"] <= plot["x"]


def test_captions_say_what_is_shown(watched: Watched, pages: dict[str, Path]) -> None:
    page = watched.open(pages["short"], "show=colors")
    caption = page.locator("figcaption").first
    assert " ".join(caption.inner_text().split()) == "PCA of features like colour, like feature"
    watched.open(pages["short"], "show=cosine&pin=6")
    assert re.fullmatch(r"cosine to patch 1, 2 mean -?\d\.\d\d", " ".join(caption.inner_text().split()))
    assert page.locator(".key-mask").is_hidden()


def test_arrows_keep_their_meaning_after_a_click(watched: Watched, pages: dict[str, Path]) -> None:
    page = watched.open(pages["short"])
    step = page.locator("output.step")
    page.mouse.click(*at_patch(large(page), 0, 1))
    page.keyboard.press("ArrowLeft")
    watched.settle()
    assert step.inner_text() == "step 10"
    assert page.locator(".patch h3").inner_text() == "Patch 0, 1"
    page.mouse.move(2, 2)
    page.keyboard.press("Shift+ArrowDown")
    page.keyboard.press("Shift+ArrowRight")
    watched.settle()
    assert page.locator(".patch h3").inner_text() == "Patch 1, 2"
    assert step.inner_text() == "step 10"


def test_words_and_keys_are_explained(watched: Watched, pages: dict[str, Path]) -> None:
    """By the key ?, and by a button for touch screens; every key of the page is in the list."""
    page = watched.open(pages["short"], width=420)
    dialog = page.get_by_role("dialog", name="Words and keys")
    page.get_by_role("button", name="words and keys").click()
    assert dialog.is_visible()
    box = dialog.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 420
    text = dialog.inner_text()
    assert [
        w for w in ("entropy, H", "IoU", "peak", "PCA", "cosine", "Shift + ←", "space", "Esc") if w not in text
    ] == []
    before = page.locator("output.step").inner_text()
    page.keyboard.press("ArrowLeft")
    assert page.locator("output.step").inner_text() == before, "keys do not act behind it"
    page.keyboard.press("Escape")
    assert dialog.is_hidden()
    page.keyboard.press("?")
    assert dialog.is_visible()


@pytest.mark.parametrize("size", [(1400, 900), (1920, 900), (1600, 1000)])
def test_no_gap_and_nothing_clipped(watched: Watched, pages: dict[str, Path], size: tuple[int, int]) -> None:
    page = watched.open(pages["short"], width=size[0], height=size[1])
    pictures, side = (page.locator(name).bounding_box() for name in ("#pictures .pictures", ".sides"))
    assert side["x"] - (pictures["x"] + pictures["width"]) <= 24
    assert side["x"] + side["width"] >= size[0] - 24
    ring, rail = (page.locator(n).first.bounding_box() for n in (".thumbnail[aria-pressed='true']", ".thumbnails"))
    assert ring["x"] - rail["x"] >= 4
    assert rail["x"] + rail["width"] - ring["x"] - ring["width"] >= 4


def test_the_step_is_not_below_the_speed(watched: Watched, pages: dict[str, Path]) -> None:
    for width in (1400, 720, 600, 420):
        page = watched.open(pages["short"], width=width)
        when, speed = page.locator(".when").bounding_box(), page.get_by_label("speed").bounding_box()
        assert when["x"] + when["width"] <= speed["x"], width


def test_the_verdict_is_above_everything(watched: Watched, pages: dict[str, Path]) -> None:
    page = watched.open(pages["long"])
    verdict = page.locator("details.verdict").last
    text = " ".join(verdict.inner_text().split())
    assert text.endswith("complete collapse since step 40 all images get a uniform answer")
    assert verdict.bounding_box()["y"] < page.locator("#pictures").bounding_box()["y"]
    verdict.locator("summary").click()
    text = " ".join(verdict.inner_text().split())
    assert "the loss is ln 512" in text
    assert "What to do: Sharpen targets." in text
    verdict.get_by_role("button", name="step 40: complete collapse").click()
    watched.settle()
    assert page.locator("output.step").inner_text() == "step 40"
    assert verdict.get_attribute("open") is not None
    watched.open(pages["both"])
    assert [text.split()[0] for text in page.locator("details.verdict").all_inner_texts()] == ["A", "B"]
    assert "complete collapse" in verdict.inner_text()


def test_a_click_shows_what_the_patch_attends_to(watched: Watched, pages: dict[str, Path], tmp_path: Path) -> None:
    """Where the model is there: maps, numbers and caption are those of float64. Elsewhere it is refused in words."""
    torch.manual_seed(5)
    model, images = tiny_vit(), torch.randn(2, 3, 32, 32)
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.4)
    truth = attention_matrices(model, images, default_forward)[1][0, :, 1:, 1:]  # (H, patches, patches)
    (tmp_path / "model.html").write_text(attention_player(model, images).page)
    page = watched.open(tmp_path / "model.html")
    page.mouse.click(*at_patch(large(page, "backbone"), 1, 2))
    watched.settle()
    assert page.get_by_role("button", name="Patch", exact=True).get_attribute("aria-pressed") == "true"
    caption = " ".join(page.locator("figcaption").inner_text().split())
    entropy = float(F.entropy(truth[:, 6].mean(0)))
    assert caption.startswith(f"mean, of patch 1, 2 entropy {entropy:.2f}")
    assert "of patch 1, 2" in page.locator(".patch .reading").inner_text()
    page.mouse.move(*at_patch(large(page, "backbone"), 3, 0))
    watched.settle()
    numbers = [float(t.rstrip("×")) for t in page.locator(".bars .number").all_inner_texts()]
    expected = [float(row[12]) * 16 for row in (truth[:, 6].mean(0), *truth[:, 6])]
    assert numbers == pytest.approx(expected, rel=0.01, abs=0.006)
    page.get_by_role("button", name="Attention", exact=True).click()
    watched.settle()
    of_cls = attention_matrices(model, images, default_forward)[1][0, :, 0, 1:].mean(0)
    assert f"entropy {float(F.entropy(of_cls)):.2f}" in " ".join(page.locator("figcaption").inner_text().split())
    watched.open(pages["short"], "pin=6")
    assert "not kept in archives" in page.locator(".patch").inner_text()
