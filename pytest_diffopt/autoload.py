"""What torch calls at the end of its own import, by its entry points ``torch.backends``: each import of torch pays for it."""

from __future__ import annotations

import os


def autoload() -> None:
    """Enter the simulated GPU that ``DIFFOPT_GPU`` names; without it nothing is imported."""
    if os.environ.get("DIFFOPT_GPU"):
        from pytest_diffopt.accelerators.whole_process import enter_for_good

        enter_for_good()
