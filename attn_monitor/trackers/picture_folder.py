"""Write the latest pictures as files for runs without a logger; the archive beside them holds the numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attn_monitor.record.file_names import file_name
from attn_monitor.trackers.events import Picture
from attn_monitor.trackers.tracker import Tracker


class PictureFolder(Tracker):
    """Write pictures to a folder of JPEG files."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.methods = {Picture: self._picture}

    @classmethod
    def accepts(cls, logger: Any) -> bool:
        """Accept no logger, as this tracker is for runs without one."""
        return False

    @property
    def label(self) -> str:
        """Return the name in messages."""
        return "PictureFolder"

    @property
    def media_folder(self) -> Path:
        """Return the folder itself."""
        return Path(self.logger)

    def _picture(self, picture: Picture, step: int) -> None:
        """Overwrite the picture of the step before."""
        self.media_folder.mkdir(parents=True, exist_ok=True)
        (self.media_folder / file_name(picture.tag.replace("/", "-"), ".jpg")).write_bytes(picture.jpeg)
