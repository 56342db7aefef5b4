"""What would be released: built twice to the same bytes, installed without its dependencies, imported and typed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# Types of other packages are not the point, and reading PyTorch's takes a minute.
MYPY = """[mypy]
strict = true
[mypy-torch.*,lightning.*,numpy.*,PIL.*]
follow_imports = skip
follow_imports_for_stubs = true
"""


def main() -> None:
    """Exit with an error when the wheel lacks a module, or a program that uses it is not typed."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        wheel = build(folder)
        venv.create(folder / "venv", with_pip=True)
        python = folder / "venv" / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True)
        # torch alone is gigabytes: the dependencies are lent from this environment, the package itself is not.
        lent = "\n".join(p for p in sys.path if p.endswith("site-packages"))
        next((folder / "venv" / "lib").glob("*/site-packages")).joinpath("lent.pth").write_text(lent)
        import_all(python, folder)
        check_types(python, folder)


def build(folder: Path) -> Path:
    """Build sdist and wheel in two places, compare them, and have PyPI's rules checked."""
    places = [folder / "first", folder / "second"]
    for place in places:
        subprocess.run([sys.executable, "-m", "build", "--quiet", "--outdir", place, ROOT], check=True)
    files = sorted(places[0].iterdir())
    assert [file.suffix for file in files] == [".whl", ".gz"], files
    for file in files:
        assert file.read_bytes() == (places[1] / file.name).read_bytes(), f"{file.name} is not reproducible"
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], check=True)
    with zipfile.ZipFile(files[0]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        relative = re.findall(r"\]\((?!https?:)[^)]*\)", wheel.read(name).decode())
    assert not relative, f"links that lead nowhere on an index: {relative}"
    return files[0]


def import_all(python: Path, folder: Path) -> None:
    """Import every module of the package from the wheel."""
    paths = (path.relative_to(ROOT).with_suffix("") for path in (ROOT / "attn_monitor").rglob("*.py"))
    modules = [".".join(path.parts).removesuffix(".__init__") for path in paths]  # of every folder
    code = (
        "import importlib, pathlib, attn_monitor, attn_monitor_auto, attn_monitor_tensorboard\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "where = pathlib.Path(attn_monitor.__file__).parent\n"
        "assert 'venv' in where.parts and (where / 'py.typed').exists(), where\n"
        "from attn_monitor.player.page import page_of_server; assert len(page_of_server()) > 50_000\n"
        "print('wheel: imports', attn_monitor.__all__)"
    )
    subprocess.run([python, "-I", "-c", code], check=True, cwd=folder)


def check_types(python: Path, folder: Path) -> None:
    """Check a user's program against the wheel: mypy, and pyright where npm's registry could be reached."""
    program = folder / "program" / "consumer.py"
    program.parent.mkdir()
    shutil.copy(Path(__file__).with_name("consumer.py"), program)
    (program.parent / "mypy.ini").write_text(MYPY)
    mypy = [sys.executable, "-m", "mypy", "--python-executable", python, "--cache-dir", folder / "cache", program.name]
    subprocess.run(mypy, check=True, cwd=program.parent)
    pyright = ROOT / "node_modules" / "pyright" / "index.js"
    if pyright.exists():
        node = Path(sys.executable).with_name("node")
        subprocess.run([node, pyright, "--pythonpath", python, program], check=True, cwd=program.parent)


if __name__ == "__main__":
    main()
