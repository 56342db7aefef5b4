"""Find the models' attention on images of a size and with channels that they take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from torch import nn

from attn_monitor.capture.image_channels import first_channels, image_channels
from attn_monitor.distributed import RankZero
from attn_monitor.errors import AttentionError, ForwardError, text_of
from attn_monitor.monitor import AttentionMonitor
from attn_monitor.probe.options import IMAGE_SIZE
from attn_monitor.probe.sizes import sizes_in
from attn_monitor.train.kept import Kept


def fit_probe(kept: Kept, models: Mapping[str, nn.Module], rank_zero: RankZero) -> AttentionMonitor:
    """Find the wanted layers of each model on the probe, which is read again from its files where that is needed.

    Files are read with the number of channels that the first model takes. Where the models refuse the default size of
    a folder's images, those sizes are tried that the refusal names. A resumed run keeps its images.

    Returns:
        The run's monitor, a new one where the probe was read again.

    Raises:
        AttentionError: The layers of a model cannot be read, or it takes none of the sizes.
    """
    assert kept.monitor is not None
    options = kept.options.probe
    if kept.resumed:
        kept.monitor.check(models)
        return kept.monitor
    taken = _read_as_taken(next(iter(models.values())), kept, rank_zero) if options.are_files else (None, None)
    probe = kept.monitor.probe
    try:
        kept.monitor.check(models)
    except ForwardError as error:
        if not options.other_sizes_fit or error.__cause__ is None:  # refused before its forward: by no size
            raise
        for size in sizes_in(text_of(error.__cause__ or error), IMAGE_SIZE):
            other = rank_zero.run(partial(replace(options, image_size=size).load, *taken))
            assert other is not None
            try:
                kept.watch(other).check(models)
            except AttentionError:
                continue
            return kept.monitor
        kept.watch(probe)
        raise ForwardError(f"{error}. Where it takes another size than {IMAGE_SIZE}, pass image_size=") from error
    return kept.monitor


def _read_as_taken(model: nn.Module, kept: Kept, rank_zero: RankZero) -> tuple[int | None, str | None]:
    """Read the files of the probe again if the model takes other channels, or another order, than were read.

    Returns:
        The channels and the order of dimensions with which files are to be read, None for what was read first.
    """
    assert kept.monitor is not None
    read, options = kept.monitor.probe, kept.options.probe
    _, channels, *size = read.channels_first.shape
    in_order = options.axes is not None or (len(size) == 2 and channels > 1)
    if in_order and first_channels(model) in (None, channels):
        return None, None
    taken = image_channels(model, size)
    if taken != (channels, "".join(read.image_axes.names)):
        probe = rank_zero.run(partial(options.load, *taken))
        assert probe is not None
        kept.watch(probe)
    return taken
