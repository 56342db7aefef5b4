"""The player in a real browser: it shows what the snapshots hold, and its controls work."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from attn_monitor import AttentionSnapshot, HealthLimits, LayerAttention, ProbeBatch, load_snapshots
from attn_monitor import functional as F
from attn_monitor.commands.cli import main
from attn_monitor.commands.report import report
from attn_monitor.errors import ArchiveError
from attn_monitor.offline import snapshot_player
from attn_monitor.player.blocks import blocks, layout_of
from attn_monitor.player.contents import Contents, Step, images_of, step_facts
from attn_monitor.player.page import code_size, page_of_runs
from attn_monitor.player.report import EMBED_BYTES, FILE_BYTES, report_page
from attn_monitor.record.archive import snapshot_path
from tests.support.browser import CHROMIUM, Watched, browsing, pixels_of
from tests.support.runs import write_run


def in_a_browser(test: Any) -> Any:
    """Marks a test that is skipped where there is no browser."""
    return pytest.mark.slow(pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")(test))


STEPS = (0, 10, 30, 100)
CYAN = (64, 224, 255)
NUMBERS = Path(__file__).parent.parent.parent / "attn_monitor" / "player" / "web" / "numbers.js"


@pytest.fixture(scope="module")
def probe(photographs: Path) -> ProbeBatch:
    """Three photographs of 64 x 48 pixels, two with objects."""
    masks = torch.zeros(3, 2, 64, 48, dtype=torch.bool)
    masks[0, 0, 8:40, 10:30] = masks[0, 1, 30:60, 5:20] = masks[1, 0, 20:50, 16:44] = True
    read = ProbeBatch.from_folder(photographs, size=(64, 48), num_images=3)
    return ProbeBatch(read.images, masks=masks, names=read.names)


@pytest.fixture(scope="module")
def archive(probe: ProbeBatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a student and a teacher with registers, two layers, and a health flag."""
    folder = tmp_path_factory.mktemp("runs") / "first" / "attn_monitor"
    torch.manual_seed(3)
    model = {"reg_tokens": 2, "embed_dim": 32}
    write_run(
        folder,
        STEPS,
        sharpness=(0.5, 3, 4, 6),
        probe=probe,
        model=model,
        layers="all",
        health=HealthLimits(peak=0.1),
    )
    return folder


