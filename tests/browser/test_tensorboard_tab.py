"""The tab "Attention" in a real TensorBoard: the player, live, on archives below the log directory alone."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import re
import sys
import threading
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import torch
from tensorboard.plugins.base_plugin import TBContext
from werkzeug.serving import make_server
from werkzeug.wrappers import Response

from attn_monitor import AttentionSnapshot, load_snapshots
from attn_monitor.player.server import Library
from attn_monitor.record.archive import snapshot_path
from attn_monitor_tensorboard import Archives, AttentionPlugin
from tests.support.browser import CHROMIUM, browsing
from tests.support.processes import free_port
from tests.support.runs import write_run
from tests.support.servers import serving

ROOT = Path(__file__).parent.parent.parent
HOSTILE = '<img src=x onerror="document.title=1">'

pytestmark = pytest.mark.slow


def installed(folder: Path) -> dict[str, str]:
    """An environment in which TensorBoard finds the plugin, also where the package was installed before it had one."""
    paths = [str(ROOT)]
    if not any(e.name == "attention" for e in importlib.metadata.entry_points(group="tensorboard_plugins")):
        facts = folder / "attention-0.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: attention\nVersion: 0\n")
        (facts / "entry_points.txt").write_text(
            "[tensorboard_plugins]\nattention = attn_monitor_tensorboard:AttentionPlugin\n"
        )
        paths.append(str(folder))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}


@pytest.fixture(scope="module")
def logdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, of which one has a name that is HTML; links to an archive and to files outside; a superseded one."""
    outside, root = tmp_path_factory.mktemp("outside"), tmp_path_factory.mktemp("logs")
    torch.manual_seed(0)
    sharp = {"steps": (0, 10, 20), "sharpness": (1, 3, 5)}
    write_run(outside / "secret", **sharp)
    write_run(root / "first" / "attn_monitor", layers="all", **sharp)
    write_run(root / HOSTILE / "attn_monitor", **sharp)
    (root / "linked").symlink_to(outside / "secret")
    (root / "files").mkdir()
    for path in (outside / "secret").iterdir():
        (root / "files" / path.name).symlink_to(path)
    write_run(root / "first" / "attn_monitor" / "superseded-1", **sharp)
    return root


