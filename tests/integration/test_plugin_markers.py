"""The markers on tests that really compile, each file in a process of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import RunPytest

pytest.importorskip("torch")

TOY = """
import pytest
import torch


def double(x):
    return x * 2


def breaks(x):
    x = x + 1
    print("between")
    return x * 2


def compiled(function):
    return torch.compile(function, backend="eager", dynamic=False)


def run(function, sizes=(3,)):
    made = compiled(function)
    for size in sizes:
        made(torch.ones(size))
"""


def test_compile_fullgraph_passes_fails_and_is_not_fooled(run_pytest: RunPytest, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        TOY
        + """
from pytest_diffopt import compile_fullgraph
from hypothesis import given, settings, strategies as st
import unittest


@compile_fullgraph
def test_one_graph_passes():
    run(double)

@pytest.mark.compile_fullgraph
def test_break_fails():
    run(breaks)

@compile_fullgraph
def test_nothing_fails():
    double(torch.ones(3))

@compile_fullgraph()
def test_limit_fails():
    run(double, range(2, 15))

@compile_fullgraph
def test_own_failure_is_left():
    assert 1 == 2, "my own"

@compile_fullgraph
def test_own_skip_is_left():
    pytest.skip("mine")

@compile_fullgraph
class TestClass:
    def test_method_passes(self):
        run(double)

    @pytest.mark.parametrize("function", [double, pytest.param(breaks, marks=pytest.mark.xfail(strict=True))])
    def test_parametrized_passes(self, function):
        run(function)

@pytest.mark.parametrize("function", [pytest.param(double, marks=compile_fullgraph, id="marked"), breaks])
def test_param_mark_passes(function):
    run(function)

@compile_fullgraph
@settings(max_examples=5, deadline=None)
@given(st.floats(0, 1))
def test_hypothesis_passes(x):
    compiled(double)(torch.tensor(x))

class TestUnit(unittest.TestCase):
    @compile_fullgraph
    def test_unittest_fails(self):
        run(breaks)

    @compile_fullgraph
    def test_unittest_own_failure_is_left(self):
        assert 1 == 2, "my own"
"""
    )
    result = run_pytest("-v", "--strict-markers", "-p", "no:randomly")
    lines = [line.split()[:2] for line in result.outlines if "::" in line and "[ " in line]
    for name, outcome in lines:
        test = name.rpartition("::")[2]
        if test == "test_parametrized_passes[breaks]":
            assert outcome == "XFAIL"
        elif not test.endswith("is_left"):
            assert (test, outcome) == (test, "FAILED" if test.endswith("_fails") else "PASSED")
    assert result.parseoutcomes() == {"passed": 6, "failed": 6, "skipped": 1, "xfailed": 1}
    result.stdout.fnmatch_lines(
        [
            "test_break_fails · compile_fullgraph: 1 graph break; it allows one graph a frame, run at every call",
            "  breaks  *.py:*  1×  *",
            "  *print*",
            "test_nothing_fails · compile_fullgraph: nothing was compiled in this test",
            "test_limit_fails · compile_fullgraph: * over the recompile limit, compiled code ran in 8 of 13 calls; *",
            "*my own*",
        ]
    )
    result.stdout.no_fnmatch_line("*torch.__trace*")


def test_max_recompiles_counts_and_is_not_fooled(run_pytest: RunPytest, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        TOY
        + """
from pytest_diffopt import max_recompiles

pytestmark = pytest.mark.max_recompiles(2)

def test_module_limit_passes():
    run(double, (3, 4, 5))

def test_module_limit_plus_one_fails():
    run(double, (3, 4, 5, 6))

@max_recompiles(0)
def test_the_closest_fails():
    run(double, (3, 4))

@max_recompiles(0)
def test_caches_of_earlier_tests_do_not_count_passes():
    run(double, (7,))

@max_recompiles(1000)
def test_an_exhausted_limit_fails():
    run(double, range(2, 30))

def test_nothing_fails():
    pass

@pytest.mark.compile_fullgraph
def test_both_fails(compile_watch):
    run(breaks, (3, 4, 5, 6, 7))
    assert compile_watch.record.graph_breaks

