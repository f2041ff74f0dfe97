"""Puts a browser for the tests of the HTML report into a folder: Chromium and playwright's driver, out of npm's registry.

    python tools/browser.py .tox/browser

No root, and nothing outside of the folder but Chromium itself, unpacked into the temporary folder. Without npm it says
so and does nothing: the tests that need a browser are then skipped with that reason.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGES = {"@sparticuz/chromium": "147.0.0", "playwright-core": "1.65.1"}


def main(folder: Path) -> int:
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        print("no npm and node here: the tests that open a report in a browser are skipped")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "package.json").write_text(json.dumps({"private": True, "dependencies": PACKAGES}), encoding="utf-8")
    command = [npm, "install", "--no-audit", "--no-fund", "--loglevel=error", "--prefix", str(folder)]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]).resolve()))