@pytest.fixture(scope="module")
def other(probe: ProbeBatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another run on the same images, at other steps."""
    folder = tmp_path_factory.mktemp("runs") / "second" / "attn_monitor"
    torch.manual_seed(4)
    write_run(folder, (0, 12, 90), sharpness=(0.3, 1.5, 3), probe=probe, model={"reg_tokens": 2}, layers="all")
    return folder


@pytest.fixture(scope="module")
def snapshots(archive: Path) -> list[AttentionSnapshot]:
    return load_snapshots(archive)


@pytest.fixture(scope="module")
def file(archive: Path) -> Path:
    """The report of the run."""
    path = archive.parent / "report.html"
    report(str(archive), out=str(path))
    return path


@pytest.fixture(scope="module")
def both(archive: Path, other: Path) -> Path:
    """The report of two runs."""
    path = archive.parent / "both.html"
    main(["report", str(archive), str(other), "--out", str(path)])
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Watched]:
    with browsing() as watched:
        yield watched


@pytest.fixture
def watched(browser: Watched) -> Iterator[Watched]:
    """The page, in which nothing may go wrong, and which may ask for nothing."""
    yield browser
    browser.check()


def maps_of(snapshot: AttentionSnapshot, role: str, layer: int, image: int, head: int) -> torch.Tensor:
    maps = snapshot.maps(role, layer)[image]
    return (maps.mean(0) if head < 0 else maps[head]).flatten()


def canvas_of(page: Any, role: str, selector: str = "figure canvas") -> Any:
    return page.locator(f"section.column[aria-label^='{role}'] {selector}").first


def outlined_patches(canvas: Any, grid: tuple[int, int]) -> np.ndarray[Any, Any]:
    """Which patches have an outline's colour at the middle of one of their four borders, bool (gh, gw)."""
    pixels = pixels_of(canvas)
    height, width = pixels.shape[:2]
    cyan = (np.abs(pixels - CYAN) < 3).all(-1)
    h, w = height // grid[0], width // grid[1]
    cells = cyan.reshape(grid[0], h, grid[1], w).transpose(0, 2, 1, 3)
    middles = cells[..., 0, w // 2], cells[..., -1, w // 2], cells[..., h // 2, 0], cells[..., h // 2, -1]
    return np.any(middles, axis=0)


def border_of(mask: torch.Tensor, grid: tuple[int, int]) -> np.ndarray[Any, Any]:
    """Patches of a mask that lie at its border: not all four neighbours are in it."""
    inside = np.pad(mask.view(grid).numpy(), 1)
    around = inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
    return inside[1:-1, 1:-1] & ~around


@in_a_browser
def test_numbers_are_those_of_functional(watched: Watched) -> None:
    """Entropy, mask, overlap and cosine of thousands of rows: sharp and flat, with ties, zeros, NaN, negative ones."""
    page, generator = watched.page, torch.Generator().manual_seed(0)
    page.goto("about:blank")
    rows = [
        (torch.randn(48, generator=generator) * s).softmax(0).half().float()
        for s in (0, 0.1, 1, 3, 9)
        for _ in range(30)
    ]
    rows += [torch.tensor([0.5, 0.3, 0.1, 0.1]), torch.zeros(6), torch.eye(5)[2], torch.tensor([math.nan, 1.0])]
    rows += [
        torch.tensor([-0.1, 1.1]),
        torch.tensor([0.25, 0.25, 0.25, 0.25]),
        torch.ones(1),
        torch.tensor([0.2, 0.3, 0.3, 0.2]),
    ]
    thresholds = [0.05, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0]
    given = [[None if math.isnan(v) else v for v in row.tolist()] for row in rows]
    found = page.evaluate(
        """async ([code, rows, thresholds]) => {
            const m = await import(`data:text/javascript,${encodeURIComponent(code)}`);
            return rows.map(row => {
                const values = Float32Array.from(row, v => v ?? NaN);
                return [m.entropyOf(values), m.peakOf(values), thresholds.map(t => [...m.massMask(values, t)])];
            });
        }""",
        [NUMBERS.read_text(), given, thresholds],
    )
    for row, (entropy, peak, masks) in zip(rows, found, strict=True):
        told = [math.nan if v is None else v for v in (entropy, peak)]
        np.testing.assert_allclose(told, [float(F.entropy(row)), float(F.peak(row))], rtol=1e-5, atol=1e-6)
        for threshold, mask in zip(thresholds, masks, strict=True):
            assert mask == F.mass_mask(row, threshold).int().tolist(), (row, threshold)


@in_a_browser
def test_every_half_is_the_number_that_numpy_reads(watched: Watched) -> None:
    watched.page.goto("about:blank")
    found = watched.page.evaluate(
        """async code => {
            const {fromHalves} = await import(`data:text/javascript,${encodeURIComponent(code)}`);
            const bits = fromHalves(Uint16Array.from({length: 65536}, (_, i) => i));
            return [...bits].map(v => Number.isNaN(v) ? 'nan' : Object.is(v, -0) ? '-0' : String(v));
        }""",
        NUMBERS.read_text(),
    )
    np.testing.assert_array_equal(np.array(found, dtype=np.float64), np.arange(65536, dtype=np.uint16).view(np.float16))


@in_a_browser
@pytest.mark.parametrize(
    ("step", "layer", "image", "head", "threshold"), [(100, 1, 0, -1, 0.6), (30, 0, 1, 2, 0.3), (10, 1, 2, 0, 0.85)]
)
def test_outlines_are_the_mass_mask(
    watched: Watched,
    file: Path,
    snapshots: Sequence[AttentionSnapshot],
    step: int,
    layer: int,
    image: int,
    head: int,
    threshold: float,
) -> None:
    """Of the large maps and of every head, pixel by pixel at the patches' borders, after the slider was moved."""
    page = watched.open(file, f"step={step}&layer={layer}&image={image}&head={head}&truth=false&opacity=0.5")
    page.get_by_label("Mask mass").fill(str(threshold))
    watched.settle()
    snapshot = next(s for s in snapshots if s.step == step)
    grid = snapshot.layer("student", layer).grid
    for role in snapshot.roles:
        shown = [(head, canvas_of(page, role))]
        shown += [(h, canvas_of(page, role, f".heads button:nth-child({h + 1}) canvas")) for h in range(4)]
        for h, canvas in shown:
            values = maps_of(snapshot, role, layer, image, h)
            expected = F.mass_mask(values, threshold)
            assert float(F.entropy(values)) < 0.995, "too flat to have an outline"
            np.testing.assert_array_equal(outlined_patches(canvas, grid), border_of(expected, grid), f"{role} {h}")
            area = canvas.locator("xpath=..").inner_text()
            if h == head and "mask" in area:
                assert f"mask {math.floor(100 * float(expected.float().mean()) + 0.5)} %" in area
                assert f"entropy {float(F.entropy(values)):.2f}" in area
                assert f"peak {float(F.peak(values)):.1f}×" in area


@in_a_browser
def test_overlap_with_ground_truth_is_live(
    watched: Watched, file: Path, probe: ProbeBatch, snapshots: Sequence[AttentionSnapshot]
) -> None:
    page = watched.open(file, "image=0&head=1")
    assert probe.masks is not None
    for threshold in (0.6, 0.9):
        page.get_by_label("Mask mass").fill(str(threshold))
        watched.settle()
        for role in ("student", "teacher"):
            attention = snapshots[-1].layer(role)
            mask = F.mass_mask(attention.maps[0, 1].flatten(), threshold).view(attention.grid)
            large = mask.repeat_interleave(8, 0).repeat_interleave(8, 1)
            expected = F.jaccard(large.flatten()[None], probe.masks[0].flatten(1)).mean()
            caption = canvas_of(page, role, "figure figcaption").inner_text()
            assert f"IoU {float(expected):.2f}" in caption
    page.get_by_label("Ground truth").uncheck()
    watched.settle()
    assert page.locator(".key-truth").is_hidden()


@in_a_browser
def test_a_patch_tells_its_weight_in_every_head_and_its_history(
    watched: Watched, file: Path, snapshots: Sequence[AttentionSnapshot]
) -> None:
    """At the pointer, in units of uniform attention, at each step; a click keeps it."""
    page = watched.open(file, "image=1&layer=0")
    canvas, (gh, gw) = canvas_of(page, "student"), snapshots[0].layer("student").grid
    box = canvas.bounding_box()
    patch = 3 * gw + 2
    page.mouse.move(box["x"] + box["width"] * 2.5 / gw, box["y"] + box["height"] * 3.5 / gh)
    watched.settle()
    assert page.locator(".patch h3").inner_text() == "Patch 3, 2"

    def told() -> list[str]:
        return [t.strip() for t in page.locator(".bars .number").all_inner_texts()]

    def expected(snapshot: AttentionSnapshot) -> list[float]:
        return [
            float(maps_of(snapshot, role, 0, 1, h)[patch]) * gh * gw for h in range(-1, 4) for role in snapshot.roles
        ]

    np.testing.assert_allclose([float(t.rstrip("×")) for t in told()], expected(snapshots[-1]), rtol=0.01, atol=0.006)
    page.mouse.click(box["x"] + box["width"] * 2.5 / gw, box["y"] + box["height"] * 3.5 / gh)
    page.mouse.move(5, 5)
    for _ in range(2):
        page.get_by_role("button", name="one step back").click()
    watched.settle()
    assert page.locator("output.step").inner_text() == "step 10"
    np.testing.assert_allclose([float(t.rstrip("×")) for t in told()], expected(snapshots[1]), rtol=0.01, atol=0.006)
    page.wait_for_function("() => document.querySelectorAll('.history path').length === 2")
    history = page.locator(".history path").first.get_attribute("d")
    assert len(re.findall("[ML]", history)) == len(STEPS)
    top = float(page.locator(".history .axis.top").inner_text().rstrip("×"))
    assert top == pytest.approx(
        max(float(maps_of(s, r, 0, 1, -1)[patch]) * gh * gw for s in snapshots for r in s.roles), rel=0.01
    )
    tokens = [float(t.rstrip(" %")) for t in page.locator(".tokens .number").all_inner_texts()]
    rows = [snapshots[1].rows(role, 0)[1].mean(0)[:3] for role in snapshots[1].roles]
    np.testing.assert_allclose(tokens, 100 * torch.cat(rows).numpy(), atol=0.51)


@in_a_browser
def test_controls_do_what_they_say(watched: Watched, file: Path, snapshots: Sequence[AttentionSnapshot]) -> None:
    page = watched.open(file)
    canvas = canvas_of(page, "teacher")

    def drawn() -> bytes:
        watched.settle()
        return pixels_of(canvas).tobytes()

    def changes(action: Any) -> None:
        before = drawn()
        action()
        assert drawn() != before

    changes(lambda: page.get_by_label("Layer", exact=True).fill("0"))
    changes(lambda: page.get_by_label("Head", exact=True).select_option("2"))
    assert "head 2" in canvas.get_attribute("aria-label")
    changes(lambda: page.get_by_role("button", name="Per map").click())
    assert page.locator(".ticks").inner_text().split() == ["min", "max"]
    changes(lambda: page.get_by_role("button", name="Viridis").click())
    changes(lambda: page.get_by_label("Overlay").fill("0.2"))
    changes(lambda: page.get_by_label("Mask outline").uncheck())
    changes(lambda: page.get_by_label("Mask outline").check())
    changes(lambda: page.get_by_role("button", name="coffee").click())
    page.get_by_role("button", name="By entropy").click()
    watched.settle()
    labels = page.locator("section[aria-label=teacher] .heads button b").all_inner_texts()
    image = sorted(snapshots[0].names).index("coffee")
    sharp = sum(F.entropy(snapshots[-1].maps(role, 0)[image].flatten(1)) for role in ("student", "teacher"))
    assert labels == [str(h) for h in torch.as_tensor(sharp).argsort().tolist()]
    page.get_by_role("button", name="Heads", exact=True).click()
    watched.settle()
    assert page.locator("figure").count() == 0
    assert page.locator(".heads button").count() == 8
    page.get_by_role("button", name="Large", exact=True).click()
    watched.settle()
    assert (page.locator("figure").count(), page.locator(".heads").count()) == (2, 0)
    page.get_by_role("button", name="All").click()
    watched.settle()
    assert page.locator(".item").count() == 3
    assert page.locator(".item canvas").count() == 6


@in_a_browser
def test_one_slider_moves_everything(watched: Watched, file: Path, snapshots: Sequence[AttentionSnapshot]) -> None:
    """The newest step first; the slider, keys and play; curves say the metrics; a flag is a mark to click."""
    page = watched.open(file)
    step, slider = page.locator("output.step"), page.get_by_label("step", exact=True)
    assert step.inner_text() == "step 100"
    slider.fill("29")
    watched.settle()
    assert step.inner_text() == "step 30", "the nearest snapshot"
    page.get_by_label("curve", exact=True).select_option("peak")
    watched.settle()
    told = [float(t) for t in page.locator(".reading b").all_inner_texts()]
    expected = [snapshots[2].metrics[role, 1, "peak", None] for role in ("student", "teacher")]
    np.testing.assert_allclose(told, expected, rtol=0.01)
    slider.press("Home")
    page.locator("body").press("ArrowRight")
    watched.settle()
    assert step.inner_text() == "step 10"
    page.get_by_label("speed").select_option("30")
    page.get_by_role("button", name="play").click()
    page.wait_for_function("() => document.querySelector('output.step').textContent === 'step 100'")
    page.get_by_role("button", name="play").wait_for()  # it has come to the end
    flag = next(f for s in snapshots for f in s.flags)
    page.get_by_role("button", name=f"health flag: {flag}").click()
    watched.settle()
    assert step.inner_text() == f"step {flag.step}"
    assert page.get_by_label("Head", exact=True).input_value() == str(flag.heads[0])


@in_a_browser
def test_a_link_restores_the_view_and_a_picture_keeps_it(watched: Watched, file: Path, tmp_path: Path) -> None:
    page = watched.open(file)
    page.get_by_label("step", exact=True).fill("30")
    page.get_by_label("Head", exact=True).select_option("3")
    page.get_by_label("Mask mass").fill("0.42")
    page.get_by_role("button", name="Per map").click()
    page.wait_for_function("() => location.hash.includes('scale')")
    pixels, link = pixels_of(canvas_of(page, "student")), page.url
    watched.open(file, link.partition("#")[2])
    np.testing.assert_array_equal(pixels_of(canvas_of(page, "student")), pixels)
    with page.expect_download() as download:
        page.get_by_role("button", name="PNG").click()
    download.value.save_as(tmp_path / "view.png")
    picture = Image.open(tmp_path / "view.png")
    assert picture.width > 1200
    assert download.value.suggested_filename == "attention-step-30.png"
    assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 500
    wild = "step=x&image=99&head=77&threshold=9&show=<b>&metric=<i>&layer=&compare=swipe&constructor=1&pin=100000"
    page = watched.open(file, wild)
    assert page.locator("output.step").inner_text() == "step 100"
    assert page.get_by_label("Mask mass").input_value() == "1"


@in_a_browser
def test_keys_alone_are_enough(watched: Watched, file: Path) -> None:
    """Every control is reached by Tab; Shift and arrows move the cursor, Enter keeps the patch."""
    page = watched.open(file)
    reached: list[str] = []
    for _ in range(60):
        page.keyboard.press("Tab")
        label = page.evaluate(
            """() => {
                const e = document.activeElement;
                return e.getAttribute('aria-label') || e.labels?.[0]?.textContent || e.textContent;
            }"""
        )
        if label in reached[:1]:
            break
        reached.append(label)
    for wanted in (
        "Link",
        "PNG",
        "All",
        "coffee",
        "Both",
        "By entropy",
        "Overlay",
        "Mask mass",
        "Ground truth",
        "play",
        "step",
        "curve",
    ):
        assert wanted in reached, wanted
    assert all(reached)
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("Shift+ArrowDown")
    watched.settle()
    assert page.locator(".patch h3").inner_text() == "Patch 5, 4"
    page.keyboard.press("Enter")
    watched.settle()
    page.wait_for_function("() => location.hash.includes('pin=34')")
    assert page.locator("output.step").inner_text() == "step 100", "they moved the patch, not the step"
    page.locator("body").press("Escape")
    page.wait_for_function("() => !location.hash.includes('pin')")


CONTRASTS = """() => {
    const parse = text => (text.match(/[\\d.]+/g) || []).map(Number);
    const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const light = colour => colour.slice(0, 3).map(v => linear(v / 255))
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = element => {
        for (let e = element; e; e = e.parentElement) {
            const colour = parse(getComputedStyle(e).backgroundColor);
            if (colour.length === 3 || colour[3] === 1) return colour.slice(0, 3);
        }
        return [255, 255, 255];
    };
    const low = [];
    for (const element of document.querySelectorAll('body *')) {
        const own = [...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
        if (!own || !element.offsetParent || element.closest('option') || element.matches('.tile b')) continue;
        const [a, b] = [light(parse(getComputedStyle(element).color)), light(behind(element))].sort((x, y) => y - x);
        if ((a + 0.05) / (b + 0.05) < 4.5) low.push([element.className, element.textContent, (a + 0.05) / (b + 0.05)]);
    }
    return low;
}"""


@in_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 400])
def test_it_is_read_on_laptop_and_phone_in_light_and_dark(
    watched: Watched, file: Path, scheme: str, width: int
) -> None:
    """Nothing is cut off at the side, pictures are large, and all text has the contrast of AA."""
    page = watched.open(file, "pin=10&image=1", width=width, height=860, scheme=scheme)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    assert page.evaluate(CONTRASTS) == []
    background = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", background)[:3])) < 60) == (scheme == "dark")
    assert canvas_of(page, "student").bounding_box()["width"] >= 160
    assert page.locator("canvas.bar").is_visible()


