"""For hatchling: README as package indexes show it, where a link to a file beside it leads nowhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")


def for_an_index(readme: str, repository: str | None) -> str:
    """Return README with links to files made absolute.

    Args:
        readme: Its Markdown, with links to files relative to the repository.
        repository: The repository's address, such as https://github.com/OWNER/NAME. Without one a link is left as
            its words, and a picture is left out.
    """

    def replaced(link: re.Match[str]) -> str:
        picture, text, target = link.group("picture", "text", "target")
        if re.match(r"[a-z]+:", target):
            return link[0]
        if repository is None:
            return "" if picture else text
        return f"{picture}[{text}]({repository.rstrip('/')}/{'raw' if picture else 'blob'}/HEAD/{target})"

    return _LINK.sub(replaced, readme)


def get_metadata_hook() -> Any:
    """Return the hook; hatchling looks for a function of this name."""
    from hatchling.metadata.plugin.interface import MetadataHookInterface

    class Readme(MetadataHookInterface):
        """Set the description of the package, with the address under project.urls."""

        def update(self, metadata: dict[str, Any]) -> None:
            text = Path(self.root, "README.md").read_text(encoding="utf-8")
            shown = for_an_index(text, metadata.get("urls", {}).get("Repository"))
            metadata["readme"] = {"content-type": "text/markdown", "text": shown}

    return Readme
