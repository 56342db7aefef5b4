"""A watched run of three steps whose two processes Lightning starts itself: STRATEGY FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

from attn_monitor import AttentionMapCallback
from tests.support.helpers import Distillation, loader, trainer


def main() -> None:
    """Train, then show in the first process that the metrics came back."""
    strategy, folder = sys.argv[1], Path(sys.argv[2])
    watch = AttentionMapCallback(every_n_train_steps=1)
    running = trainer(folder, watch, strategy=strategy, devices=2, max_steps=3)
    running.fit(Distillation(), loader(), loader(8))
    assert 0 < running.callback_metrics["attn/teacher/layer1/entropy"] < 1


if __name__ == "__main__":
    main()