@in_a_browser
def test_a_theme_is_the_same_by_button_and_by_system(watched: Watched, file: Path) -> None:
    """The button goes from the system's theme to light, to dark, and back."""
    colours = """() => [...document.body.querySelectorAll("*")].map(element => {
        const {color, backgroundColor, borderColor, boxShadow} = getComputedStyle(element);
        return [color, backgroundColor, borderColor, boxShadow].join();
    })"""
    by_system = {}
    for scheme in ("light", "dark"):
        by_system[scheme] = watched.open(file, "mask=false", scheme=scheme).evaluate(colours)
    assert by_system["light"] != by_system["dark"]
    page = watched.open(file, "mask=false", scheme="dark")
    for expected in ("light", "dark", "dark"):
        page.locator("#theme").click()
        page.mouse.move(5, 5)
        page.evaluate("document.activeElement.blur()")
        watched.settle()
        assert page.evaluate(colours) == by_system[expected]


@in_a_browser
@pytest.mark.parametrize("view", ["", "all=true", "arrange=grid&pin=3"])
def test_axe_finds_nothing(watched: Watched, file: Path, view: str) -> None:
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed"
    ).Axe()
    found = axe.run(watched.open(file, view)).response["violations"]
    assert [(v["id"], [n["html"] for n in v["nodes"]]) for v in found] == []


