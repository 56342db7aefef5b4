"""Log to Aim, by its logger for Lightning or a run."""

from __future__ import annotations

from typing import Any

from PIL import Image

from attn_monitor.trackers.events import Alert, Histogram, Picture, Scalars, Text
from attn_monitor.trackers.tracker import Tracker, is_a


class Aim(Tracker):
    """Track values in a run's repository. It has pictures, distributions, texts and messages."""

    title, names_ignored = "Aim", True

    def __init__(self, logger: Any) -> None:
        super().__init__(logger)
        self.methods = {
            Scalars: self._scalars,
            Picture: self._picture,
            Histogram: self._histogram,
            Text: self._text,
            Alert: lambda alert, step: self.run.log_warning(f"{alert.title}, step {step}\n{alert.content}"),
        }

    @classmethod
    def accepts(cls, logger: Any) -> bool:
        """Accept AimLogger, and runs of the aim package."""
        return is_a(logger, "aim", "Run", "AimLogger")

    def _scalars(self, scalars: Scalars, step: int) -> None:
        for tag, value in self.numbers(scalars).items():
            self.run.track(value, name=tag, step=step)

    def _picture(self, picture: Picture, step: int) -> None:
        import aim

        image = aim.Image(Image.fromarray(picture.content), caption=picture.caption, format="jpeg")
        self.run.track(image, name=picture.tag, step=step)

    def _histogram(self, histogram: Histogram, step: int) -> None:
        import aim

        if histogram.content.size:
            self.run.track(aim.Distribution(histogram.content), name=histogram.tag, step=step)

    def _text(self, text: Text, step: int) -> None:
        import aim

        self.run.track(aim.Text(text.content), name=text.tag, step=step)
