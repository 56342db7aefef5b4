"""Check the player's JavaScript with the tools of package.json: types (tsc), rules (eslint), format (prettier).

Node comes with the dev extra, the tools from npm's registry. Where that cannot be reached, nothing is checked.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
NO_NETWORK = re.compile(
    r"^npm error code (ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|E(NET|HOST)UNREACH|ETIMEDOUT|ERR_SOCKET_TIMEOUT)$",
    re.M,
)


def npm(*arguments: str, **options: bool) -> subprocess.CompletedProcess[str]:
    """Run npm of this environment."""
    binaries = str(Path(sys.executable).parent)
    env = {**os.environ, "PATH": os.pathsep.join([binaries, os.environ["PATH"]])}
    return subprocess.run([f"{binaries}/npm", *arguments], cwd=ROOT, env=env, text=True, **options)


def main() -> None:
    """Install the tools where package-lock.json is newer than they are, and run them; exit with their status."""
    lock, installed = ROOT / "package-lock.json", ROOT / "node_modules" / ".package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < lock.stat().st_mtime:
        installation = npm("ci", "--no-progress", "--fetch-retries=1", capture_output=True)
        if NO_NETWORK.search(installation.stderr):
            print(f"{installation.stderr}\nNOTICE: npm's registry cannot be reached, so the JavaScript is not checked.")
            return
        if installation.returncode:
            sys.exit(installation.stderr)
    sys.exit(npm("run", "--silent", "check").returncode)


if __name__ == "__main__":
    main()