@in_a_browser
def test_two_runs_are_swiped_and_subtracted(
    watched: Watched, both: Path, snapshots: Sequence[AttentionSnapshot], other: Path
) -> None:
    """Side by side, with the nearest step of each; left and right of the divider; their difference."""
    page = watched.open(both, "truth=false&mask=false&layer=1")
    titles = page.locator(".column h2").all_inner_texts()
    assert titles == ["student · A", "student · B", "teacher · A", "teacher · B"]
    assert page.locator(".column .detail").all_inner_texts()[:2] == ["step 100", "step 90, its last"]
    side = [canvas_of(page, f"student · {run}").bounding_box()["width"] for run in "AB"]
    assert side[0] == side[1]
    page.get_by_role("button", name="Swipe").click()
    pixels = []
    for swipe in ("0", "0.5", "1"):
        page.get_by_label("Swipe").last.fill(swipe)
        watched.settle()
        pixels.append(pixels_of(canvas_of(page, "student")))
    width = pixels[0].shape[1]
    quarter, three = width // 4, 3 * width // 4
    np.testing.assert_array_equal(pixels[1][:, quarter], pixels[2][:, quarter], "A is on the left")
    np.testing.assert_array_equal(pixels[1][:, three], pixels[0][:, three], "B is on the right")
    assert (pixels[0][:, quarter] != pixels[2][:, quarter]).any()
    page.get_by_role("button", name="B − A").click()
    watched.settle()
    pair = [s.maps("student", 1)[0].mean(0) for s in (snapshots[-1], load_snapshots(other)[-1])]
    moved = float((pair[0] - pair[1]).abs().sum() / 2)
    caption = canvas_of(page, "student", "figure figcaption").inner_text()
    assert f"{math.floor(100 * moved + 0.5)} % of attention moved" in caption
    assert page.locator(".unit").inner_text() == "× uniform attention more in A, in B"