@pytest.fixture(scope="module")
def address(logdir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the plugin in a TensorBoard on a free loopback port."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(logdir),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    plugin = f"http://127.0.0.1:{port}/data/plugin/attention"
    with serving(command, f"{plugin}/runs", folder, text=b"first", env=installed(folder)):
        yield plugin


def ask(address: str, method: str = "GET") -> tuple[int, Any, bytes]:
    """Status, headers and body."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method=method), timeout=30) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def test_answers_are_what_the_archive_holds(address: str, logdir: Path) -> None:
    assert set(json.loads(ask(f"{address}/runs")[2])["runs"]) == {HOSTILE, "first"}
    status, headers, body = ask(f"{address}/run?run=first")
    run = json.loads(body)
    assert (status, headers.get_content_type()) == (200, "application/json")
    assert [step["step"] for step in run["steps"]] == [0, 10, 20]
    later = json.loads(ask(f"{address}/run?run=first&after=10&generation={run['generation']}")[2])
    assert [step["step"] for step in later["steps"]] == [20]
    assert "images" not in later
    status, headers, body = ask(f"{address}/block?run=first&step=10&layer=1")
    assert (status, headers.get_content_type()) == (200, "application/octet-stream")
    numbers, count = np.frombuffer(zlib.decompress(body), np.uint8), 2 * 2 * 4 * 17
    rows = np.ascontiguousarray(numbers[: 2 * count].reshape(2, -1).T).view("<f2").reshape(2, 2, 4, 17)
    snapshot = load_snapshots(logdir / "first" / "attn_monitor")[1]
    expected = [snapshot.rows(role, 1).half().numpy() for role in snapshot.roles]
    np.testing.assert_array_equal(rows, expected)
    colours = [(255 * snapshot.layer(role, 1).colors).round().byte().numpy() for role in snapshot.roles]
    np.testing.assert_array_equal(numbers[2 * count :].reshape(2, 2, 16, 3), colours)


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("run?run=../outside", 404),
        ("run?run=/etc", 404),
        ("run?run=%2e%2e%2f%2e%2e%2fetc", 404),
        ("run?run=first%00", 404),
        ("run?run=first/attn_monitor/superseded-1", 404),
        ("run?run=linked", 404),
        ("run?run=files", 404),
        ("run", 404),
        ("run?run=first&after=x", 400),
        ("block?run=files&step=0&layer=1", 404),
        ("block?run=first&step=../0&layer=1", 400),
        ("block?run=first&step=5&layer=1", 404),
        ("block?run=first&step=10&layer=77", 404),
        ("block?run=first&step=10&layer=" + "9" * 400, 400),
        (f"run?run={quote('<script>alert(1)</script>')}", 404),
        ("../../../../etc/passwd", 404),
    ],
)
def test_nothing_outside_the_log_directory_and_nothing_repeated(address: str, query: str, status: int) -> None:
    found, headers, body = ask(f"{address}/{query}")
    assert found == status
    assert b"<script" not in body
    assert b"root:" not in body
    if "/attention/.." not in f"{address}/{query}":
        assert headers.get_content_type() == "text/plain"
        assert headers["X-Content-Type-Options"] == "nosniff"


def test_headers_are_strict(address: str) -> None:
    for path, kind in {"page": "text/html", "index.js": "text/javascript", "runs": "application/json"}.items():
        status, headers, _ = ask(f"{address}/{path}")
        assert (status, headers.get_content_type()) == (200, kind)
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
    assert ask(f"{address}/runs", "POST")[0] == 405


def test_the_tab_is_absent_where_there_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "step-1.npz").touch()
    for root in (str(tmp_path), str(tmp_path / "none"), None):
        assert not AttentionPlugin(TBContext(logdir=root)).is_active()
    write_run(tmp_path / "attn_monitor", (0,), sharpness=(1,))
    assert Archives(str(tmp_path)).found() == {"attn_monitor": tmp_path / "attn_monitor"}
    for folder in ("run", "run/attn_monitor"):
        write_run(tmp_path / folder, (0,), sharpness=(1,))
    assert {"run", "run/attn_monitor"} < set(Archives(str(tmp_path)).found()), "each by a name of its own"
    assert AttentionPlugin(TBContext(logdir=str(tmp_path))).is_active()


def test_steps_that_come_in_between_are_told(tmp_path: Path) -> None:
    """As `backfill` fills an archive; a pipe among them is not waited for."""
    (first, last) = write_run(tmp_path / "run", (0, 20), sharpness=(1, 3))
    os.mkfifo(snapshot_path(tmp_path / "run", 5))
    library = Library(Archives(str(tmp_path)).found)
    told = library.run("run", -1, "")
    assert [step["step"] for step in told["steps"]] == [0, 20]
    later(last, 30, tmp_path / "run")
    news = library.run("run", 20, told["generation"])
    assert [step["step"] for step in news["steps"]] == [30]
    later(first, 10, tmp_path / "run")
    news = library.run("run", 30, told["generation"])
    assert [step["step"] for step in news["steps"]] == [0, 10, 20, 30], "all anew"


@pytest.fixture
def framed(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A log directory, and a page of another origin that shows the tab in a frame, as notebooks do."""
    apps = AttentionPlugin(TBContext(logdir=str(tmp_path))).get_plugin_apps()

    def tab(environ: dict[str, Any], start: Any) -> Any:
        return apps.get(environ["PATH_INFO"], Response("", 404))(environ, start)

    inner = make_server("127.0.0.1", 0, tab, threaded=True)
    html = f'<iframe width="1000" height="600" src="http://127.0.0.1:{inner.port}/page"></iframe>'
    frame = Response(html, content_type="text/html")
    outer = make_server("127.0.0.1", 0, frame)
    for server in (inner, outer):
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield tmp_path, f"http://127.0.0.1:{outer.port}/"
    for server in (inner, outer):
        server.shutdown()
        server.server_close()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_one_damaged_run_leaves_the_others_in_a_notebooks_frame(framed: tuple[Path, str]) -> None:
    root, address = framed
    name = "a%2F\"b'&run=c #d"
    for run in (name, "without-probe"):
        write_run(root / run, (0, 10), sharpness=(1, 3))
    (root / "without-probe" / "probe.npz").unlink()
    with browsing() as watched:
        watched.page.route(re.compile(r"/block\?.*step=0&"), lambda route: route.abort())
        watched.page.goto(address)
        frame = watched.page.frame_locator("iframe")
        frame.locator("body[data-ready]").wait_for()
        assert frame.get_by_label("run", exact=True).input_value() == name
        selects, summary = (frame.locator(part).bounding_box() for part in ("#runs", "#summary"))
        assert selects["x"] + selects["width"] <= summary["x"], "they stand beside each other"
        frame.get_by_role("button", name="one step back").click()
        frame.locator("figure.stale").first.wait_for()  # what cannot be fetched is not shown as the step before
        frame.get_by_role("button", name="Runs").click()
        frame.locator(".run-list tbody tr").first.wait_for()
        rows = frame.locator(".run-list tbody tr").all()
        assert [row.locator("th, td").all_text_contents()[:2] for row in rows] == [[name, "10"]]
        assert frame.locator(".of-runs path").count() >= 2, "its curves"


def later(snapshot: AttentionSnapshot, step: int, folder: Path) -> None:
    dataclasses.replace(snapshot, step=step).save(snapshot_path(folder, step))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_tab_plays_runs_while_they_train(address: str, logdir: Path) -> None:
    """In TensorBoard itself: the newest step as it comes, another run, two compared; only what is shown is fetched."""
    folder, server = logdir / "first" / "attn_monitor", address.partition("/data")[0]
    snapshots = load_snapshots(folder)
    with browsing() as watched:
        page = watched.page
        page.goto(f"{server}/#attention")
        page.frame_locator("iframe").first.frame_locator("iframe").locator("body[data-ready]").wait_for(timeout=60_000)
        frame = page.frame_locator("iframe").first.frame_locator("iframe")
        runs = frame.get_by_label("run", exact=True)
        assert runs.input_value() == "first"
        assert frame.locator("output.step").inner_text() == "step 20"
        later(snapshots[-1], 30, folder)
        frame.locator("output.step", has_text="step 30").wait_for()
        frame.get_by_role("button", name="one step back").click()
        later(snapshots[-1], 40, folder)
        frame.get_by_text("4 of 5, ").or_(frame.get_by_text("3 of 5, ")).first.wait_for()
        assert frame.locator("output.step").inner_text() == "step 20", "what is looked at stays"
        asked = [url for url in watched.asked if "/block?" in url]
        assert all("layer=1" in url and "run=first" in url for url in asked)
        assert len(asked) == len(set(asked)), "each once"
        frame.get_by_label("compare with").select_option(HOSTILE)
        frame.get_by_role("button", name="Swipe").wait_for()
        runs.select_option(HOSTILE)
        frame.locator("#summary", has_text="3 snapshots").wait_for()
        assert page.title() == "TensorBoard"
        assert frame.locator("img[src=x]").count() == 0
        mine = [url for url in watched.asked if "plugin/attention" in url]
        assert mine
        assert all(url.startswith(server) for url in mine)
        page.goto(f"{address}/page#run=first&step=10&layer=0")
        page.wait_for_selector("body[data-ready]")
        assert page.locator("output.step").inner_text() == "step 10"
        assert not watched.wrong
