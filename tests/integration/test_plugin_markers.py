"""The markers on tests that really compile, each file in a process of its own."""

from __future__ import annotations

from pathlib import Path
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

@pytest.mark.diffopt_compile_fullgraph
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

pytestmark = pytest.mark.diffopt_max_recompiles(2)

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

@pytest.mark.diffopt_compile_fullgraph
def test_both_fails(compile_watch):
    run(breaks, (3, 4, 5, 6, 7))
    assert compile_watch.record.graph_breaks

@max_recompiles(1)
def test_the_fixture_is_the_same_watch_passes(compile_watch):
    run(double, (3, 4))
    assert len(compile_watch.record.recompiles) == 1

@pytest.mark.diffopt_max_recompiles(gb=3)
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


@pytest.mark.usefixtures("fresh_python")
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

        @pytest.mark.diffopt_quantization("bitsandbytes_5bit")
        def test_wrong(quantized_pipeline): ...
        """
    )
    result = run_pytest()
    result.assert_outcomes(passed=1, errors=2)
    result.stdout.fnmatch_lines(["quantized_pipeline: the test has no marker quantization: *"])
    result.stdout.fnmatch_lines(["*::test_wrong: quantization: *'bitsandbytes_5bit'*"])


def test_max_memory_holds_the_peak_that_the_accelerator_really_had(
    run_pytest: RunPytest, pytester: pytest.Pytester
) -> None:
    pytester.makepyfile(
        """
        import pytest
        import torch
        from pytest_diffopt import max_memory

        @pytest.fixture(scope="module")
        def weights(accelerator):
            return torch.zeros(1024, dtype=torch.uint8, device=accelerator.device)

        @max_memory(3072)
        def test_at_the_limit(weights, accelerator):
            torch.zeros(2048, dtype=torch.uint8, device=accelerator.device)

        @pytest.mark.diffopt_max_memory("3071B")
        def test_above_it_though_it_is_gone_at_the_end(weights, accelerator):
            torch.zeros(2048, dtype=torch.uint8, device=accelerator.device)

        @max_memory(3071)
        def test_a_reset_in_the_test_hides_nothing(weights, accelerator):
            torch.zeros(2048, dtype=torch.uint8, device=accelerator.device)
            torch.cuda.reset_peak_memory_stats()
            torch.accelerator.reset_peak_memory_stats()

        @max_memory("1GiB")
        def test_its_own_failure_stays_its_own(weights):
            assert False, "my own"
        """
    )
    result = run_pytest("--diffopt-device=sim")
    assert result.parseoutcomes() == {"passed": 1, "failed": 3}
    result.stdout.fnmatch_lines(
        [
            "test_above_it_though_it_is_gone_at_the_end · max_memory: * 3.00 KiB, *; 3.00 KiB allowed (1 bytes more)",
            "test_a_reset_in_the_test_hides_nothing · max_memory: the peak on sim was 3.00 KiB, *",
            "E * my own",
        ]
    )


def test_max_memory_proves_nothing_where_nothing_is_on_the_device(
    run_pytest: RunPytest, pytester: pytest.Pytester
) -> None:
    pytester.makepyfile(
        """
        import torch
        from pytest_diffopt import max_memory

        @max_memory("1GiB")
        def test_on_the_host():
            torch.zeros(2048)

        def test_watch(memory_watch):
            ...
        """
    )
    result = run_pytest("--diffopt-device=sim")
    assert result.parseoutcomes() == {"passed": 1, "failed": 1}
    result.stdout.fnmatch_lines(["test_on_the_host · max_memory: nothing was on sim in this test: *"])
    result = run_pytest("--diffopt-device=cpu", "-rs")
    assert result.parseoutcomes() == {"unverified": 2}
    result = run_pytest("--diffopt-device=cpu", "--diffopt-strict")
    assert result.parseoutcomes() == {"failed": 1, "errors": 1}
    result.stdout.fnmatch_lines(
        ["*memory_watch: unverified: the device in use, cpu, has no memory that could be measured"]
    )


def test_memory_watch_tells_what_a_test_did(run_pytest: RunPytest, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import torch

        def test_watch(memory_watch, accelerator):
            before = memory_watch.before_bytes
            kept = torch.zeros(1000, dtype=torch.uint8).to(accelerator.device)
            more = torch.zeros(500, dtype=torch.uint8, device=accelerator.device)
            del more
            assert memory_watch.peak_bytes - before == 1500
            assert memory_watch.live_bytes - before == 1000
            assert memory_watch.transferred_bytes == {"h2d": 1000, "d2h": 0}
            memory_watch.begin()
            assert memory_watch.peak_bytes - before == 1000
        """
    )
    assert run_pytest("--diffopt-device=sim").parseoutcomes() == {"passed": 1}


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("max_memory(gb=12)", "max_memory has no argument 'gb'. It takes: limit (\"12GiB\", or bytes), *"),
        ('max_memory("much")', "max_memory: limit: found 'much'. It takes: limit (\"12GiB\", or bytes), *"),
        ("max_memory(0)", 'max_memory: limit: found 0. It takes: limit ("12GiB", or bytes), *'),
    ],
)
def test_a_wrong_max_memory_is_named(
    run_pytest: RunPytest, pytester: pytest.Pytester, marker: str, message: str
) -> None:
    pytester.makepyfile(f"import pytest\n\n@pytest.mark.diffopt_{marker}\ndef test_marked(): ...")
    result = run_pytest()
    assert result.parseoutcomes() == {"errors": 1}
    result.stdout.fnmatch_lines([f"*: {message}".replace("[", "[[]")])


