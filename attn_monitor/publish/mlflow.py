"""MLflow: Lightning's logger. Pictures and flags are artifacts of the run."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from attn_monitor.measurements import HealthFlag
from attn_monitor.publish.sink import Picture, Sink, is_lightning
from attn_monitor.publish.tags import renamed


class MLFlowSink(Sink):
    """A run on a tracking server or in a local folder."""

    @classmethod
    def accepts(cls, logger: Any) -> bool:
        """MLFlowLogger."""
        return is_lightning(logger, "MLFlowLogger")

    @property
    def run_folder(self) -> Path | None:
        """That of its artifacts, where they are local files."""
        address = urlsplit(self.logger.experiment.get_run(self.logger.run_id).info.artifact_uri)
        return Path(url2pathname(address.path)) if address.scheme in ("", "file") else None

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """As Lightning does, which replaces what MLflow does not take in names."""
        self.logger.log_metrics(dict(metrics), step=step)

    def log_pictures(self, pictures: Sequence[Picture], step: int) -> None:
        """As images by step."""
        for picture in pictures:
            key = re.sub(r"[^\w ./-]", "_", picture.tag)
            self.logger.experiment.log_image(self.logger.run_id, picture.pixels, key=key, step=step)

    def log_flags(self, flags: Sequence[HealthFlag], step: int) -> None:
        """As a text file."""
        text = "\n".join(f"- {flag}" for flag in flags)
        path = renamed(f"attn_health/step-{step:09d}.txt", self.name)
        self.logger.experiment.log_text(self.logger.run_id, text, path)

    def log_animation(self, tag: str, gif: bytes, step: int) -> None:
        """As a file."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{tag.replace('/', '_')}.gif"
            path.write_bytes(gif)
            self.logger.experiment.log_artifact(self.logger.run_id, str(path))

    def log_report(self, tag: str, page: str, step: int) -> None:
        """As a file."""
        self.logger.experiment.log_text(self.logger.run_id, page, f"{tag}.html")