@in_a_browser
def test_a_notebook_shows_it_in_a_frame_of_its_own(watched: Watched, archive: Path) -> None:
    page = watched.page
    page.goto("about:blank")
    page.set_content(f"<body>{snapshot_player(archive, height=700)._repr_html_()}</body>")
    frame = page.frame_locator("iframe")
    frame.locator("body[data-ready]").wait_for()
    assert frame.locator("output.step").inner_text() == "step 100"
    frame.get_by_role("button", name="one step back").click()
    frame.locator("output.step", has_text="step 30").wait_for()
    frame.get_by_role("button", name="play").click()
    frame.locator("output.step", has_text="step 100").wait_for()
    assert frame.get_by_role("button", name="Link").count() == 0, "the address is the notebook's"
    assert page.url == "about:blank"


class WithColours:
    """A layer with colours and features of its patches, whatever the layer itself has."""

    def __init__(self, layer: LayerAttention, generator: torch.Generator) -> None:
        images, _, gh, gw = layer.maps.shape
        self._layer = layer
        self.colors = torch.rand(images, gh * gw, 3, generator=generator)
        self.features = torch.randn(images, gh * gw, 8, generator=generator)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def with_colours(snapshot: AttentionSnapshot, generator: torch.Generator) -> AttentionSnapshot:
    layers: Any = {key: WithColours(layer, generator) for key, layer in snapshot.layers.items()}
    return dataclasses.replace(snapshot, layers=layers)