@max_recompiles(1)
def test_the_fixture_is_the_same_watch_passes(compile_watch):
    run(double, (3, 4))
    assert len(compile_watch.record.recompiles) == 1

@pytest.mark.max_recompiles(gb=3)
def test_wrong_argument_errors():
    run(double)

@max_recompiles(3)
def test_settings_are_given_back():
    torch._dynamo.config.recompile_limit = 77
    run(double)

@max_recompiles(3)
def test_settings_were_given_back():
    assert torch._dynamo.config.recompile_limit != 77
    run(double)
"""
    )
    result = run_pytest("-v", "-W", "error::pytest.PytestWarning")
    assert result.parseoutcomes() == {"passed": 5, "failed": 5, "errors": 1}, result.stdout.str()
    for line in (
        "*::test_wrong_argument_errors: max_recompiles has no argument 'gb'. It takes: limit (an int, at least 0).",
        "test_module_limit_plus_one_fails · max_recompiles: 3 recompiles, 2 allowed",
        "  double  *.py:*  1×  guard *",
        "test_the_closest_fails · max_recompiles: 1 recompile, 0 allowed",
        "test_an_exhausted_limit_fails · max_recompiles: * 1000 allowed; the recompile_limit was exhausted, *",
        "test_nothing_fails · max_recompiles: nothing was compiled in this test",
        "test_both_fails · compile_fullgraph: 5 graph breaks*",
        "test_both_fails · max_recompiles: * recompiles, 2 allowed",
    ):
        result.stdout.fnmatch_lines([line])


def test_requires_gpu_skips_with_the_reason_at_the_tests_own_place(
    run_pytest: RunPytest, pytester: pytest.Pytester
) -> None:
    pytester.makepyfile(
        """
        import sys
        from pytest_diffopt import requires_gpu

        assert "torch" not in sys.modules

        @requires_gpu
        def test_bare(): ...

        @requires_gpu(min_memory="12GiB", simulated=True)
        def test_called(): ...

        def test_device(accelerator):
            assert accelerator.kind == "cpu"
        """
    )
    result = run_pytest("-rs", "--diffopt-device=cpu")
    assert result.parseoutcomes() == {"skipped": 2, "passed": 1}
    where = "test_requires_gpu_skips_with_the_reason_at_the_tests_own_place.py"
    result.stdout.fnmatch_lines([f"SKIPPED * {where}:6: requires_gpu: no GPU; the device in use is cpu"])


def test_a_device_that_is_not_there_is_told(run_pytest: RunPytest, pytester: pytest.Pytester) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    pytester.makepyfile("def test_device(accelerator): ...")
    result = run_pytest("--diffopt-device=cuda")
    assert result.parseoutcomes() == {"errors": 1}
    result.stdout.fnmatch_lines(
        ["device: found 'cuda', which this machine does not have; here it takes: auto, sim, cpu"]
    )


def test_quantized_pipeline_is_what_the_marker_says(run_pytest: RunPytest, pytester: pytest.Pytester) -> None:
    pytest.importorskip("bitsandbytes")
    pytester.makepyfile(
        """
        import pytest
        from pytest_diffopt import quantization

        @quantization("bitsandbytes_4bit", components="transformer", bnb_4bit_quant_type="nf4")
        def test_quantized(quantized_pipeline):
            kinds = {type(module).__name__ for module in quantized_pipeline.transformer.modules()}
            assert "Linear4bit" in kinds
            assert "Linear4bit" not in {type(module).__name__ for module in quantized_pipeline.text_encoder.modules()}

        def test_unmarked(quantized_pipeline): ...

        @pytest.mark.quantization("bitsandbytes_5bit")
        def test_wrong(quantized_pipeline): ...
        """
    )
    result = run_pytest()
    result.assert_outcomes(passed=1, errors=2)
    result.stdout.fnmatch_lines(["quantized_pipeline: the test has no marker quantization: *"])
    result.stdout.fnmatch_lines(["*::test_wrong: quantization: *'bitsandbytes_5bit'*"])
