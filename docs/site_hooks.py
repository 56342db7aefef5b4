"""For MkDocs: links to files of the repository outside `docs` lead to copies of them in the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?P<before>\]\()(?P<target>[^)#\s]+)")
COPIES = "repository"  # where they are in the site


def on_files(files: Any, config: Any) -> Any:
    """Add what pages link to: programs, settings, and the pages at the top of the repository."""
    examples = [*ROOT.glob("examples/*.py"), *ROOT.glob("examples/notebooks/*.ipynb")]
    top = ["CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE"]
    for path in [ROOT / name for name in top] + [*examples, *ROOT.glob("configs/*.yaml")]:
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, f"{COPIES}/{name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn each link that leaves `docs` into one to the copy, and in the copies those into `docs` back."""
    uri = Path(page.file.src_uri)
    copied = uri.parts[0] == COPIES
    here = Path(*uri.parts[1:-1]) if copied else Path("docs", *uri.parts[:-1])  # the folder in the repository
    up = "../" * (len(uri.parts) - 1)

    def replaced(match: re.Match[str]) -> str:
        target = match["target"]
        if ":" in target or not (copied or target.startswith("..")):
            return match[0]
        parts: list[str] = []
        for part in (*here.parts, *Path(target).parts):
            parts = parts[:-1] if part == ".." else [*parts, part]
        inside = parts[:1] == ["docs"]
        return match["before"] + up + "/".join(parts[1:] if inside else [COPIES, *parts])

    return LINK.sub(replaced, markdown)
