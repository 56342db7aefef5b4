"""The commands, as a user runs them."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import resource
import shlex
import socketserver
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import attn_monitor
from attn_monitor import AttentionMapCallback, AttentionSnapshot, ProbeBatch
from attn_monitor.commands import cli
from attn_monitor.commands.replay import replay
from attn_monitor.commands.show import show
from attn_monitor.draw import canvas as drawing
from attn_monitor.weights.models import load_model
from tests.support import forked
from tests.support.helpers import Distillation, loader, trainer
from tests.support.releases import JSONARGPARSE
from tests.support.runs import write_run
from tests.support.tiers import sweep

MODEL = "tests.support.helpers:tiny_vit"


def command(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    pipes = {"capture_output": True} if "stdout" not in options else {"stderr": subprocess.PIPE}
    return forked.run([sys.executable, "-m", "attn_monitor", *arguments], text=True, **pipes, **options)


def mistake(*arguments: str, **options: Any) -> str:
    """What a command says that fails: one line, and status 1."""
    ran = command(*arguments, **options)
    assert ran.returncode == 1, ran.stderr
    (line,) = (x for x in ran.stderr.splitlines() if x.startswith("attn-monitor: "))
    assert "Traceback" not in ran.stderr
    assert ran.stderr.endswith(line + "\n")
    return line


@pytest.mark.slow
def test_check_prints_what_it_found() -> None:
    ran = command("check", MODEL, "--size", "[32, 64]")
    assert ran.returncode == 0, ran.stderr
    assert "2 attention layers" in ran.stdout
    assert "blocks.1.attn" in ran.stdout
    assert "grid 4 × 8 (places exact) + 1 prefix" in ran.stdout
    assert "of a forward pass" in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("check", "torchvision:resnet18"), "no attention was observed in ResNet"),
        (("check", "vit"), "expected timm:NAME"),
        (("check", "vit_small_patch16_224"), "did you mean timm:vit_small_patch16_224?"),
        (("show", MODEL, "nowhere", "--size", "32"), "nowhere: does not exist"),
        (("replay", "nowhere"), "nowhere: does not exist; expected the attn_monitor folder of a run, or the log"),
        (("summary", "tests"), "tests: no snapshots (step-*.npz) here; expected the attn_monitor folder of a run"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], text: str) -> None:
    assert text in mistake(*arguments)


def test_options_are_spelled_as_users_spell_them() -> None:
    assert cli.spelled_out(["m", "--weights", "--num-images=2", "--size", "32"], show) == [
        *("m", "--weights=true", "--num_images=2", "--size", "32")
    ]
    kept = ["m", "a-b", "--weights", "false", "--out", "my-folder"]
    assert cli.spelled_out(kept, show) == kept
    for given in (["--bands", "3,2,1"], ["--bands=3, 2, 1"], ["--bands", "(3,2,1)"], ["--bands", "[3,2,1]"]):
        parsed = cli.parser_of(show).parse_args(cli.spelled_out(["m", "images", *given], show))
        assert parsed.bands == (3, 2, 1)
    assert cli.parser_of(show).parse_args(cli.spelled_out(["m", "images", "--bands", "5"], show)).bands == (5,)


def test_a_configuration_that_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\x80\x81")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["summary", "run", "--config", str(tmp_path / "x.yaml")])
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "command", "named"),
    [
        ("", "", ["no command"]),
        ("shwo m", "", ["'shwo'", "check, show", "did you mean show?"]),
        ("show m", "show", ["required", "images"]),
        ("backfill x --out o", "backfill", ["required", *(["model", "probe"] if JSONARGPARSE > (4, 44) else [])]),
        ("show m i --sizes 3", "show", ["unrecognized", "--sizes 3"]),
        ("show m i --size", "show", ["--size", "expected one argument"]),
        ("show m i --size abc", "show", ["size", "int", "tuple", "abc"]),
        ("show m i --num-images 1.5", "show", ["num_images", "int", "1.5"]),
        ("replay r --format avi", "replay", ["format", "webp", "mp4", "gif", "avi"]),
        ("show m i --config nowhere.yaml", "show", ["config", "nowhere.yaml"]),
        ("show m i --out=", "show", ["out is empty"]),
    ],
)
def test_wrong_usage_is_one_line_that_names_the_option_and_the_help(
    words: str, command: str, named: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(words.split())
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    name = f"attn-monitor {command}".rstrip()
    assert line.startswith(f"{name}: ")
    assert line.endswith(f" (see {name} --help)")
    assert [
        text for text in named if text not in line.replace("Unrecognized", "unrecognized")
    ] == []  # jsonargparse 4.40
    assert printed.out == ""


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_is_a_module_whose_docstring_is_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main([name, "--help"])
    printed = capsys.readouterr().out
    assert str(importlib.import_module(f"attn_monitor.commands.{name}").__doc__).strip() in printed
    assert [noise for noise in ("Optional[", "Union[", "print_config", " | null", "(type:") if noise in printed] == []
    assert [word for word in printed.split() if word.startswith("--") and "_" in word] == []


WRONG = [
    "shwo",
    "",
    "show m",
    "show m i --sizes 3",
    "show m i --size abc",
    "replay r --format avi",
    "show m i --cell 0",
]


@pytest.mark.parametrize("words", ["--help", "--version", "backfill --help", *WRONG])
def test_help_and_wrong_usage_need_no_pytorch(words: str) -> None:
    code = (
        "import sys\nfrom attn_monitor.__main__ import main\ntry:\n    main()\n"
        "finally:\n    assert 'torch' not in sys.modules, 'imported'"
    )
    ran = subprocess.run([sys.executable, "-c", code, *words.split()], capture_output=True, text=True)
    assert ran.returncode == (2 if words in WRONG else 0)
    assert "imported" not in ran.stderr
    assert all(name in ran.stdout for name in cli.COMMANDS) == (words == "--help")
    assert (ran.stdout == f"attn-monitor {attn_monitor.__version__}\n") == (words == "--version")


@pytest.mark.slow
def test_check_groups_layers_that_are_refused_for_one_reason(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["check", "torchvision:swin_v2_t", "--query", "3"])
    refused = [line for line in capsys.readouterr().out.splitlines() if "refused" in line]
    assert [line.split(" ", 5)[:5] for line in map(str.strip, refused)] == [
        ["0", "to", "1", "1.0.attn", "to"],
        ["2", "to", "3", "3.0.attn", "to"],
        ["4", "to", "9", "5.0.attn", "to"],
    ]


def test_check_fails_where_nothing_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        cli.main(["check", MODEL, "--size", "32", "--query", "[9, 9]"])
    assert "can be read nowhere" in capsys.readouterr().out


def test_weights_at_random_are_the_same_each_time(tmp_path: Path, photographs: Path) -> None:
    for name in ("a", "b"):
        words = [MODEL, str(photographs / "coffee.png"), "--size", "32", "--weights", "false", "--out"]
        cli.main(["show", *words, str(tmp_path / name)])
    a, b = (AttentionSnapshot.load(tmp_path / name / "attention.npz").rows("backbone", 1) for name in ("a", "b"))
    assert torch.equal(a, b)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_has_an_example_to_copy(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main([name, "--help"])
    (example,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("Example: "))
    words = shlex.split(example.removeprefix("Example: attn-monitor "))
    assert words[0] == name
    command = cli.command_of(words)
    assert cli.parser_of(command).parse_args(cli.spelled_out(words[1:], command))


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_is_parsed_as_its_function_is_declared(name: str) -> None:
    function = getattr(importlib.import_module(f"attn_monitor.commands.{name}"), name)
    declared = cli.command_of([name])
    assert inspect.signature(declared) == inspect.signature(function, eval_str=True)
    assert declared.__doc__ == function.__doc__


def test_places_that_cannot_be_written_to(tmp_path: Path, photographs: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    show = ("show", MODEL, str(photographs / "coffee.png"), "--size", "32", "--weights", "false", "--out")
    line = mistake(*show, str(tmp_path / "file"))
    assert f"out={tmp_path / 'file'}: cannot be written to ({tmp_path / 'file'} is a file)" in line
    assert f"out={tmp_path / 'file' / 'below'}: cannot be written to ({tmp_path / 'file'} is a file" in mistake(
        *show, str(tmp_path / "file" / "below")
    )
    assert "out=/sys/attention: cannot be written to (" in mistake(*show, "/sys/attention")


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Two snapshots of a student and a teacher."""
    probe = ProbeBatch(torch.randn(2, 3, 32, 32), names=["cat", "größe 1"])
    write_run(tmp_path / "archive", (0, 3), sharpness=(0, 6), probe=probe)
    return tmp_path / "archive"


