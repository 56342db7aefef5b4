"""Build the wheel, install it without its dependencies into a clean environment, and import every module there."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def main() -> None:
    """Exit with an error when the wheel lacks a module or its type marker."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", folder, str(ROOT)], check=True)
        wheel = next(Path(folder).glob("*.whl"))
        venv.create(Path(folder) / "venv", with_pip=True)
        python = Path(folder) / "venv" / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True)
        # torch alone is gigabytes: the dependencies are lent from this environment, the package itself is not.
        here = next(p for p in sys.path if p.endswith("site-packages"))
        paths = (path.relative_to(ROOT).with_suffix("") for path in (ROOT / "attn_monitor").rglob("*.py"))
        modules = [".".join(path.parts).removesuffix(".__init__") for path in paths]  # of every folder
        code = (
            f"import sys; sys.path.append({here!r})\n"
            "import importlib, pathlib, attn_monitor, attn_monitor_auto, attn_monitor_tensorboard\n"
            f"for name in {modules!r}: importlib.import_module(name)\n"
            "where = pathlib.Path(attn_monitor.__file__).parent\n"
            "assert 'venv' in where.parts and (where / 'py.typed').exists(), where\n"
            "from attn_monitor.player.page import page_of_server; assert len(page_of_server()) > 50_000\n"
            "print('wheel: imports', attn_monitor.__all__)"
        )
        subprocess.run([python, "-I", "-c", code], check=True, cwd=folder)


if __name__ == "__main__":
    main()