@in_a_browser
def test_colours_and_cosines_are_shown_where_they_are_stored(
    watched: Watched, archive: Path, probe: ProbeBatch, tmp_path: Path
) -> None:
    snapshot = with_colours(load_snapshots(archive)[-1], torch.Generator().manual_seed(0))
    step = Step(step_facts(snapshot), layout_of(snapshot), blocks(snapshot))
    (tmp_path / "x.html").write_text(page_of_runs([Contents("x", images_of(probe), [step])]))
    page = watched.open(tmp_path / "x.html", "image=1&opacity=1&truth=false")
    attention: Any = snapshot.layer("student")
    gh, gw = attention.grid

    def middles() -> np.ndarray[Any, Any]:
        watched.settle()
        cells = pixels_of(canvas_of(page, "student"))
        height, width = cells.shape[:2]
        return cells[height // gh // 2 :: height // gh, width // gw // 2 :: width // gw].reshape(gh * gw, 3)

    page.get_by_role("button", name="PCA").click()
    np.testing.assert_array_equal(middles(), (attention.colors[1] * 255).round().numpy())
    page.get_by_role("button", name="Attention", exact=True).click()
    box = canvas_of(page, "student").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 2.5 / gw, box["y"] + box["height"] * 3.5 / gh)
    watched.settle()
    features = attention.features[1].half().float()
    expected = torch.nn.functional.cosine_similarity(features, features[3 * gw + 2][None])
    assert page.locator(".ticks").inner_text().split()[0] == "-1"
    for patch in (0, 17, 40):
        x, y = patch % gw + 0.5, patch // gw + 0.5
        page.mouse.move(box["x"] + box["width"] * x / gw, box["y"] + box["height"] * y / gh)
        watched.settle()
        told = page.locator(".patch .hint", has_text="cosine").inner_text()
        assert float(re.search(r"student (-?[\d.e-]+)", told)[1]) == pytest.approx(float(expected[patch]), abs=0.006)
    page.keyboard.press("Escape")
    watched.settle()
    assert page.locator(".ticks").inner_text().split()[0] == "0.5"


@in_a_browser
def test_nothing_that_names_say_becomes_a_part_of_the_page(watched: Watched, archive: Path, tmp_path: Path) -> None:
    """Names of runs, models and layers that are HTML, and a NaN, which is shown as missing."""
    evil = '<img src=x onerror="document.title=1">]]></script><script>document.title="2"</script><!--'
    snapshot = load_snapshots(archive)[-1]
    for attention in snapshot.layers.values():
        object.__setattr__(attention, "model", evil)
        object.__setattr__(attention, "name", evil)
        attention.rows[0, 1] = math.nan
    folder = tmp_path / "x" / "attn_monitor"
    ProbeBatch.load(archive / "probe.npz").save(folder / "probe.npz")
    object.__setattr__(snapshot, "metrics", type(snapshot.metrics)())
    snapshot.save(snapshot_path(folder, snapshot.step))
    page_file = tmp_path / "x.html"
    page_file.write_text(report_page([(evil, folder)]))
    page = watched.open(page_file, "head=1")
    assert page.locator("#title").inner_text() == evil
    assert page.title() == "Attention"
    assert page.locator("script").count() == 3
    assert page.locator("img[src=x]").count() == 0
    assert "missing: NaN" in canvas_of(page, "student", "figure figcaption").inner_text()
    assert page.locator(".detail").first.inner_text() == evil