@pytest.mark.parametrize("name", sweep(["replay", "show"], quick=1))
def test_no_room_for_pictures(tmp_path: Path, photographs: Path, archive: Path, name: str) -> None:
    """A file may not grow beyond some kilobytes, as on a full disk; no half picture stays."""
    subject = (MODEL, str(photographs / "coffee.png"), "--size", "32", "--weights", "false")
    arguments = subject if name == "show" else (str(archive),)
    out = tmp_path / "out"

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))  # PyTorch 2.9 writes 2355 bytes when imported

    line = mistake(name, *arguments, "--out", str(out), preexec_fn=small_files)
    assert f"out={out}: cannot be written to (File too large); pass another folder, or make room" in line
    assert [path.name for path in out.iterdir() if path.stat().st_size] == []


def test_nowhere_to_print(photographs: Path) -> None:
    with open("/dev/full", "w") as full:
        ran = command("check", MODEL, "--size", "32", stdout=full)
    assert ran.returncode == 1
    (line,) = ran.stderr.splitlines()
    assert line.startswith("attn-monitor: standard output cannot be written to (No space left on device); make room")


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("timm:vit_base_patch16_225", "timm knows no 'vit_base_patch16_225'; did you mean vit_base_patch16_224"),
        ("timm:vit_base_patch16_224.none", "Invalid pretrained tag (none) for vit_base_patch16_224"),
        ("torchvision:vit_b_17", "torchvision knows no 'vit_b_17'; did you mean vit_b_16"),
    ],
)
def test_unknown_names(model: str, text: str) -> None:
    assert text in mistake("check", model)


