"""Log to Lightning's MLflow logger. Pictures and flags are artifacts of the run, its verdict is a tag."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from attn_monitor.trackers.events import Alert, Animation, Page, Picture, Scalars, Text
from attn_monitor.trackers.tracker import Tracker, is_lightning


class MLflow(Tracker):
    """Log to a run on a tracking server or in a local folder."""

    def __init__(self, logger: Any) -> None:
        super().__init__(logger)
        self.methods = {
            Scalars: self._scalars,
            Picture: self._picture,
            Animation: self._animation,
            Page: lambda page, step: self._file(page.content, f"{page.tag}.html"),
            Text: self._tag,
            Alert: lambda alert, step: self._file(alert.content, f"{alert.tag}/step-{step:09d}.txt"),
        }

    @classmethod
    def accepts(cls, logger: Any) -> bool:
        """Accept MLFlowLogger."""
        return is_lightning(logger, "MLFlowLogger")

    @property
    def run_folder(self) -> Path | None:
        """Return the folder of the run's artifacts, None if they are not local files."""
        address = urlsplit(self.logger.experiment.get_run(self.logger.run_id).info.artifact_uri)
        return Path(url2pathname(address.path)) if address.scheme in ("", "file") else None

    def _scalars(self, scalars: Scalars, step: int) -> None:
        """Log through Lightning's method, which cuts out what MLflow forbids in a name, and warns."""
        self.logger.log_metrics({_key(tag): value for tag, value in scalars.content.items()}, step=step)

    def _picture(self, picture: Picture, step: int) -> None:
        self.logger.experiment.log_image(self.logger.run_id, picture.content, key=_key(picture.tag), step=step)

    def _animation(self, animation: Animation, step: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{animation.tag.replace('/', '_')}.gif"
            path.write_bytes(animation.content)
            self.logger.experiment.log_artifact(self.logger.run_id, str(path))

    def _tag(self, text: Text, step: int) -> None:
        """Make a line on the whole run a tag, a column of the table of runs; flags come as alerts."""
        if text.sums_up:
            self.logger.experiment.set_tag(self.logger.run_id, _key(text.tag), text.content)

    def _file(self, text: str, path: str) -> None:
        self.logger.experiment.log_text(self.logger.run_id, text, path)


def _key(tag: str) -> str:
    """Spell a tag in MLflow's letters, which are ASCII's; Punycode keeps other names apart, and short."""
    parts = (part if part.isascii() else part.encode("punycode").decode() for part in tag.split("/"))
    return re.sub(r"[^\w ./-]", "_", "/".join(parts))
