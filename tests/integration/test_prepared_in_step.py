"""What the step does to its batch before the model gets it is done to the images that are watched, too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from attn_monitor import AttentionMapCallback, Watch, load_snapshots
from attn_monitor.errors import ForwardError
from attn_monitor.train.backbone_inputs import BackboneInputs, alike, find_preparation
from tests.support.helpers import Distillation, tiny_vit, trainer
from tests.support.more_axes import AnyViT
from tests.support.oracle import attention_matrices
from tests.support.tiers import sweep

PIXELS = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)).mul(255).round()
MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
EVEN = [0, 2, 4, 6, 9, 11, 13, 15]


def normalised(images: Tensor, largest: float = 255) -> Tensor:
    return (images.float() / largest - MEAN) / STD


class Images(Dataset[dict[str, Tensor]]):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self.images[index], "label": torch.tensor(0)}


class Prepares(Distillation):
    """Prepares batches in its own steps, by ``prepare``."""

    def __init__(self, prepare: Callable[[Tensor], Tensor]) -> None:
        super().__init__(img_size=32)
        self.prepare, self.seen = prepare, list[Tensor]()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images = self.prepare(batch["image"])
        self.seen.append(images)
        return super().training_step(images, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(self.prepare(batch["image"]), batch_idx)


def fit(folder: Path, module: Prepares, images: Tensor, *, sanity: bool, **settings: Any) -> AttentionMapCallback:
    callback = AttentionMapCallback(every_n_train_steps=1, **settings)
    data = DataLoader(Images(images), batch_size=4)
    running = trainer(folder, callback, max_steps=2, limit_val_batches=2, num_sanity_val_steps=2)
    running.fit(module, data, DataLoader(Images(images), batch_size=4) if sanity else None)
    assert callback.monitor is not None
    return callback


def assert_true_map(folder: Path, step: int, model: nn.Module, images: Tensor) -> None:
    snapshot = next(s for s in load_snapshots(folder / "run" / "version_0" / "attn_monitor") if s.step == step)
    matrices = attention_matrices(model, images, lambda m, x: m(x))
    expected = matrices[-1][:, :, 0, 1:].unflatten(-1, (4, 4)).float()
    torch.testing.assert_close(snapshot.layer("student").maps.float(), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("sanity", [True, False])
@pytest.mark.parametrize("largest", sweep([255, 10_000], quick=1))
def test_batches_that_the_step_normalises(tmp_path: Path, sanity: bool, largest: int) -> None:
    """A sanity check tells before the first snapshot; without, the first is that after the first step."""
    module = Prepares(lambda images: normalised(images, largest))
    raw, start = PIXELS / 255 * largest, copy.deepcopy(module.student_backbone)
    if sanity:
        callback = fit(tmp_path, module, raw, sanity=True)
        assert_true_map(tmp_path, 0, start, normalised(raw[EVEN], largest))
    else:
        with pytest.warns(UserWarning, match=r"the step prepares its batch.*times .*plus .*after the first step"):
            callback = fit(tmp_path, module, raw, sanity=False)
        steps = [s.step for s in load_snapshots(tmp_path / "run" / "version_0" / "attn_monitor")]
        assert steps == [1, 2]
        assert_true_map(tmp_path, 2, module.student_backbone, normalised(raw[EVEN], largest))
    probe = callback.monitor.probe
    torch.testing.assert_close(probe.images, normalised(raw[EVEN], largest), atol=1e-4, rtol=1e-4)
    assert probe.caption == ("validation image" if sanity else "training crop")
    if largest == 255:
        assert torch.equal(torch.from_numpy(probe.pixels).permute(0, 3, 1, 2), PIXELS[EVEN].byte())


@pytest.mark.parametrize("sanity", [True, False])
def test_bytes_that_the_step_turns_into_floats(tmp_path: Path, sanity: bool) -> None:
    module = Prepares(normalised)
    start = copy.deepcopy(module.student_backbone)
    callback = fit(tmp_path, module, PIXELS.byte(), sanity=sanity)
    images = normalised(PIXELS[:8] if sanity else PIXELS[:4])
    torch.testing.assert_close(callback.monitor.probe.images, images)
    if sanity:
        assert_true_map(tmp_path, 0, start, images)
    else:
        assert_true_map(tmp_path, 2, module.student_backbone, images)


def test_what_no_map_explains_is_watched_as_it_enters(tmp_path: Path) -> None:
    module = Prepares(lambda images: (images / 20).clamp(max=3))
    with pytest.warns(UserWarning, match=r"disagree: values of 0 to 255 and values of 0 to 3\..*mean=.*std=.*forward="):
        callback = fit(tmp_path, module, PIXELS, sanity=False)
    assert torch.equal(callback.monitor.probe.images, module.seen[0])


def test_a_given_probe_stays_and_a_disagreement_is_said(tmp_path: Path) -> None:
    module = Prepares(normalised)
    with pytest.warns(UserWarning, match=r"the probe's images and those that enter the model in training disagree"):
        callback = fit(tmp_path, module, PIXELS, sanity=False, probe=PIXELS[:2])
    assert torch.equal(callback.monitor.probe.images, PIXELS[:2])
    steps = [s.step for s in load_snapshots(tmp_path / "run" / "version_0" / "attn_monitor")]
    assert steps == [0, 1, 2]


def train(watch: Watch, model: nn.Module, given: bool) -> None:
    for step, batch in enumerate(DataLoader(Images(PIXELS), 4)):
        watch.step(step, batch=batch if given else None)
        model(normalised(batch["image"])).sum().backward()
    watch.close(4)


def test_a_loop_that_prepares(tmp_path: Path) -> None:
    """`Watch` knows the batch where it is passed on; else what enters is watched."""
    for given, images in ((True, normalised(PIXELS[EVEN])), (False, normalised(PIXELS[:4]))):
        watch = Watch(model := tiny_vit(), DataLoader(Images(PIXELS), 4), folder=tmp_path / str(given))
        with pytest.warns(UserWarning, match="the step prepares its batch" if given else "disagree"):
            train(watch, model, given)
        assert watch.monitor is not None
        torch.testing.assert_close(watch.monitor.probe.images, images, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:AttentionMapCallback. the step prepares its batch")
def test_no_hook_stays_and_training_is_bit_identical(tmp_path: Path) -> None:
    ends = []
    for watched in (False, True):
        torch.manual_seed(0)
        module = Prepares(lambda images: normalised(images).add_(torch.rand(1)))
        callbacks = [AttentionMapCallback()] if watched else []
        running = trainer(tmp_path / str(watched), *callbacks, max_steps=3)
        running.fit(module, DataLoader(Images(PIXELS), batch_size=4))
        ends.append(module.state_dict())
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])
    assert not any(m._forward_pre_hooks or m._forward_pre_hooks_with_kwargs for m in module.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_map_is_found_by_least_squares(dtype: torch.dtype) -> None:
    entered = normalised(PIXELS).to(dtype)
    for given in (PIXELS.byte(), PIXELS.byte().permute(0, 2, 3, 1), PIXELS / 255):
        found = find_preparation([PIXELS[:, :1], given], [PIXELS[:4, :, :8, :8], entered])
        assert found is not None
        scale = 1 / STD.flatten() / (1 if given.is_floating_point() else 255)
        torch.testing.assert_close(torch.tensor(found.scale), scale, atol=0, rtol=1e-2)
    same = find_preparation([entered], [torch.cat([entered, entered])])
    assert same is not None
    assert same.changes_nothing
    given = PIXELS * torch.linspace(0.5, 1, 16).view(-1, 1, 1, 1)
    for other in (given.flip(3), given.log1p(), given.clamp(max=200), given / given.amax((1, 2, 3), keepdim=True)):
        assert find_preparation([given], [other]) is None


def test_what_is_alike() -> None:
    assert alike(PIXELS, PIXELS[:1] * 2 + 50)
    assert not alike(PIXELS, PIXELS / 255)
    assert not alike(PIXELS, normalised(PIXELS))
    assert not alike(PIXELS, PIXELS[:, :1])
    assert alike(torch.zeros(1, 3, 8, 8), PIXELS)  # nothing can be told


def test_what_is_compiled_gets_no_hook() -> None:
    model, batch = tiny_vit(), torch.rand(2, 3, 32, 32)
    assert BackboneInputs([model], batch, 8).can_see
    compiled = torch.compile(model, backend="eager")
    assert not BackboneInputs([compiled], batch, 8).can_see
    assert not BackboneInputs([model], batch, 8).can_see  # something is: a function of the loop could be


VOLUME = torch.rand(1, 8, 32, 24, generator=torch.Generator().manual_seed(1))
GAPS = VOLUME.where(VOLUME > 0.1, torch.nan)


class Turns(pl.LightningModule):
    """A volume model that gets its batch in another shape than data holds it, or cleaned, by ``turn``."""

    def __init__(self, turn: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.backbone, self.turn = AnyViT((8, 32, 24), (2, 8, 8), channels=1), turn
        self.seen: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(self.turn(batch))
        return self.backbone(self.seen[-1]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


@pytest.mark.parametrize(
    ("sample", "turn", "collate"),
    [
        (VOLUME[0], lambda batch: batch[:, None], None),
        (VOLUME.movedim(0, -1), lambda batch: batch.movedim(-1, 1), None),
        (VOLUME, torch.stack, list),
        (GAPS, torch.nan_to_num, None),
    ],
)
def test_images_that_the_step_turns_are_watched_as_they_enter(
    sample: Tensor, turn: Callable[[Any], Tensor], collate: Any, tmp_path: Path
) -> None:
    callback, module = AttentionMapCallback(every_n_train_steps=1), Turns(turn)
    loader = DataLoader([sample + n for n in range(4)], batch_size=2, collate_fn=collate)  # type: ignore[arg-type]
    trainer(tmp_path, callback, max_steps=2).fit(module, loader)
    assert callback.monitor is not None
    assert torch.equal(callback.monitor.probe.images, module.seen[0])
    assert load_snapshots(tmp_path / "run" / "version_0" / "attn_monitor")


def test_where_a_layer_is_named_images_that_the_model_refuses_end_the_run_before_its_first_step(tmp_path: Path) -> None:
    module, loader = Turns(lambda batch: batch[:, None]), DataLoader([VOLUME[0]] * 4, batch_size=2)  # type: ignore[arg-type]
    with pytest.raises(ForwardError, match=r"AnyViT failed on images \(\d, 8, 32, 24\)"):
        trainer(tmp_path, AttentionMapCallback(layers="all"), max_steps=2).fit(module, loader)
    assert not module.seen