class Silent(socketserver.BaseRequestHandler):
    """Takes a connection and answers nothing."""

    def handle(self) -> None:
        self.request.settimeout(60)
        with contextlib.suppress(OSError):
            while self.request.recv(1000):
                pass


@pytest.mark.parametrize("network", sweep(["silent", "refused"], quick=1))
@pytest.mark.parametrize("model", sweep(["timm:vit_tiny_patch16_224", "hf:google/vit-base-patch16-224"], quick=1))
def test_without_network_the_answer_comes_at_once(
    tmp_path: Path, photographs: Path, free_port: int, network: str, model: str
) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE" and "proxy" not in k.lower()}
    environment.update(HF_ENDPOINT=f"http://127.0.0.1:{free_port}", HF_HOME=str(tmp_path), NO_PROXY="127.0.0.1")
    server = None
    if network == "silent":
        server = socketserver.ThreadingTCPServer(("127.0.0.1", free_port), Silent)
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, daemon=True).start()
    started = time.monotonic()
    mistake("show", "timm:unknown", str(photographs / "coffee.png"), env=environment)
    importing, started = time.monotonic() - started, time.monotonic()
    try:
        line = mistake("show", model, str(photographs / "coffee.png"), env=environment)
    finally:
        if server is not None:
            server.shutdown()
            server.server_close()
    waited = time.monotonic() - started - importing
    assert waited < 30, "the hub's own client takes a minute more"
    assert "does not answer, and nothing is cached" in line
    assert ("--checkpoint FILE" in line and "--weights false" in line) == model.startswith("timm")


@pytest.mark.parametrize("wrong", ["snapshot", "probe", "names", "missing"])
def test_replay_of_damaged_archives(archive: Path, tmp_path: Path, wrong: str) -> None:
    expected = {
        "snapshot": "step-000000003.npz: the file is not readable",
        "probe": "probe.npz: the file is not readable",
        "names": "step 0 shows cat, größe 1, and probe.npz holds grey: these are files of two runs",
        "missing": "probe.npz: does not exist; it holds the images that the snapshots were taken of",
    }
    if wrong == "names":
        ProbeBatch(torch.randn(1, 3, 32, 32), names=["grey"]).save(archive / "probe.npz")
    elif wrong == "missing":
        (archive / "probe.npz").unlink()
    else:
        next(archive.glob(f"{wrong}*" if wrong == "probe" else "step*3.npz")).write_bytes(b"damaged")
    line = mistake("replay", str(archive), "--out", str(tmp_path / "out"))
    assert expected[wrong] in line
    assert "archive" in line


