"""``python -m pytest_diffopt``."""

from __future__ import annotations

import sys

from pytest_diffopt.command_line.main import main

if __name__ == "__main__":
    sys.exit(main(program="python -m pytest_diffopt"))
