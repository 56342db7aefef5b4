"""Optional packages stay optional: importing ours loads none of them."""

from __future__ import annotations

import subprocess
import sys


def test_heavy_and_optional_packages_are_imported_lazily() -> None:
    code = (
        "import sys, lightning.pytorch\n"
        "before = set(sys.modules)\n"
        "import attn_monitor, attn_monitor.cli\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "heavy = {'wandb', 'matplotlib', 'timm', 'transformers', 'mlflow', 'scipy', 'av'}\n"
        "print(sorted(new & heavy))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
