"""The list of runs: of `leaderboard`'s page and of TensorBoard's tab; it sorts, draws curves, and opens a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from attn_monitor.commands.cli import main
from tests.integration.test_leaderboard import FALLS, PEAKS, RISES, STEPS, archive
from tests.support.browser import CHROMIUM, Watched, browsing

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    runs: Sequence[Path] = [
        archive(folder / "rises", RISES, 0.5),
        archive(folder / "peaks<b>", PEAKS, 0.9, flagged=True),
        archive(folder / "falls", FALLS, None),
    ]
    main(["leaderboard", *map(str, runs), "--out", str(folder / "page.html")])
    return folder / "page.html"


@pytest.fixture
def watched() -> Iterator[Watched]:
    with browsing() as found:
        yield found
        found.check()


def test_a_list_of_runs_sorts_draws_and_opens_them(watched: Watched, file: Path) -> None:
    page = watched.open(file)
    rows = page.locator(".run-list tbody tr")

    def order(title: str) -> list[str]:
        page.locator(".run-list thead").get_by_role("button", name=title, exact=True).click()
        watched.settle()
        return [text.rpartition("/")[2] for text in rows.locator("th").all_inner_texts()]

    assert page.locator("main").is_hidden()
    assert order("knn accuracy") == ["rises", "peaks<b>", "falls"], "what is missing comes last"
    assert order("knn accuracy") == ["peaks<b>", "rises", "falls"]
    assert page.locator("th[aria-sort=ascending]").inner_text().startswith("knn accuracy")
    assert order("pick") == ["rises", "falls", "peaks<b>"]
    assert order("flags")[0] == "peaks<b>"
    assert "no verdict yet" in rows.first.inner_text()
    assert page.locator(".of-runs").count() == 3, "kNN accuracy, separability, entropy"
    lines = page.locator("figure[data-metric=dense_separability] path")
    assert lines.count() == 3
    assert {line.count("L") for line in lines.evaluate_all("lines => lines.map(l => l.getAttribute('d'))")} == {
        len(STEPS) - 1
    }
    page.get_by_label("add a metric").select_option("dense_spread")
    watched.settle()
    assert page.locator(".of-runs").count() == 4
    separability = [title.strip() for title in page.locator("thead th").all_inner_texts()].index("dense separability")
    peaks = rows.filter(has_text="peaks<b>")
    assert peaks.locator("> *").nth(separability).inner_text() == "2.50"
    page.get_by_label("values of").select_option("pick")
    watched.settle()
    assert peaks.locator("> *").nth(separability).inner_text() == "5.00"
    peaks.get_by_role("button", name="300").first.click()
    watched.settle()
    assert page.locator("output.step").inner_text() == "step 300", "the pick"
    assert page.get_by_label("run", exact=True).input_value().endswith("peaks<b>")
    page.get_by_label("compare with").select_option(index=1)
    watched.settle()
    assert page.locator(".column h2").all_inner_texts() == ["teacher · A", "teacher · B"]
    page.get_by_role("button", name="Runs").click()
    assert rows.count() == 3


def test_a_link_restores_the_list(watched: Watched, file: Path) -> None:
    page = watched.open(file, "by=-entropy&columns=entropy")
    assert page.locator("th[aria-sort=ascending]").inner_text().startswith("entropy")
    assert page.locator(".of-runs").count() == 1
    watched.open(file, "list=false&run=nobody&step=500")
    assert page.locator("output.step").inner_text() == "step 500"
