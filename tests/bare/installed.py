"""The wheel alone: what a newcomer installs, with no extras and without pytest-xdist.

`tox -e bare` runs this with that environment's own pytest. No ordinary run collects it: its name is no test's.
Each test starts few processes, as each imports torch and diffusers.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # at its end: the package itself is the installed one

import pytest  # noqa: E402

import pytest_diffopt  # noqa: E402
from pytest_diffopt.extras import EXTRAS  # noqa: E402
from tests.docs.test_documentation import PYTHON, as_test, blocks, is_a_program  # noqa: E402

((_, MODELS),) = [block for block in PYTHON if block[0].startswith("docs/first-recipe.md")]
MODELS += "\n\ndef controlled(): ...\n"  # which docs/recipes.md names

PAGE = """
# Denoise

```py
import torch
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5", dtype=torch.float32)
pipeline.to("cuda")
pipeline.unet = torch.compile(pipeline.unet, backend="eager")
pipeline("a lighthouse in the fog", num_inference_steps=2)
```

# Quantize

```py
import torchao
```
"""

NET = """
[recipe.net]
pipeline = "models:Net"
compilation = { component = "model", backend = "eager" }
call = { inputs = "models:inputs" }
"""

# Imports torch once and runs each program in a fork: patched libraries stay patched.
PROGRAMS = """
import json, os, sys, traceback
import torch, accelerate, diffusers

for where, text in json.loads(open(sys.argv[1], encoding="utf-8").read()):
    sys.stdout.flush()
    child = os.fork()
    if not child:
        try:
            exec(compile(text, where, "exec"), {"__name__": "__main__"})
            assert "pytest" not in sys.modules
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print("passed" if status == 0 else "failed", where)
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A module or program of this environment's Python, in a folder where the source tree cannot be imported."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CI", "GITHUB_ACTIONS")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**kept, "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(folder, "-m", "pytest", "-p", "no:cacheprovider", *arguments)


def outcomes(ran: subprocess.CompletedProcess[str]) -> dict[str, int]:
    """How many tests had each outcome, of pytest's last line."""
    last = ran.stdout.strip().splitlines()[-1]
    return {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|errors?|unverified)", last)}


def test_the_wheel_is_what_is_imported_and_no_extra_is_installed() -> None:
    assert Path(pytest_diffopt.__file__).is_relative_to(sys.prefix)
    installed = {one.metadata["Name"].lower().replace("_", "-") for one in metadata.distributions()}
    assert installed & set(EXTRAS) == set()


def test_torch_loads_the_simulated_gpu_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFOPT_GPU", "rtx-4090")
    ran = run(tmp_path, "-c", "import torch; print(torch.cuda.get_device_name(torch.ones(1).cuda().device))")
    assert ran.stdout == "NVIDIA GeForce RTX 4090\n", ran.stderr


