"""The check host_syncs of observations that say little."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pytest_diffopt import Contract, Recipe
from pytest_diffopt.checks import checks_for, host_syncs
from pytest_diffopt.checks.evidence import Evidence
from pytest_diffopt.checks.session import limits_of
from pytest_diffopt.checks.verdict import Verdict
from pytest_diffopt.observation.observation import HostSyncs, HostWait, Observation
from pytest_diffopt.source_places import CodeFrame

RECIPE = Recipe("r", "tiny-flux", contract=Contract(max_host_syncs_per_step=1))
OBSERVED = Observation(RECIPE.to_dict(), RECIPE.content_hash, "sim", "NVIDIA GeForce RTX 4090", {})
PLACE = CodeFrame("net.py", 7, "Net.forward", "if x.any():")


def judged(found: HostSyncs | None, accelerator: str = "sim", device: str = "NVIDIA L4") -> Verdict:
    observation = replace(OBSERVED, host_syncs=found, accelerator=accelerator, device=device)
    return host_syncs.judge(Evidence(RECIPE, observation, limits_of(RECIPE)))


@pytest.mark.parametrize(
    ("found", "accelerator", "sentence"),
    [
        (
            None,
            "cuda",
            "NVIDIA L4 does not tell where the host waits for it; the simulated GPU does: --diffopt-device=sim",
        ),
        (None, "cpu", "the recipe ran on the host, which waits for no GPU"),
        (HostSyncs((0, 0)), "sim", "no denoising step was seen: no component ran in the calls"),
    ],
)
def test_where_nothing_was_counted_it_is_unverified(found: HostSyncs | None, accelerator: str, sentence: str) -> None:
    verdict = judged(found, accelerator)
    assert (verdict.status, verdict.sentence) == ("unverified", sentence)


def test_it_is_there_where_the_contract_has_a_limit() -> None:
    assert "host_syncs" in checks_for(RECIPE)
    assert "host_syncs" not in checks_for(Recipe("r", "tiny-flux"))


def test_the_worst_step_of_the_warm_calls_is_held_to_the_limit_and_offloading_is_apart() -> None:
    wait = HostWait(1, 0, "transformer", "aten::nonzero", PLACE)
    waits = (
        replace(wait, call=0, count=9),  # the warm-up
        wait,
        replace(wait, step=1, count=1),
        replace(wait, step=-1, count=5),
        replace(wait, step=1, offloading=True, count=7),
    )
    passed = judged(HostSyncs((2, 2), waits))
    assert (passed.status, passed.sentence) == (
        "passed",
        "the host waited at most 1 time for the GPU in a denoising step, 1 allowed",
    )
    assert passed.figures == {
        "most_in_a_step": 1,
        "allowed": 1,
        "in_steps": 2,
        "steps": 2,
        "outside_steps": 5,
        "offloading": 7,
        "places": [
            {
                "component": "transformer",
                "file": "net.py",
                "line": 7,
                "function": "Net.forward",
                "why": "aten::nonzero",
                "count": 2,
            }
        ],
    }
    failed = judged(HostSyncs((2, 2), (*waits, replace(wait, step=1, component="", place=None))))
    assert failed.text == (
        "r · host_syncs: the host waited 2 times for the GPU in step 1 of call 1, 1 allowed in a denoising step\n"
        "  transformer net.py:7, in Net.forward (if x.any():): 2 waits in 2 of 2 steps, by aten::nonzero\n"
        "  outside of Python: 1 wait in 1 of 2 steps, by aten::nonzero\n"
        "  not counted: 7 waits of the offloading's own code, which moves weights"
    )


def test_an_observation_of_syncs_goes_to_json_and_back() -> None:
    observation = replace(OBSERVED, host_syncs=HostSyncs((2,), (HostWait(0, 1, "unet", "aten::index", PLACE, PLACE),)))
    assert Observation.from_json(observation.to_json()) == observation