def test_show_draws_a_folder(tmp_path: Path, photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(MODEL, str(photographs), out=str(tmp_path), size=(32, 48), layers="all", weights=False)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {f"{n}-layer{i}.png" for n in ("astronaut", "chelsea", "coffee", "rocket") for i in (0, 1)} | {
        "attention.npz",
        "probe.npz",
    }
    assert AttentionSnapshot.load(tmp_path / "attention.npz").maps("backbone").shape == (4, 4, 4, 6)
    assert np.asarray(Image.open(tmp_path / "coffee-layer1.png")).std() > 10
    metrics = AttentionSnapshot.load(tmp_path / "attention.npz").metrics
    assert f"backbone, layer 0: entropy {metrics['attn/backbone/layer0/entropy']:.3g}" in capsys.readouterr().out


def test_show_against_ground_truth(tmp_path: Path, photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The masks' outline is drawn and the Jaccard index printed, for a single image too."""
    (tmp_path / "masks").mkdir()
    mask = np.zeros((300, 451), np.uint8)
    mask[60:240, 100:350] = 1
    Image.fromarray(mask).save(tmp_path / "masks" / "chelsea.png")
    image, out = str(photographs / "chelsea.png"), tmp_path / "out"
    show(MODEL, image, out=str(out), size=64, weights=False, masks=str(tmp_path / "masks"), metrics=["jaccard"])
    printed = capsys.readouterr().out
    assert "jaccard_best_head 0." in printed
    assert "entropy" not in printed
    drawn = np.asarray(Image.open(out / "chelsea-layer1.png")).astype(int)
    assert (np.abs(drawn - drawing.TRUTH).sum(-1) < 30).sum() > 200


def test_show_one_image_from_a_training_checkpoint(tmp_path: Path, photographs: Path) -> None:
    """The teacher's weights are found inside a Lightning checkpoint, whatever their prefix."""
    module = Distillation()
    running = trainer(tmp_path, max_steps=2, enable_checkpointing=True)
    running.fit(module, loader())
    running.save_checkpoint(tmp_path / "x.ckpt")
    loaded = load_model(MODEL, checkpoint=str(tmp_path / "x.ckpt"))
    for name, value in module.teacher_backbone.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    image = photographs / "coffee.png"
    show(MODEL, str(image), out=str(tmp_path / "o"), size=32, checkpoint=str(tmp_path / "x.ckpt"))
    assert (tmp_path / "o" / "coffee-layer1.png").exists()


@pytest.mark.slow
def test_replay_redraws_a_run(tmp_path: Path) -> None:
    trainer(tmp_path, AttentionMapCallback(), max_steps=3).fit(Distillation(), loader())
    replay(str(tmp_path / "run" / "version_0" / "attn_monitor"), out=str(tmp_path / "o"))
    with Image.open(tmp_path / "o" / "image0.webp") as animation:
        assert animation.n_frames == 4
    assert (tmp_path / "o" / "image3-filmstrip.png").exists()
    assert (tmp_path / "o" / "image0-panel.png").exists()


@pytest.mark.parametrize("start", [["-m", "attn_monitor"], ["-c", "from attn_monitor.__main__ import main; main()"]])
def test_an_interrupt_is_one_line(tmp_path: Path, start: list[str]) -> None:
    """While a command's module imports PyTorch."""
    (tmp_path / "torch").mkdir()
    handled = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # whatever started the tests ignores it or not
    (tmp_path / "torch" / "__init__.py").write_text(
        f"import os, signal\n{handled}\nos.kill(os.getpid(), signal.SIGINT)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()])}
    ran = subprocess.run([sys.executable, *start, "check", "model"], capture_output=True, text=True, env=environment)
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "attn-monitor: interrupted\n")


@pytest.mark.parametrize("words", ["--help", "show --help", "summary ARCHIVE"])
def test_a_reader_that_has_had_enough_is_no_mistake(archive: Path, words: str) -> None:
    command = [sys.executable, "-m", "attn_monitor", *words.replace("ARCHIVE", str(archive)).split()]
    with forked.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()  # before anything is written, as `head` does after its lines
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode in (0, 1)  # argparse takes it for no error


def test_replay_refuses_an_impossible_threshold(archive: Path, tmp_path: Path) -> None:
    ran = command("replay", str(archive), "--out", str(tmp_path / "o"), "--threshold", "2")
    assert ran.returncode == 2
    assert "threshold=2.0: expected a share of attention mass above 0 and up to 1" in ran.stderr
    assert not (tmp_path / "o").exists()
