"""The leaderboard's page: a click on a title sorts, and nothing outside is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from attn_monitor.commands.support.leaderboard_page import leaderboard_page
from tests.support.browser import CHROMIUM, browsing

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


def test_a_click_sorts_numbers_texts_and_what_is_missing(tmp_path: Path) -> None:
    rows = [("b", "1,000", "0.5", "fine"), ("a", "90", "", "collapsed"), ("c", "200", "0.07", "decaying")]
    curves = {"knn_accuracy": {"b": [(0, 0.1), (1000, 0.5)], "c": [(0, 0.07)]}}
    file = tmp_path / "page.html"
    file.write_text(leaderboard_page(("run", "last step", "knn_accuracy", "verdict"), rows, curves, "A note."))
    with browsing() as watched:
        page = watched.page
        page.goto(file.as_uri())

        def order(title: str) -> str:
            page.get_by_role("button", name=title, exact=True).click()
            return "".join(row.inner_text().strip()[0] for row in page.locator("tbody tr").all())

        assert [order("last step"), order("last step")] == ["bca", "acb"]
        assert page.locator("th[aria-sort=ascending]").inner_text().startswith("last step")
        assert [order("knn_accuracy"), order("knn_accuracy")] == ["bca", "cba"], "what is missing comes last"
        assert [order("verdict"), order("run")] == ["bca", "cba"]
        watched.check()
