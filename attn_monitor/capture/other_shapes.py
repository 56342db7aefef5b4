"""Find another shape of images under which a model runs, for the message where it does not run on those given."""

from __future__ import annotations

from torch import Tensor, nn

from attn_monitor.capture.observe.forward import Forward, default_forward
from attn_monitor.capture.observe.isolation import isolated_forward

_WAYS = {
    3: ("images[None]", "images[:, None]", "images.transpose(1, 2)"),
    4: ("images[None]", "images[:, 0]", "images.movedim(-1, 1)", "images.transpose(0, 1)[None]", "images[:, None]"),
    5: ("images.transpose(1, 2)", "images.movedim(-1, 1)", "images.movedim(-1, 2)", "images[:, 0]"),
}
_FRAMES_ALONE = "forward=lambda model, images: model(images.flatten(0, 1))"


def shape_that_runs(model: nn.Module, images: Tensor) -> str:
    """Return a sentence that names how to pass the images so that the model runs on them; empty where none is found.

    Args:
        model: The model, left as it was found.
        images: Images on which the model fails, on its device and in its dtype.
    """
    for way in _WAYS.get(images.ndim, ()):
        if way == "images[:, 0]" and images.shape[1] > 1:
            continue
        turned = eval(way, {"images": images})  # one of the texts above
        if runs(model, turned):
            return f"It does run on {way}, of shape {tuple(turned.shape)}: pass that if it is what the images are"
    if images.ndim == 5 and runs(model, images.flatten(0, 1)):
        return f"It does run on each frame alone: pass {_FRAMES_ALONE}"
    return ""


def runs(model: nn.Module, images: Tensor, forward: Forward = default_forward) -> bool:
    """Return whether a model, which is left as it was found, runs on images."""
    try:
        with isolated_forward(model):
            forward(model, images)
    except Exception:  # whatever a model raises on images of another shape
        return False
    return True