@in_a_browser
def test_its_policy_forbids_scripts_and_requests(file: Path, browser: Watched) -> None:
    page = browser.open(file)
    tried = page.evaluate(
        """async () => {
            const script = document.createElement('script');
            script.textContent = 'document.body.dataset.evil = 1';
            document.body.append(script);
            const asked = await fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused');
            return [document.body.dataset.evil ?? null, asked];
        }"""
    )
    assert tried == [None, "refused"]
    assert any("Content Security Policy" in text for text in browser.wrong)
    assert [url for url in browser.asked if url.startswith("http")] == []


def written(folder: Path, layers_at: dict[int, dict[tuple[str, int], LayerAttention]]) -> Path:
    """The report of a run with these layers at each step."""
    ProbeBatch(torch.rand(2, 3, 32, 32)).save(folder / "probe.npz")
    for step, layers in layers_at.items():
        AttentionSnapshot(step, 0, ("image0", "image1"), layers).save(snapshot_path(folder, step))
    page = folder / "report.html"
    page.write_text(report_page([("run", folder)]))
    return page


def rows_of(layer: int, heads: int = 2, grid: tuple[int, int] = (4, 4), prefix: int = 1, **more: Any) -> LayerAttention:
    rows = torch.randn(2, heads, prefix + grid[0] * grid[1], generator=torch.Generator().manual_seed(layer)).softmax(-1)
    return LayerAttention(layer, f"blocks.{layer}", rows, prefix, grid, False, 0.0, **more)


@in_a_browser
def test_it_plays_over_steps_at_which_other_layers_were_recorded(watched: Watched, tmp_path: Path) -> None:
    page = watched.open(written(tmp_path, {0: {("student", 3): rows_of(3)}, 10: {("student", 5): rows_of(5)}}))
    page.get_by_role("button", name="play").click()
    page.wait_for_function("() => document.querySelector('output.step').textContent === 'step 10'")
    page.get_by_role("button", name="play").wait_for()
    page.get_by_text("only layer 5 was recorded").wait_for()
    page = watched.open(written(tmp_path, {20: {("student", 3): rows_of(3), ("teacher", 5): rows_of(5)}}))
    assert page.get_by_text("5 of teacher").is_visible()


@in_a_browser
def test_of_two_runs_one_layer_is_compared_or_said_to_be_another(watched: Watched, tmp_path: Path) -> None:
    """A has layers 1 to 3, B 1, 3 and 5: B's last one is not taken for A's last one."""
    for name, layers in (("a", (1, 2, 3)), ("b", (1, 3, 5))):
        (tmp_path / name).mkdir()
        written(tmp_path / name, {0: {("student", layer): rows_of(layer) for layer in layers}})
    (tmp_path / "b" / "probe.npz").write_bytes((tmp_path / "a" / "probe.npz").read_bytes())
    snapshot_path(tmp_path / "b", 1).write_bytes(b"no zip")
    file = tmp_path / "both.html"
    with pytest.raises(ArchiveError, match=r"/b: step-000000001\.npz"):
        report(str(tmp_path / "a"), str(tmp_path / "b"), out=str(file))
    for layer, told in ((3, ["step 0", "step 0"]), (2, ["step 0, layer 2", "step 0, layer 5"])):
        page = watched.open(file, f"layer={layer}", width=400)
        assert page.locator(".detail").all_inner_texts() == told
        assert page.locator("#note").inner_text().startswith("B: Left out: step-000000001.npz")
        captions = page.locator("figcaption").all_inner_texts()
        assert (captions[0] == captions[1]) == (layer == 3)


@in_a_browser
def test_one_place_in_grids_of_two_sizes(watched: Watched, tmp_path: Path) -> None:
    """The cursor on a teacher's patch is, in a student of larger patches, the patch at the same place."""
    grids = {"student": (2, 2), "teacher": (4, 4)}
    layers = {(role, 1): rows_of(1, heads, grids[role]) for role, heads in (("student", 1), ("teacher", 3))}
    page = watched.open(written(tmp_path, {0: layers}))
    box = canvas_of(page, "teacher").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.35)
    watched.settle()
    assert page.locator(".patch h3").inner_text() == "Patch 0, 1"
    told = [float(text.rstrip("×")) for text in page.locator(".bars .number").all_inner_texts()[:2]]
    maps = [layers[role, 1].maps[0].half().float().mean(0) for role in grids]
    np.testing.assert_allclose(told, [4 * maps[0][0, 1], 16 * maps[1][1, 2]], rtol=0.01, atol=0.006)
    assert page.locator("section[aria-label=student] .heads button:visible").count() == 1
    absent = page.locator("section[aria-label=student] .heads button").last
    assert absent.get_attribute("aria-label") == "student, head 2: there is no head 2"


