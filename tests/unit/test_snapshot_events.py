"""Events of a snapshot: what each image's pictures are drawn on."""

from __future__ import annotations

import numpy as np
import torch

from attn_monitor import AttentionMonitor, ProbeBatch
from attn_monitor.draw.history import Entry
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.record.curves import Curves
from attn_monitor.trackers.events import Masks, Picture
from attn_monitor.trackers.snapshot_events import events_at_snapshot
from tests.support.helpers import tiny_vit

COLOURS = torch.eye(3)[:2]  # a red image and a green one


def test_each_image_is_drawn_on_its_own_photograph() -> None:
    """Each pure colour is brightest in the pictures of its own image, and is the photograph under its masks."""
    plain = COLOURS[:, :, None, None].expand(2, 3, 32, 32)
    probe = ProbeBatch(plain.clone(), mean=(0.0,) * 3, std=(1.0,) * 3)
    snapshot = AttentionMonitor(probe).snapshot({"teacher": tiny_vit()}, step=0)
    events = list(
        events_at_snapshot(snapshot, [Entry(snapshot, None, dense=False)], Curves(), probe, DrawingOptions(), [1])
    )
    for index, image in enumerate(snapshot.names):
        (panel,) = (e for e in events if isinstance(e, Picture) and e.tag == f"attn_maps/{image}")
        (masks,) = (e for e in events if isinstance(e, Masks) and e.tag == f"attn_overlay/{image}")
        photo = np.uint8(255 * COLOURS[index].numpy())
        others = [np.uint8(255 * COLOURS[i].numpy()) for i in range(2) if i != index]
        assert (masks.content[0] == photo).all()
        assert (panel.content == photo).all(-1).any()
        assert not any((panel.content == other).all(-1).any() for other in others)