def test_a_plain_requires_gpu_refuses_the_simulated_device_and_makes_none(
    run_pytest: RunPytest, pytester: pytest.Pytester
) -> None:
    pytester.makepyfile(
        """
        import torch
        from pytest_diffopt import requires_gpu

        @requires_gpu
        def test_real():
            assert False

        def test_none_was_made():
            assert not torch.cuda.is_available()

        @requires_gpu(simulated=True)
        def test_simulated(accelerator):
            assert accelerator.is_simulated
            torch.zeros(3, device=accelerator.device)

        def test_it_is_gone_again():
            assert not torch.cuda.is_available()
        """
    )
    result = run_pytest("--diffopt-device=sim", "-rs")
    assert result.parseoutcomes() == {"skipped": 1, "passed": 3}
    result.stdout.fnmatch_lines(["*a simulated one (simulated=True accepts it)"])


def test_without_a_compiler_the_simulated_device_leaves_all_unverified(
    run_pytest: RunPytest, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("DIFFOPT_CACHE_DIR", str(tmp_path))
    pytester.makefile(".recipes.toml", small='[recipe.small]\npipeline = "factories:model"\n')
    pytester.makepyfile(factories="from torch.nn import Linear\n\ndef model():\n    return Linear(2, 2)\n")
    pytester.makepyfile(
        """
        from pytest_diffopt import requires_gpu, max_memory

        @requires_gpu(simulated=True)
        def test_gpu(): ...

        @max_memory("1GiB")
        def test_memory(): ...
        """
    )
    result = run_pytest("--diffopt-device=sim", "-rs", "-p", "no:cacheprovider")
    assert result.parseoutcomes() == {"skipped": 1, "unverified": 3}
    result.stdout.fnmatch_lines(
        ["*The simulated accelerator is built on first use and needs a C++20 compiler; CXX is*"]
    )


GARBAGE = """
import gc

import torch
from pytest_diffopt import max_memory, requires_gpu
from torch import nn

BYTES = 512 * 512 * 4


class Pipe:
    def __init__(self, device):
        self.encoder = nn.Linear(512, 512, device=device)
        self.me = self  # as pipelines and their hooks have it: a cycle


def leaves_garbage(accelerator):
    pipe = Pipe(accelerator.device)
    gc.collect()  # it is old by now, as a pipeline that was loaded is
    assert pipe


def freed_bytes(accelerator, memory_watch, held):
    pipe = Pipe(accelerator.device)
    cache = [pipe.encoder] if held else []
    full = memory_watch.live_bytes
    pipe.encoder = None
    gc.collect()
    return full - memory_watch.live_bytes, cache


@requires_gpu(simulated=True)
def test_one(accelerator):
    leaves_garbage(accelerator)


@requires_gpu(simulated=True)
def test_held_memory_fails(accelerator, memory_watch):
    freed, cache = freed_bytes(accelerator, memory_watch, held=True)
    assert freed >= BYTES, cache


@requires_gpu(simulated=True)
def test_another(accelerator):
    leaves_garbage(accelerator)


@requires_gpu(simulated=True)
def test_freed_memory_passes(accelerator, memory_watch):
    freed, _ = freed_bytes(accelerator, memory_watch, held=False)
    assert freed >= BYTES


@requires_gpu(simulated=True)
def test_a_third(accelerator):
    leaves_garbage(accelerator)


@requires_gpu(simulated=True)
@max_memory("1.5MiB")
def test_a_limit_passes(accelerator):
    nn.Linear(512, 512, device=accelerator.device)
"""


@pytest.mark.parametrize("alone", [False, True])
def test_what_earlier_tests_left_is_none_of_the_next_ones_memory(
    run_pytest: RunPytest, pytester: pytest.Pytester, alone: bool
) -> None:
    pytester.makepyfile(test_garbage=GARBAGE)
    result = run_pytest("-p", "no:cacheprovider", "-rA", *(["-k", "passes or fails"] if alone else []))
    assert result.parseoutcomes().get("failed") == 1, result.stdout.str()
    result.stdout.fnmatch_lines(["FAILED test_garbage.py::test_held_memory_fails*"])
