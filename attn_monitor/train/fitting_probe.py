"""Find the models' attention on images of a size and with channels that they take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from attn_monitor.capture.image_channels import first_channels, image_channels
from attn_monitor.distributed import RankZero
from attn_monitor.errors import AttentionError, ForwardError, text_of
from attn_monitor.monitor import AttentionMonitor
from attn_monitor.probe.options import IMAGE_SIZE
from attn_monitor.probe.sizes import sizes_in
from attn_monitor.train.kept import Kept


def check_models(kept: Kept, models: Mapping[str, nn.Module], rank_zero: RankZero) -> AttentionMonitor:
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
    if options.are_files:
        _read_channels_of(next(iter(models.values())), kept, rank_zero)
    probe = kept.monitor.probe
    try:
        kept.monitor.check(models)
    except ForwardError as error:
        if not options.other_sizes_fit:
            raise
        for size in sizes_in(text_of(error.__cause__ or error), IMAGE_SIZE):
            other = rank_zero.run(replace(options, image_size=size).load)
            assert other is not None
            try:
                kept.watch(other).check(models)
            except AttentionError:
                continue
            return kept.monitor
        kept.watch(probe)
        raise ForwardError(f"{error}. Where it takes another size than {IMAGE_SIZE}, pass image_size=") from error
    return kept.monitor


def _read_channels_of(model: nn.Module, kept: Kept, rank_zero: RankZero) -> None:
    """Read the files of the probe again if the model takes other channels than were read."""
    assert kept.monitor is not None
    _, read, *size = kept.monitor.probe.images.shape
    if first_channels(model) in (None, read) or (channels := image_channels(model, size)) == read:
        return
    probe = rank_zero.run(lambda: kept.options.probe.load(channels))
    assert probe is not None
    kept.watch(probe)
