"""The documents hang together: links lead somewhere, every page is in the site, every public name in the reference."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml

import attn_monitor
from attn_monitor import offline
from hatch_build import for_an_index
from tests.support.documents import DOCUMENTS, RECIPES, ROOT, prose

PAGES = [*DOCUMENTS, *RECIPES, *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"))]
LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """What GitHub and MkDocs make of headings; the API's entries have their names."""
    text = prose(page)
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    slugs = {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}
    return slugs | set(re.findall(r"^::: (\S+)$", text, re.M))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for match in LINK.finditer(prose(page)):
        path, _, anchor = match["target"].partition("#")
        if re.match(r"https?:", path):
            continue
        target = Path(os.path.normpath(page.parent / path)) if path else page
        assert target.exists(), f"{match[0]} leads nowhere"
        assert target.is_relative_to(ROOT)
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{match[0]}: {target.name} has no such heading"


def test_every_page_is_in_the_site_once() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    listed = re.findall(r": (\S+\.md)$", text[text.index("\nnav:") :], re.M)
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    copied = {name for name in listed if name.startswith("repository/")}
    assert sorted(listed) == sorted(pages | copied)
    assert all((ROOT / name.removeprefix("repository/")).is_file() for name in copied)


def test_every_public_name_is_in_the_reference() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    shown = set(re.findall(r"^::: (\S+)$|\]\(arguments\.md#(\S+)\)$", text, re.M))
    names = {first or second for first, second in shown}
    public = {f"attn_monitor.{name}" for name in attn_monitor.__all__ if not name.startswith("__")}
    public |= {f"attn_monitor.offline.{name}" for name in offline.__all__}
    assert names == public | {"attn_monitor.hugging_face.AttentionMapTrainerCallback"}


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == attn_monitor.__version__
    assert f"## [{attn_monitor.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_gallery_shows_the_runs_that_are_made_and_stays_small() -> None:
    page, folder = (ROOT / "docs" / "gallery.md").read_text(), ROOT / "docs" / "gallery"
    made = re.findall(r'^    "([a-z-]+)": Run\(', (ROOT / "docs" / "make_gallery.py").read_text(), re.M)
    assert sorted(re.findall(r"make_gallery\.py ([a-z-]+)`", page)) == sorted(made)
    assert {file.stem for file in folder.glob("*.jpg")} == {*made}
    assert all(file.stat().st_size < 150_000 for file in folder.glob("*.jpg"))
    reports = list(folder.glob("*.html"))
    assert len(reports) <= 3
    assert all(file.stat().st_size < 400_000 and f"(gallery/{file.name})" in page for file in reports)


def test_the_conda_recipe_is_that_of_the_project() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    recipe = yaml.safe_load((ROOT / "conda" / "recipe.yaml").read_text())
    assert recipe["package"]["version"] == attn_monitor.__version__
    dependencies = re.search(r"^dependencies = \[(.+?)^\]", project, re.M | re.S)
    assert dependencies is not None
    needed = {name.replace("torch", "pytorch") for name in re.findall(r'"(.+?)"', dependencies[1])}
    needed |= {f"python{wanted}" for wanted in re.findall(r'^requires-python = "(.+)"$', project, re.M)}
    assert {name.replace(" ", "") for name in recipe["requirements"]["run"]} == needed
    assert '"' + recipe["requirements"]["host"][1].replace(" ", "") + '"' in project  # hatchling
    for command in recipe["build"]["python"]["entry_points"]:
        assert command.replace(" = ", ' = "') in project
    assert recipe["about"]["summary"] in project


def test_nothing_is_promised_to_be_on_an_index() -> None:
    """Until there is a release, one installs from the repository."""
    for page in PAGES:
        assert not re.search(r"pip install [\"']?attn[_-]monitor", page.read_text()), page


def test_links_of_readme_lead_to_the_repository_on_an_index() -> None:
    text = "![a picture](docs/a.png) [page](docs/b.md#part) [far](https://example.org/x)"
    assert for_an_index(text, "https://example.org/me/it/") == (
        "![a picture](https://example.org/me/it/raw/HEAD/docs/a.png) "
        "[page](https://example.org/me/it/blob/HEAD/docs/b.md#part) [far](https://example.org/x)"
    )
    assert for_an_index(text, None) == " page [far](https://example.org/x)"
    assert "](docs/" in (ROOT / "README.md").read_text()
    assert "](docs/" not in for_an_index((ROOT / "README.md").read_text(), None)
