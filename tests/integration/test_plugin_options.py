"""The options, as a run takes them; and what loading the plugin costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import RunPytest


@pytest.mark.usefixtures("fresh_python")
def test_loading_the_plugin_imports_nothing_heavy(run_pytest: RunPytest, pytester: pytest.Pytester) -> None:
    pytester.makepyfile("import pytest_diffopt\n\ndef test_a(): dir(pytest_diffopt)")
    pytester.makeconftest(
        """
        import sys

        def pytest_unconfigure():
            heavy = ["torch", "pydantic", "rich", "numpy", "diffusers", "transformers"]
            print("HEAVY", [name for name in heavy if name in sys.modules], "pytest_diffopt.plugin" in sys.modules)
        """
    )
    result = run_pytest()
    result.stdout.fnmatch_lines(["HEAVY [[]] True"])


def test_every_public_name_is_there(run_pytest: RunPytest, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest_diffopt
        import pytest

        @pytest.mark.parametrize("name", pytest_diffopt.__all__)
        def test_name(name):
            assert name in dir(pytest_diffopt)
            getattr(pytest_diffopt, name)

        def test_no_other():
            with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
                pytest_diffopt.nothing
        """
    )
    result = run_pytest("-q")
    assert result.ret == 0, result.stdout.str()


def test_the_header_says_the_settings(run_pytest: RunPytest, pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_a(): pass")
    run_pytest().stdout.fnmatch_lines(["diffopt: device auto, compile backend as the recipe says"])


def test_the_ini_holds_the_default_and_the_command_line_wins(run_pytest: RunPytest, pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\ndiffopt_device = cuda\ndiffopt_hub = true\ndiffopt_compile_backend = aot_eager\n")
    pytester.makepyfile("def test_a(): pass")
    run_pytest().stdout.fnmatch_lines(["diffopt: device cuda, compile backend aot_eager, hub allowed"])
    result = run_pytest("--diffopt-device=cpu", "--diffopt-compile-backend=eager", "--diffopt-strict")
    result.stdout.fnmatch_lines(["diffopt: device cpu, compile backend eager, hub allowed, strict"])


@pytest.mark.parametrize(
    ("ini", "argument", "message"),
    [
        ("", "--diffopt-device=tpu", "*--diffopt-device: found 'tpu'; it takes one of: auto, cuda, xpu, mps, sim, cpu"),
        ("diffopt_device = tpu", "-q", "*diffopt_device: found 'tpu'; it takes one of: auto, cuda, xpu, mps, sim, cpu"),
        ("", "--diffopt-compile-backend=a b", "*--diffopt-compile-backend: found 'a b'; it takes a torch.compile*"),
        ("diffopt_strict = perhaps", "-q", "*diffopt_strict: *perhaps*; it takes true or false"),
    ],
)
def test_a_wrong_value_is_a_usage_error_that_names_it(
    run_pytest: RunPytest, pytester: pytest.Pytester, ini: str, argument: str, message: str
) -> None:
    pytester.makeini(f"[pytest]\n{ini}\n")
    result = run_pytest(argument)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])


def test_the_markers_and_fixtures_are_listed(run_pytest: RunPytest) -> None:
    listed = run_pytest("--markers").stdout
    listed.fnmatch_lines(["@pytest.mark.diffopt_max_recompiles(limit): *"])
    listed.fnmatch_lines(["@pytest.mark.diffopt_compile_fullgraph: *"])
    run_pytest("--fixtures").stdout.fnmatch_lines_random(["accelerator *", "compile_watch *", "observation *"])


@pytest.mark.parametrize("arguments", [(), ("-q", "-n", "1")], ids=["alone", "in a worker"])
def test_what_takes_long_and_happens_once_is_one_line_on_stderr_and_in_no_captured_output(
    run_pytest: RunPytest, pytester: pytest.Pytester, arguments: tuple[str, ...]
) -> None:
    if arguments:
        pytest.importorskip("xdist")
    pytester.makepyfile(
        """
        import time
        from pytest_diffopt.notices import announced

        def test_it(capfd):
            with announced("building it"):
                time.sleep(0.3)
            assert capfd.readouterr() == ("", "")
        """
    )
    result = run_pytest(*arguments)
    assert result.parseoutcomes() == {"passed": 1}
    assert result.errlines == ["diffopt: building it"]