def test_pytest_does_not_warn_that_torch_imported_the_package_before_it(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_it(): pass\n")
    ran = run(
        tmp_path, "-c", "import torch, pytest; raise SystemExit(pytest.main(['-W', 'error', '-p', 'no:cacheprovider']))"
    )
    assert ran.returncode == 0, ran.stderr


def test_recipes_of_the_documentation_and_of_the_suite_are_collected_or_name_the_extra_they_need(
    tmp_path: Path,
) -> None:
    (tmp_path / "models.py").write_text(MODELS)
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
    for number, (_, text) in enumerate(blocks("toml")):
        (tmp_path / f"block{number}.recipes.toml").write_text(text)
    ran = run_pytest(tmp_path, "--collect-only", "-q", ".", "--pyargs", "pytest_diffopt.suite")
    sentences = re.findall(r"found '(\S+)'; it (needs .*)", ran.stdout)
    assert sorted(set(sentences)) == [
        ("gguf", "needs gguf, which is not installed: pip install pytest-diffopt[gguf]"),
        ("pairwise", "needs covertable, which is not installed: pip install pytest-diffopt[matrix]"),
        ("torchao", "needs torchao, which is not installed: pip install pytest-diffopt[torchao]"),
    ]
    assert outcomes(ran)["errors"] == 2, ran.stdout[-3000:]  # two files: each has every mistake that is in it
    assert "flux.recipes.toml::flux-nf4::memory" in ran.stdout
    assert "Traceback" not in ran.stdout + ran.stderr


def test_tests_of_the_readme_and_the_guides_pass(tmp_path: Path) -> None:
    texts = [text for where, text in blocks("python") if not where.startswith("docs/checks") and not is_a_program(text)]
    assert len(texts) > 8
    for number, text in enumerate(texts):
        (tmp_path / f"test_block{number}.py").write_text(as_test(text))
    ran = run_pytest(tmp_path, "-q")
    assert ran.returncode == 0, ran.stdout[-5000:]
    assert outcomes(ran)["passed"] >= len(texts)


def test_programs_of_the_guides_run(tmp_path: Path) -> None:
    programs = [(where, text) for where, text in blocks("python") if is_a_program(text)]
    (tmp_path / "programs.json").write_text(json.dumps(programs))
    (tmp_path / "programs.py").write_text(PROGRAMS)
    ran = run(tmp_path, "-W", "ignore", "programs.py", "programs.json")
    passed = [line for line in ran.stdout.splitlines() if line.startswith("passed ")]  # beside what they print
    assert passed == [f"passed {where}" for where, _ in programs], ran.stderr


def test_the_first_recipe_is_recorded_reported_and_compared_and_a_page_runs(tmp_path: Path) -> None:
    (recipes,) = [
        text for where, text in blocks("toml") if where.startswith("docs/first-recipe.md") and "flux-nf4" in text
    ]
    (tmp_path / "flux.recipes.toml").write_text(recipes)
    (tmp_path / "net.recipes.toml").write_text(NET)
    (tmp_path / "models.py").write_text(MODELS)
    (tmp_path / "page.md").write_text(PAGE)
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
    reports = [f"report.{suffix}" for suffix in ("json", "md", "html", "xml")]
    files = ("flux.recipes.toml", "net.recipes.toml")
    writing = [f"--diffopt-report={name}" for name in reports]
    recorded = run_pytest(tmp_path, *files, "--diffopt-baseline=baselines", "--diffopt-update-baseline", *writing)
    assert recorded.returncode == 0, recorded.stdout + recorded.stderr
    assert "3 recipes recorded" in recorded.stdout
    assert {path.name for path in tmp_path.rglob("baselines/**/*.json")} == {
        *("flux-nf4.json", "flux-nf4-offload.json", "net.json")
    }
    for name in reports:
        assert "flux-nf4-offload" in (tmp_path / name).read_text(encoding="utf-8")
    assert {one["status"] for one in json.loads((tmp_path / "report.json").read_text())["recipes"]} == {"passed"}

    compared = run_pytest(
        tmp_path, "-v", "-rs", "net.recipes.toml", "page.md", "--diffopt-baseline=baselines", "--diffopt-docs"
    )
    assert compared.returncode == 0, compared.stdout + compared.stderr
    assert re.search(r"net\.recipes\.toml::net::baseline PASSED", compared.stdout)
    assert re.search(r"page\.md::line-4.* PASSED", compared.stdout)
    assert "needs torchao, which is not installed: pip install pytest-diffopt[torchao]" in compared.stdout


def test_a_full_size_model_is_forecast_and_advised_on_with_nothing_else_said(tmp_path: Path) -> None:
    budgets = ROOT / "examples" / "full-size-budgets.recipes.toml"
    ran = run(tmp_path, "-m", "pytest_diffopt", "forecast", str(budgets), "--recipe", "flux-nf4")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert re.search(r"^flux-nf4 +flux\.1-dev .* fits", ran.stdout, re.MULTILINE)
    command = Path(sys.executable).with_name("diffopt")
    ran = run(tmp_path, str(command), "advise", "--model", "sdxl", "--max-memory", "60GiB")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "bf16 is the first that surely fits" in ran.stdout
