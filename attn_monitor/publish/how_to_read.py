"""The text beside the pictures in a dashboard."""

from __future__ import annotations

from attn_monitor.draw.options import DrawingOptions
from attn_monitor.measurements import HEALTH_TAG
from attn_monitor.publish.tags import renamed, titled


def how_to_read(style: DrawingOptions, settings: str = "", name: str = "") -> str:
    """Markdown: what the pictures show, with this run's settings."""
    colours = (
        "Colours are fixed: attention in units of **uniform** attention (weight × number of patches), on a log scale "
        "from half of uniform to 32 times uniform. A flat purple map says that attention is uniform."
        if style.scale == "uniform"
        else "Colours stretch each map from its own minimum to its own maximum, so strengths cannot be compared."
    )
    strips, panels = renamed("attn_filmstrip", name), renamed("attn_maps", name)
    logits = renamed("attn_overview/logits", name)
    return (
        f"### {titled('How to read the attention maps', name)}\n\n{colours} Outlined in cyan: the smallest set of "
        f"patches that holds {style.threshold:.0%} of the attention on patches. **H** is the entropy over patches (1 "
        "uniform, 0 one patch); the percentage is the outlined area; with H 1.00 there is none. "
        "Ground truth, where there is some, is green. **PCA of a layer's input**: the patch features that enter it as "
        "colours, which keep their meaning over the run; patches alike in features are alike in colour, on all images. "
        f"`{strips}` shows the steps so far in one picture; start TensorBoard with `--samples_per_plugin images=1000` "
        f"to see more than ten steps of `{panels}`. `{logits}` has the largest logit of every layer over the run. "
        "Charts of all heads of a layer are under *Custom Scalars*; "
        f"`{renamed(HEALTH_TAG, name)}` counts health flags.\n\n{settings}"
    )
