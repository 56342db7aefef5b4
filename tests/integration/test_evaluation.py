"""Labels in a run: curves of kNN and of a linear probe, a flag where they are lost, and the same training with them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from attn_monitor import AttentionMapCallback, AttentionSnapshot, EvaluationOptions, Watch, load_snapshots
from attn_monitor.errors import ArgumentError
from attn_monitor.offline import pick_checkpoints
from tests.integration.test_watch import hugging_face
from tests.support.events import Events
from tests.support.helpers import Distillation, loader, tiny_vit, trainer


def labelled(count: int = 120, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images of three colours below noise, and their classes."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=draw)
    images = torch.randn(count, 3, 32, 32, generator=draw)
    images[torch.arange(count), labels] += 1
    return images, labels


class Augmented:
    """Samples that draw random numbers, as careless data sets do."""

    def __init__(self) -> None:
        self.images, self.labels = labelled()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        torch.rand(1), np.random.rand()  # noqa: NPY002
        return self.images[index], int(self.labels[index])


def ended(watch: Watch, step: int) -> AttentionSnapshot:
    snapshot = watch.step(step)
    watch.close()
    return snapshot


def fit(folder: Path, **settings: Any) -> Distillation:
    torch.manual_seed(0)
    module = Distillation(drop_path_rate=0.2)
    callback = AttentionMapCallback(torch.randn(2, 3, 32, 32), every_n_train_steps=2, **settings)
    trainer(folder, callback, max_steps=4).fit(module, loader(shuffle=True))
    return module


@pytest.mark.slow
def test_training_is_the_same_to_the_bit(tmp_path: Path) -> None:
    plain, judged = fit(tmp_path / "plain"), fit(tmp_path / "judged", evaluation=Augmented())
    for (name, a), b in zip(plain.state_dict().items(), judged.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    run = tmp_path / "judged" / "run" / "version_0"
    snapshots, events = load_snapshots(run / "attn_monitor"), Events(run)
    for role in ("student", "teacher"):
        for name in ("knn_accuracy", "ridge_accuracy"):
            stored = {s.step: s.metrics[role, None, name, None] for s in snapshots}
            assert list(stored) == [0, 2, 4]
            assert dict(events.scalars(f"attn/{role}/{name}")) == pytest.approx(stored)
    assert pick_checkpoints(run, start=0).best("global").measure == "knn_accuracy"


def test_accuracies_are_those_of_scikit_learn_on_the_models_own_features(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, (images, labels), (new, truth) = tiny_vit(drop_path_rate=0.5).train(), labelled(), labelled(60, seed=1)
    options = EvaluationOptions((images, labels), test=(new, truth), k=9, batch_size=50)
    with Watch(model, torch.randn(2, 3, 32, 32), folder=tmp_path, evaluation=options) as watch:
        snapshot = watch.step(0)
    same = copy.deepcopy(model).eval()
    with torch.no_grad():
        x, z = same(images).double().numpy(), same(new).double().numpy()
    knn = KNeighborsClassifier(9, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07))
    assert snapshot.metrics["backbone", None, "knn_accuracy", None] == knn.fit(x, labels).score(z, truth)
    scaler = StandardScaler().fit(x)
    ridge = RidgeClassifier(1.0).fit(scaler.transform(x), labels)
    assert snapshot.metrics["backbone", None, "ridge_accuracy", None] == ridge.score(scaler.transform(z), truth)
    assert model.training


def test_a_loss_is_flagged_after_a_resumption_too(tmp_path: Path) -> None:
    model = tiny_vit()
    settings: dict[str, Any] = {"every_n_train_steps": 1, "evaluation": EvaluationOptions(labelled(400), every=2)}
    probe = torch.randn(2, 3, 32, 32)
    with Watch(model, probe, folder=tmp_path / "a", **settings) as watch:
        first, second = watch.step(0), watch.step(1)
        state = watch.state_dict()
    accuracy = first.metrics["backbone", None, "knn_accuracy", None]
    assert accuracy > 0.8
    assert not second.flags
    assert ("backbone", None, "knn_accuracy", None) not in second.metrics
    torch.nn.init.zeros_(model.patch_embed.proj.weight)
    resumed = Watch(model, probe, folder=tmp_path / "a", **settings)
    resumed.load_state_dict(state)
    with pytest.warns(UserWarning, match=f"kNN accuracy on labels is .*, and was {accuracy:.1%} at the first snapshot"):
        flags = ended(resumed, 2).flags
    assert [(flag.kind, flag.role, flag.layer) for flag in flags] == [("labels", "backbone", None)]


def test_a_failure_costs_the_evaluation_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images of a size that the model refuses; what it costs is told where it works."""
    images, labels = labelled(40)
    model = tiny_vit(dynamic_img_size=False)
    watch = Watch(model, torch.randn(2, 3, 32, 32), folder=tmp_path / "a", evaluation=(images[..., :24], labels))
    with pytest.warns(UserWarning, match="evaluating on labels failed, training goes on"):
        snapshot = ended(watch, 0)
    assert ("backbone", 1, "entropy", None) in snapshot.metrics
    with Watch(model, torch.randn(2, 3, 32, 32), folder=tmp_path / "b", evaluation=(images, labels)) as watch:
        watch.step(0)
    told = capsys.readouterr()
    assert "evaluation of backbone on 31 images of 3 classes, and 9 for the test: 40 extra forwards" in told.err
    with pytest.raises(ArgumentError, match="evaluation: received a int"):
        AttentionMapCallback(evaluation=3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_hugging_face_trainer(tmp_path: Path) -> None:
    """Curves of the Trainer's model at each snapshot, from its own features, and the same training."""
    (images, labels), (new, truth) = labelled(), labelled(60, seed=1)
    options = EvaluationOptions((images, labels), test=(new, truth), k=9)
    plain = hugging_face(tmp_path / "plain", 3, watched=False).model.state_dict()
    model = hugging_face(tmp_path / "judged", 3, evaluation=options).model
    assert all(torch.equal(value, plain[name]) for name, value in model.state_dict().items())
    found = {s.step: s.metrics["attn/backbone/knn_accuracy"] for s in load_snapshots(tmp_path / "judged/attn_monitor")}
    assert list(found) == [0, 1, 2, 3]
    with torch.no_grad():
        x, z = (model.eval().vit(part).last_hidden_state[:, 0].double().numpy() for part in (images, new))
    knn = KNeighborsClassifier(9, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07))
    assert found[3] == knn.fit(x, labels).score(z, truth)


@pytest.mark.parametrize(("count", "classes"), [(8, 1), (6, 3), (0, 0)])
def test_too_few_labels_are_refused_before_training(count: int, classes: int) -> None:
    given = torch.randn(count, 3, 32, 32), torch.arange(count) % max(1, classes)
    with pytest.raises(ArgumentError, match=f"evaluation: {count} images of {classes} classes, at most .*expected two"):
        EvaluationOptions(given)
    if classes == 3:
        assert EvaluationOptions(given, test=given).k == 20
