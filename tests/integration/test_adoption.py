"""Which images are watched where none were given, and that taking them disturbs nothing."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset

from attn_monitor import AttentionMapCallback, ProbeBatch, ProbeOptions
from attn_monitor.train.probe_search import probe_from_loaders
from tests.support.helpers import Distillation, NoiseImages, loader, trainer


class Numbered(Dataset[Tensor]):
    """Each image is full of its own index; every access draws from all random states, as augmentation does."""

    def __init__(self, count: int, size: int = 32, start: int = 0) -> None:
        self.count, self.size, self.start = count, size, start

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
        return torch.full((3, self.size, self.size), float(self.start + index))


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        return iter(NoiseImages())


def watched(folder: Path, train: Any, validation: Any = None, **changes: Any) -> ProbeBatch:
    """The probe of a run of two steps that was given none."""
    callback = AttentionMapCallback()
    trainer(folder, callback, max_steps=2, **changes).fit(Distillation(), train, validation)
    assert callback.monitor is not None
    return callback.monitor.probe


def indices(probe: ProbeBatch) -> list[int]:
    return probe.images[:, 0, 0, 0].int().tolist()


EVEN = [0, 14, 28, 42, 57, 71, 85, 99]


@pytest.mark.parametrize("sanity", [0, 2])
def test_evenly_spaced_images_of_the_validation_data(tmp_path: Path, sanity: int) -> None:
    """With and without a sanity check, whatever the batches are."""
    validation = DataLoader(Numbered(100), batch_size=1)
    probe = watched(tmp_path, loader(), validation, num_sanity_val_steps=sanity)
    assert indices(probe) == EVEN
    assert probe.caption == "validation image"


def test_several_validation_sets_and_a_sampler_of_a_part() -> None:
    part = DataLoader(Numbered(100), batch_size=4, sampler=SubsetRandomSampler(range(50, 58)))
    other = DataLoader(Numbered(9))
    for loaders in ([part, other], {"a": part, "b": other}):
        probe = probe_from_loaders(loaders, 8)
        assert probe is not None
        assert indices(probe) == list(range(50, 58))


def test_training_data_are_captioned_as_crops_and_fill_up(tmp_path: Path) -> None:
    probe = watched(tmp_path, DataLoader(Numbered(100), batch_size=1, shuffle=True), limit_val_batches=0)
    assert indices(probe) == EVEN
    assert probe.caption == "training crop"


def test_a_stream_has_no_length_and_gives_its_first_batch(tmp_path: Path) -> None:
    probe = watched(tmp_path, DataLoader(Stream(), batch_size=3))
    assert len(probe) == 3
    assert probe.caption == "training crop"
    torch.testing.assert_close(probe.images, NoiseImages().images[:3])


def test_a_stream_for_validation_fills_up_over_the_sanity_check(tmp_path: Path) -> None:
    probe = watched(tmp_path, loader(), DataLoader(Stream(), batch_size=3))
    torch.testing.assert_close(probe.images, NoiseImages().images[:6])
    assert probe.caption == "validation image"


def test_batches_that_are_changed_on_their_way_are_taken_as_the_model_sees_them(tmp_path: Path) -> None:
    class OnDevice(Distillation):
        def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
            return batch * 100

    callback = AttentionMapCallback()
    trainer(tmp_path, callback, max_steps=1).fit(OnDevice(), loader(), loader(8))
    assert callback.monitor is not None
    torch.testing.assert_close(callback.monitor.probe.images, NoiseImages().images[:8] * 100)


def test_data_that_cannot_be_asked_are_one_warning(tmp_path: Path) -> None:
    class Broken(Numbered):
        def __getitem__(self, index: int) -> Tensor:
            if index > 3:
                raise OSError("disk")
            return super().__getitem__(index)

    validation = DataLoader(Broken(100), batch_size=2)
    with pytest.warns(UserWarning, match=r"finding a validation image failed.*OSError. disk"):
        probe = watched(tmp_path, loader(), validation, limit_val_batches=2, check_val_every_n_epoch=1)
    assert indices(probe) == [0, 1, 2, 3]


@pytest.mark.parametrize("workers", [0, 1])
def test_neither_random_states_nor_the_loader_move(workers: int) -> None:
    data = DataLoader(Numbered(100), batch_size=4, shuffle=True, num_workers=workers)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    probe = probe_from_loaders(data, 8)
    assert probe is not None
    assert indices(probe) == EVEN
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


@pytest.mark.parametrize("validation", [None, DataLoader(Numbered(100), batch_size=1)])
def test_statistics_can_be_set(tmp_path: Path, validation: Any) -> None:
    callback = AttentionMapCallback(ProbeOptions(mean=[0.1, 0.2, 0.3], std=[1, 2, 3]))
    data = loader() if validation is None else DataLoader(Stream(), batch_size=3)
    trainer(tmp_path, callback, max_steps=1).fit(Distillation(), data, validation)
    assert callback.monitor is not None
    probe = callback.monitor.probe
    assert (probe.mean, probe.std) == ((0.1, 0.2, 0.3), (1, 2, 3))
    assert probe.caption == ("training crop" if validation is None else "validation image")


@pytest.mark.parametrize(
    "given", [{"mean": [1.0]}, {"mean": [1], "std": [0]}, {"mean": [1], "std": [1, 2]}, {"mean": [], "std": []}]
)
def test_wrong_statistics_fail_at_once(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"mean=.*std=.*expected both"):
        ProbeOptions(**given)
    with pytest.raises(ValueError, match="a ProbeBatch, which takes mean and std of its own"):
        ProbeOptions(ProbeBatch(torch.zeros(1, 3, 8, 8)), mean=[0, 0, 0], std=[1, 1, 1])


def test_a_batch_without_images_leaves_the_run_alone(tmp_path: Path) -> None:
    """Neither the batch nor what the models get tells which images they see."""

    class NoImages(Distillation):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self.head(batch[0]).square().mean()

    data = DataLoader(TensorDataset(torch.zeros(16, 32)), batch_size=4)
    running = trainer(tmp_path, AttentionMapCallback(), max_steps=2)
    with pytest.warns(UserWarning, match=r"attention was not watched.*none entered the models.*Pass probe="):
        running.fit(NoImages(), data)
    assert running.global_step == 2
