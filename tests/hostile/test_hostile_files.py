"""Files that are damaged or made up: refused as one kind of error that names the file, at little cost."""

from __future__ import annotations

import copy
import json
import os
import shutil
import stat
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attn_monitor import ArchiveError, AttentionMonitor, AttentionSnapshot, HealthLimits, ProbeBatch
from attn_monitor.commands.replay import replay
from attn_monitor.record.snapshot_file import snapshot_from_state, snapshot_state
from tests.support.helpers import tiny_vit

Arrays = dict[str, np.ndarray]
ZEROS = bytes(1 << 20)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A snapshot with everything that can be in one, and two probes: of 8 bit with masks, and of floats."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    masks = torch.zeros(3, 2, 32, 32, dtype=torch.bool)
    masks[:, 0, :9] = True
    images = torch.randint(0, 2, (3, 3, 32, 32)).float() * 4 - 2
    probes = {"pixels": ProbeBatch(images, mean=[0.5] * 3, std=[0.25] * 3, masks=masks, names=["a", "b", "c"])}
    probes["images"] = ProbeBatch(torch.randn(3, 1, 8, 8), mean=[0.5], std=[0.25])
    monitor = AttentionMonitor(probes["pixels"], layers="all", metrics="all", health=HealthLimits(peak=0.01))
    models = {"student": tiny_vit(reg_tokens=2), "teacher": tiny_vit(reg_tokens=2)}
    with torch.no_grad():
        models["teacher"].blocks[1].attn.qkv.weight.mul_(30)  # sharp attention, which raises a flag
    snapshot = monitor.snapshot(models, step=7, epoch=1)
    assert snapshot.flags
    snapshot.save(folder / "snapshot.npz")
    for name, probe in probes.items():
        probe.save(folder / f"{name}.npz")
    return {path.stem: path for path in folder.iterdir()}


def load(path: Path) -> Any:
    return AttentionSnapshot.load(path) if path.stem == "snapshot" else ProbeBatch.load(path)


def parts(path: Path) -> tuple[dict[str, Any], Arrays]:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return json.loads(str(arrays.pop("header"))), arrays


def put_together(path: Path, header: Any, arrays: Arrays) -> Path:
    np.savez(path, header=np.array(json.dumps(header)), **arrays)
    return path


def opens_or_is_refused(path: Path) -> Any:
    """What was read, or None: any other error fails the test, as does an error that does not name the file."""
    try:
        return load(path)
    except ArchiveError as error:
        told = str(error)
    assert str(path) in told
    assert "\n" not in told
    return None


many = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
kinds = pytest.mark.parametrize("kind", ["snapshot", "pixels", "images"])


@kinds
def test_untouched_files_open(files: dict[str, Path], kind: str, tmp_path: Path) -> None:
    """Also when another program has put them together, and with fields that a later version may add."""
    header, arrays = parts(files[kind])
    header["added"] = {"later": [1]}
    for entry in header.get("layers", []):
        entry["added"] = "later"
    load(put_together(tmp_path / f"{kind}.npz", header, {**arrays, "added": np.zeros(3)}))


@kinds
@many
@given(data=st.data())
def test_bytes(files: dict[str, Path], kind: str, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(files[kind].read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 8))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / files[kind].name
    path.write_bytes(bytes(content))
    opens_or_is_refused(path)


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**80), 2**80),
    st.integers(-3, 40),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(-5, 5) | st.text(max_size=2), max_size=4),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)


def places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, the whole included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(p for key, item in inner for p in places(item, (*place, key)))]


def change(header: Any, place: tuple[Any, ...], new: Any, remove: bool) -> Any:
    if not place:
        return new
    header = copy.deepcopy(header)
    target = header
    for key in place[:-1]:
        target = target[key]
    if remove:
        del target[place[-1]]
    else:
        target[place[-1]] = new
    return header


