"""The latest pictures as files, for runs without any logger; numbers are in the archive beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attn_monitor.publish.sink import Picture, Sink
from attn_monitor.record.file_names import file_name


class PictureFolder(Sink):
    """A folder of JPEG files."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder

    @classmethod
    def accepts(cls, logger: Any) -> bool:
        """No logger: it stands in where there is none."""
        return False

    @property
    def media_folder(self) -> Path:
        """The folder itself."""
        return self.folder

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """The archive has them."""

    def log_pictures(self, pictures: Sequence[Picture], step: int) -> None:
        """Each in place of the one of the step before."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            (self.folder / file_name(picture.tag.replace("/", "-"), ".jpg")).write_bytes(picture.jpeg)
