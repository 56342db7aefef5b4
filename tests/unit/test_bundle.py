"""Modules become one script in the order of their own imports, and what cannot be bundled is named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from attn_monitor.player.bundle import bundle
from attn_monitor.player.page import WEB
from tests.support.browser import CHROMIUM, browsing


def modules(folder: Path, **sources: str) -> Path:
    """Write modules, and return the path of `main.js`."""
    for name, source in sources.items():
        (folder / f"{name}.js").write_text(source)
    return folder / "main.js"


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_modules_run_after_those_that_they_import_and_keep_their_names(tmp_path: Path) -> None:
    """Two modules have a private name in common, one imports over several lines, and one is imported twice."""
    entry = modules(
        tmp_path,
        a='import { last } from "./z.js";\nconst secret = 1;\nexport const first = last + secret;\n',
        z="const secret = 10;\nexport class Kept {}\nexport const last = secret;\nexport async function later() {}\n",
        main='import { first } from "./a.js";\nimport {\n  Kept,\n  last,\n} from "./z.js";\n'
        "window.found = [first, last, typeof Kept, typeof secret];\n",
    )
    with browsing() as watched:
        watched.page.goto("about:blank")
        watched.page.add_script_tag(content=bundle(entry), type="module")
        assert watched.page.evaluate("window.found") == [11, 10, "function", "undefined"]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (
            {"main": 'import { a } from "./a.js";\n', "a": 'import { b } from "./b.js";\nexport const a = 1;\n'}
            | {"b": 'import { a } from "./a.js";\nexport const b = 1;\n'},
            "cycle: (a -> b -> a|b -> a -> b)",
        ),
        ({"main": 'import { b, c } from "./a.js";\n', "a": "export const c = 1;\n"}, "main.js imports b, which a.js"),
        ({"main": "export const a = 1;\nexport function a() {}\n"}, "main.js exports a twice"),
        ({"main": 'import a from "./a.js";\n'}, "main.js: expected .* got: import a from"),
        ({"main": "export default 1;\n"}, "main.js: expected .* got: export default 1;"),
        ({"main": "export let a = 1;\n"}, "main.js: expected .* got: export let a = 1;"),
    ],
)
def test_what_cannot_be_bundled_is_named(tmp_path: Path, sources: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bundle(modules(tmp_path, **sources))


def test_a_module_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape("a.js")):
        bundle(modules(tmp_path, main='import { a } from "./a.js";\n'))


def test_the_page_has_every_module() -> None:
    script = bundle(WEB / "main.js")
    assert {path.stem for path in WEB.glob("*.js")} == set(re.findall(r"^const \$(\w+) = ", script, re.MULTILINE))