@kinds
@many
@given(data=st.data())
def test_headers(files: dict[str, Path], kind: str, tmp_path: Path, data: st.DataObject) -> None:
    header, arrays = parts(files[kind])
    for _ in range(data.draw(st.integers(1, 3))):
        short = [place for place in places(header) if "metrics" not in place[:-1]]
        place = data.draw(st.sampled_from(short))
        header = change(header, place, data.draw(values), data.draw(st.booleans()))
    read = opens_or_is_refused(put_together(tmp_path / files[kind].name, header, arrays))
    if isinstance(read, AttentionSnapshot):
        assert read.step >= 0
        assert len(set(read.names)) == 3
        for attention in read.layers.values():
            assert attention.maps.shape[:2] == (3, 4)
            assert min(attention.grid) > 0


dtypes = st.sampled_from(["f2", ">f2", "f4", "f8", "i8", "u1", "?", "c8", "U2", "S3", "M8[s]", "V4"])
shapes = st.lists(st.integers(0, 40), max_size=5).map(tuple)


@kinds
@many
@given(data=st.data())
def test_arrays(files: dict[str, Path], kind: str, tmp_path: Path, data: st.DataObject) -> None:
    header, arrays = parts(files[kind])
    name = data.draw(st.sampled_from(sorted(arrays)))
    how = data.draw(st.sampled_from(["gone", "made up", "one value", "scaled", "transposed", "fewer", "another's"]))
    if how == "gone":
        del arrays[name]
    elif how == "made up":
        arrays[name] = np.zeros(data.draw(shapes), data.draw(dtypes))
    elif how == "one value":
        arrays[name].flat[data.draw(st.integers(0, arrays[name].size - 1))] = (
            data.draw(st.sampled_from([np.nan, np.inf, -1, 0, 0.5, 2])) if arrays[name].dtype.kind == "f" else 1
        )
    elif how == "scaled" and arrays[name].dtype.kind == "f":
        arrays[name] = arrays[name] * arrays[name].dtype.type(data.draw(st.floats(-3, 3)))
    elif how == "transposed":
        arrays[name] = np.asfortranarray(arrays[name]) if data.draw(st.booleans()) else arrays[name].T
    elif how == "fewer":
        arrays[name] = arrays[name][: data.draw(st.integers(0, 2))]
    else:
        arrays[name] = arrays[data.draw(st.sampled_from(sorted(arrays)))]
    read = opens_or_is_refused(put_together(tmp_path / files[kind].name, header, arrays))
    if isinstance(read, AttentionSnapshot):
        for attention in read.layers.values():
            assert (attention.rows >= 0).all()
            torch.testing.assert_close(attention.rows.sum(-1), torch.ones(3, 4), atol=0.02, rtol=0)


def spoil(key: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any, Arrays], None]:
    def spoiled(header: Any, arrays: Arrays) -> None:
        arrays[key] = change(arrays[key])

    return spoiled


def one_nan(rows: np.ndarray) -> np.ndarray:
    rows[1, 2, 3] = np.nan
    return rows


def first_layer(**fields: Any) -> Callable[[Any, Arrays], None]:
    return lambda header, arrays: header["layers"][0].update(fields)


