"""memory: the peak falls when a recipe offloads. This release cannot tell, and says so: unverified, never a pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_diffopt.checks.evidence import Evidence

if TYPE_CHECKING:
    from pytest_diffopt.checks.verdict import Verdict

NAME = "memory"


def judge(given: Evidence) -> Verdict:
    """Unverified, whatever the device."""
    return given.unverified(
        NAME,
        f"this release does not judge memory; the device in use is {given.observation.accelerator}",
        peak_bytes=given.observation.peak_bytes,
    )