@in_a_browser
def test_what_is_unknown_is_not_said(watched: Watched, tmp_path: Path) -> None:
    """Prefix tokens of a model without CLS have no names; signed weights have neither entropy nor mask."""
    signed = rows_of(2, prefix=2, kind="signed", query="mean")
    signed.rows.sub_(0.1)
    layers = {("one", 2): signed, ("another", 2): rows_of(2, prefix=2, prefix_names=("CLS", "register 1"))}
    page = watched.open(written(tmp_path, {0: layers}))
    assert page.locator("figcaption").first.inner_text().split() == ["mean", "entropy", "–", "mask", "–", "peak", "–"]
    labels = page.locator(".tokens .label").all_inner_texts()
    assert labels == ["one token 0", "one token 1", "another CLS", "another register 1"]
    colour = "dots => dots.map(dot => getComputedStyle(dot).backgroundColor)"
    assert len(set(page.locator(".column .dot").evaluate_all(colour))) == 2
    assert page.locator("#summary").inner_text() == "1 snapshot, step 0"


@in_a_browser
def test_a_link_that_is_pasted_into_the_open_page_is_believed_as_little(
    watched: Watched, file: Path, probe: ProbeBatch
) -> None:
    page = watched.open(file)
    page.evaluate("location.hash = 'image=99&head=-7&pin=2.5&step=10'")
    page.locator("output.step", has_text="step 10").wait_for()
    watched.settle()
    assert page.get_by_label("Head", exact=True).input_value() == "-1"
    assert page.locator(".thumbnail[aria-pressed=true]").get_attribute("aria-label") == probe.names[-1]
    assert page.locator(".patch h3").inner_text() == "Patch 0, 2"


def made_up_run(folder: Path, steps: int) -> None:
    """Snapshots of 8 images, two roles, 12 heads and 14 x 14 patches; random, which compresses worst."""
    generator = torch.Generator().manual_seed(0)
    ProbeBatch(torch.randn(8, 3, 224, 224, generator=generator)).save(folder / "probe.npz")
    for step in range(steps):
        rows = (2 * torch.randn(2, 8, 12, 197, generator=generator)).softmax(-1)
        layers = {
            (role, 11): LayerAttention(11, "blocks.11", rows[i], 1, (14, 14), False, 0.0)
            for i, role in enumerate(("student", "teacher"))
        }
        AttentionSnapshot(step, 0, tuple(f"image{i}" for i in range(8)), layers).save(snapshot_path(folder, step))


def manifest_of(page: str) -> dict[str, Any]:
    found = re.search(r'id="manifest">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    result: dict[str, Any] = json.loads(found[1])
    return result


def test_fifty_snapshots_fit_and_more_are_thinned_with_a_note(tmp_path: Path) -> None:
    assert code_size() < 200_000
    made_up_run(tmp_path, 50)
    page = report_page([("run", tmp_path)])
    assert len(page.encode()) < FILE_BYTES == 8_000_000
    (run,) = manifest_of(page)["runs"]
    assert (len(run["steps"]), run["note"]) == (50, "")
    embedded = report_page([("run", tmp_path)], limit=EMBED_BYTES)
    assert len(embedded.encode()) < EMBED_BYTES == 4_000_000
    (run,) = manifest_of(embedded)["runs"]
    steps = [step["step"] for step in run["steps"]]
    assert len(steps) > 25
    assert (steps[0], steps[-1]) == (0, 49)
    assert run["note"] == f"{len(steps)} of 50 snapshots, evenly spaced, so that the file stays small"


def test_a_broken_snapshot_is_left_out_by_name(archive: Path, tmp_path: Path) -> None:
    for path in archive.glob("*.npz"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    snapshot_path(tmp_path, 10).write_bytes(b"no zip")
    (run,) = manifest_of(report_page([("run", tmp_path)]))["runs"]
    assert [step["step"] for step in run["steps"]] == [0, 30, 100]
    assert "step-000000010.npz" in run["note"]
    assert str(tmp_path) not in run["note"], "a page is handed on"
    with pytest.raises(SystemExit, match=r"report\.html is without .*: step-000000010\.npz"):
        main(["report", str(tmp_path), "--out", str(tmp_path / "report.html")])
    assert (tmp_path / "report.html").exists()


def test_a_report_has_any_name_that_a_file_may_have(archive: Path, tmp_path: Path) -> None:
    longest = tmp_path / ("日" * 83 + ".html")  # 254 bytes
    report(str(archive), out=str(longest))
    assert [path.name for path in tmp_path.iterdir()] == [longest.name]
    with pytest.raises(IsADirectoryError, match="is a folder, expected the file to write"):
        report(str(archive), out=str(tmp_path))


def test_a_name_that_is_no_text_is_written(archive: Path) -> None:
    page = report_page([("run \udcff", archive)])
    assert manifest_of(page.encode().decode())["runs"][0]["name"] == "run ?"