@pytest.mark.parametrize(
    ("kind", "wrong", "text"),
    [
        ("snapshot", first_layer(grid=[-4, -4]), r"grid=\[-4, -4\].*expected integers of at least 1"),
        ("snapshot", first_layer(grid=[4, 5]), r"student/0 is float16 \(3, 4, 19\), expected float16 \(3, 4, 23\)"),
        ("snapshot", first_layer(grid=[2, 7], num_prefix=5), r"num_prefix=5 does not fit prefix_mass="),
        ("snapshot", first_layer(heads=3), "has 4 values for 3 heads"),
        ("snapshot", first_layer(layer=1), "layer 1 of 'student' is stored twice"),
        ("snapshot", first_layer(mixed=1), "mixed=1.*expected true or false"),
        ("snapshot", lambda h, a: h.update(step=-1), "step=-1.*at least 0"),
        ("snapshot", lambda h, a: h.update(step=10**30), "step=1000.*expected an integer"),
        ("snapshot", lambda h, a: h.update(epoch=True), "epoch=True"),
        ("snapshot", lambda h, a: h.update(names=["a"]), r"is float16 \(3, 4, 19\), expected float16 \(1, 4, 19\)"),
        ("snapshot", lambda h, a: h.update(names=["a", "a", "b"]), "names=.*all different"),
        ("snapshot", lambda h, a: h["flags"][0].update(heads=[99]), "flag 0 is about layer .* which are not here"),
        ("snapshot", lambda h, a: h["flags"][0].pop("text"), "flag 0 has no 'text'"),
        ("snapshot", lambda h, a: h.update(flags=[{"role": "teacher"}]), "flag 0 has no 'heads'"),
        ("snapshot", lambda h, a: h["layers"][0]["metrics"].update(x={"mean": "a"}), "mean='a'.*a number"),
        ("snapshot", lambda h, a: h["layers"][0]["metrics"]["peak"]["heads"].pop(), "peak.*3 values for 4 heads"),
        ("snapshot", lambda h, a: a.pop("rows/teacher/1"), "rows of layer 1 of 'teacher' are missing"),
        ("snapshot", spoil("rows/student/0", one_nan), "hold NaN or infinity, and the header does not say so"),
        ("snapshot", spoil("rows/student/0", lambda r: r * np.float16(0.9)), "not distributions"),
        ("snapshot", spoil("rows/student/0", lambda r: r[..., ::-1] * np.float16(-1)), "not distributions"),
        ("snapshot", spoil("norms/student/0", lambda r: r[:2]), r"norms/student/0 is float32 \(2, 19\)"),
        ("pixels", lambda h, a: h.update(names=["a"]), r"pixels is uint8 \(3, 3, 32, 32\), expected uint8 \(1, 3"),
        ("pixels", lambda h, a: h.update(std=[0, 1, 1]), "no std of 0"),
        ("pixels", lambda h, a: h.update(mean=["a", 0, 0]), "mean=.*expected finite numbers"),
        ("pixels", spoil("masks", lambda m: m[:, :, :, :9]), r"masks is bool .*expected bool \(3, any, 32, 32\)"),
        ("pixels", lambda h, a: a.pop("pixels"), "neither 'images' nor 'pixels'"),
        ("images", lambda h, a: h.update(mean=[0, 0], std=[1, 1]), r"images is float32 \(3, 1, 8, 8\)"),
        ("images", lambda h, a: h.update(format=3), "written by a newer version"),
        ("images", lambda h, a: h.update(format="1"), "format='1'"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(
    files: dict[str, Path], tmp_path: Path, kind: str, wrong: Callable[[Any, Arrays], object], text: str
) -> None:
    header, arrays = parts(files[kind])
    wrong(header, arrays)
    path = put_together(tmp_path / f"{kind}.npz", header, arrays)
    with pytest.raises(ArchiveError, match=rf"{kind}\.npz: .*{text}"):
        load(path)


@kinds
def test_states_get_the_same_checks(files: dict[str, Path], kind: str) -> None:
    """A checkpoint's state may be damaged too."""
    good = load(files[kind])
    broken: list[Any] = [None, {}, [], {"header": "["}, {"header": "{}"}, {"header": 3, "arrays": {}}]
    state = snapshot_state(good) if kind == "snapshot" else good.state_dict()
    tensors = "arrays" if kind == "snapshot" else "tensors"
    broken += [{**state, tensors: wrong} for wrong in (None, {}, dict.fromkeys(state[tensors], 3))]
    broken += [{**state, tensors: {k: v[:1] for k, v in state[tensors].items()}}]
    broken += [{k: v for k, v in state.items() if k != left_out} for left_out in state.keys() - {"bands"}]
    for wrong in broken:
        with pytest.raises(ArchiveError):
            snapshot_from_state(wrong) if kind == "snapshot" else ProbeBatch.from_state_dict(wrong)


def add_zeros(path: Path, name: str, shape: tuple[int, ...], mebibytes: int) -> None:
    """A member of float16 zeros, written piece by piece."""
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
        file.open(f"{name}.npy", "w") as out,
    ):
        np.lib.format.write_array_header_1_0(out, {"descr": "<f2", "fortran_order": False, "shape": shape})
        for _ in range(mebibytes):
            out.write(ZEROS)


def peak_while(action: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "shape", "text"),
    [
        ("other", (500 << 19,), None),
        ("rows/student/0", (3, 500 << 19), r"expected float16 \(3, 4, 19\)"),
        ("rows/student/0", (3, 4, 19), "456 bytes of its shape"),
        ("rows/teacher/0", (3, (500 << 19) // 57, 19), "would unpack to .* more than a file of this size can hold"),
        ("header", (), "header has .* bytes, expected at most"),
    ],
)
def test_bombs_are_not_unpacked(
    files: dict[str, Path], tmp_path: Path, name: str, shape: tuple[int, ...], text: str | None
) -> None:
    """Half a gigabyte of zeros in a small file, in members that are ours and in one that is not."""
    header, arrays = parts(files["snapshot"])
    arrays.pop(name, None)
    if name == "rows/teacher/0":  # and in a header that agrees with it
        header["layers"][2]["heads"] = shape[1]
        header["layers"][2]["metrics"] = {}
    path = tmp_path / "snapshot.npz"
    if name == "header":
        np.savez(path, **arrays)
    else:
        put_together(path, header, arrays)
    add_zeros(path, name, shape, 500)
    assert path.stat().st_size < 4 << 20

    def read() -> None:
        if text is None:
            load(path)
            return
        with pytest.raises(ArchiveError, match=text):
            load(path)

    assert peak_while(read) < 8 << 20


def test_other_things_than_files(files: dict[str, Path], tmp_path: Path) -> None:
    """A folder, a pipe that nobody writes to, and pickles."""
    with pytest.raises(ArchiveError, match="not a regular file"):
        AttentionSnapshot.load(tmp_path)
    os.mkfifo(tmp_path / "pipe.npz")
    assert stat.S_ISFIFO((tmp_path / "pipe.npz").stat().st_mode)
    with pytest.raises(ArchiveError, match=r"pipe\.npz: not a regular file"):
        ProbeBatch.load(tmp_path / "pipe.npz")
    header, arrays = parts(files["snapshot"])
    arrays["rows/student/0"] = np.array([{"pickled": 1}], dtype=object)
    with pytest.raises(ArchiveError, match="rows/student/0 is object"):
        AttentionSnapshot.load(put_together(tmp_path / "snapshot.npz", header, arrays))


def test_ways_of_packing_that_are_not_ours(files: dict[str, Path], tmp_path: Path) -> None:
    """Others than deflate cannot be unpacked piece by piece."""
    path = tmp_path / "snapshot.npz"
    with zipfile.ZipFile(files["snapshot"]) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ArchiveError, match="compression method 12"):
        load(path)


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_replay_draws_or_refuses(files: dict[str, Path], tmp_path: Path, data: st.DataObject) -> None:
    """Also where each file by itself is right, but not with the others."""
    archive = tmp_path / "archive"
    archive.mkdir(exist_ok=True)
    shutil.copy(files["snapshot"], archive / "step-000000007.npz")
    shutil.copy(files["pixels"], archive / "probe.npz")
    path = data.draw(st.sampled_from(sorted(archive.glob("*.npz"))))
    how = data.draw(st.sampled_from(["another's layers", "another's", "one head", "fewer layers", "header"]))
    header, arrays = parts(path)
    if how == "another's":
        shutil.copy(files["images"], archive / "probe.npz")
    elif how == "header":
        place = data.draw(st.sampled_from([p for p in places(header) if "metrics" not in p]))
        put_together(path, change(header, place, data.draw(values), data.draw(st.booleans())), arrays)
    elif "layers" in header:
        if how == "another's layers":
            other = AttentionMonitor(ProbeBatch(torch.randn(3, 3, 64, 32))).snapshot(
                {"student": tiny_vit(img_size=(64, 32))}, step=0
            )
            other.save(tmp_path / "other.npz")
            other_header, arrays = parts(tmp_path / "other.npz")
            header.update(layers=other_header["layers"], flags=[])
        elif how == "one head":
            arrays = {k: v[:, :1] if k.split("/")[0] in ("rows", "distance") else v for k, v in arrays.items()}
            header.update(flags=[])
        else:
            header.update(layers=header["layers"][: data.draw(st.integers(0, 3))], flags=[])
        put_together(path, header, arrays)
    try:
        replay(str(archive), out=str(tmp_path / "out"))
    except ArchiveError as error:
        told = str(error)
        assert str(archive) in told
