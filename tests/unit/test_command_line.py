"""``python -m pytest_diffopt``: what it refuses and in which words, what it prints and writes, and its exit status."""

from __future__ import annotations

import io
import json
import os
import runpy
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pytest_diffopt.accelerators.gpus import CARDS
from pytest_diffopt.command_line import forecast as command
from pytest_diffopt.command_line import whole_files
from pytest_diffopt.command_line.main import main
from pytest_diffopt.command_line.selection import Job
from pytest_diffopt.command_line.whole_files import write_whole
from pytest_diffopt.errors import PreparationError
from pytest_diffopt.forecasting.record import Forecast
from pytest_diffopt.recipe import Recipe
from pytest_diffopt.replicas.catalogue import registry
from tests.made_forecasts import GIB
from tests.made_forecasts import of_the_guide as made

RECIPES = """\
[recipe.nf4]
pipeline = "tiny-flux"
[recipe.bf16]
pipeline = "black-forest-labs/FLUX.1-dev"
[recipe.video]
pipeline = "tiny-wan"
[recipe.own]
pipeline = "my_package.models:make"
"""


class Asked:
    """Stands for what forecasts: keeps what it was asked, and answers with forecasts made by hand."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str | None, dict[str, Any]]] = []
        self.answers: dict[str, Forecast | Exception] = {}

    def __call__(self, recipe: Recipe, model: str | None = None, **given: Any) -> Forecast:
        given["progress"]("loading transformer")
        print("a library's own words")
        self.calls.append((recipe.name, model, given))
        answer = self.answers.get(recipe.name, made(recipe.name))
        if isinstance(answer, Exception):
            raise answer
        return answer

    @property
    def recipes(self) -> list[tuple[str, str | None]]:
        return [(recipe, model) for recipe, model, _ in self.calls]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    module = types.ModuleType("pytest_diffopt.forecasting.running")
    module.forecast = asked = Asked()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return asked


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    found = Path("my.recipes.toml")
    found.write_text(RECIPES)
    yield found
    assert [left.name for left in tmp_path.rglob(".*")] == []  # nothing half written stays


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is said of arguments that are refused, after the usage."""
    try:
        status = main(arguments)
    except SystemExit as ended:
        status = int(str(ended.code))
    said = capsys.readouterr()
    assert (status, said.out) == (2, "")
    usage, _, sentence = said.err.partition("error: ")
    assert usage.startswith("usage: diffopt")
    return sentence.removesuffix("\n")


FULL_SIZES = ", ".join(registry.full_sizes)
NEAR_MODEL = "No full-size model is called 'flux.1-dve'. Did you mean 'flux.1-dev'?"
NEAR_CARD = "No card is called 'rtx-4091'. Did you mean 'rtx-4090'?"
SIZE = "HEIGHTxWIDTH, or HEIGHTxWIDTHxFRAMES for a video, in pixels: 1024x1024, 480x832x81"
UNITS = "B, KB, MB, GB, TB, KiB, MiB, GiB, TiB"
OTHERS = "flux.1-dev (FluxPipeline); the recipes' are WanPipeline"
NONE_NAMED = f"""\
name a full-size model with --model
  nf4: the replica 'tiny-flux' is tiny; of FluxPipeline there are flux.1-dev, flux.1-schnell.
  video: the replica 'tiny-wan' is tiny; of WanPipeline there are wan2.1-t2v-1.3b, wan2.1-t2v-14b.
  own: it is made by a factory, which names no full-size model. There are {FULL_SIZES}."""


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", NONE_NAMED),
        ("--model flux.1-dve", f"argument --model: {NEAR_MODEL} There are {FULL_SIZES}, and their hub ids."),
        ("--recipe video --model flux.1-dev", f"argument --model: no recipe has the pipeline of {OTHERS}"),
        (
            "--recipe nf5",
            "argument --recipe: my.recipes.toml has no recipe 'nf5'; did you mean 'nf4'? it has: nf4, bf16, video, own",
        ),
        ("--gpu rtx-4091", f"argument --gpu: {NEAR_CARD} There are {', '.join(CARDS)}."),
        ("--size 1024", f"argument --size: found '1024'; write {SIZE}"),
        ("--size 0x64", f"argument --size: found '0x64'; write {SIZE}"),
        ("--size 1x2x3x4", f"argument --size: found '1x2x3x4'; write {SIZE}"),
        ("--steps 0", "argument --steps: found '0'; write a whole number from 1 on"),
        ("--assume dynamic", "argument --assume: found 'dynamic'; write KEY=VALUE"),
        ("--assume a=1 --assume a=2", "argument --assume: 'a' is given twice, as '1' and '2'"),
        (
            "--recipe bf16 --assume attenion=math",
            (
                "argument --assume: A forecast cannot assume 'attenion'. Did you mean 'attention'? It can assume "
                "transformers, t5_wo_float32, convolution_workspace, attention, cublas_workspace."
            ),
        ),
        (
            "--recipe bf16 --assume attention=none",
            """argument --assume: A forecast cannot assume attention = 'none'. It takes "cuda", "math" or "fused".""",
        ),
        (
            "--max-memory 16gigs",
            f"argument --max-memory: found '16gigs'; write bytes as an int, or a number with one of: {UNITS}",
        ),
        ("--json out --svg ./out", "argument --svg: 'out' is --json's file already"),
        (
            "--recipe bf16 --json missing/out.json",
            "argument --json: 'missing/out.json' cannot be written: its folder is missing.",
        ),
        ("--recipe bf16 --svg .", "argument --svg: '.' cannot be written: it is a directory."),
        ("--mod flux.1-dev", "unrecognized arguments: --mod flux.1-dev"),
    ],
)
def test_a_mistake_is_named_with_what_is_allowed_and_nothing_is_run(
    asked: Asked, path: Path, capsys: pytest.CaptureFixture[str], arguments: str, sentence: str
) -> None:
    assert refused(capsys, "forecast", str(path), *arguments.split()) == sentence
    assert asked.calls == []


def test_a_file_with_mistakes_is_refused_with_all_of_them(
    asked: Asked, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path.write_text("[recipe.a]\npipeline = 1\n[recipe.b]\n")
    sentence = refused(capsys, "forecast", str(path))
    assert sentence.startswith("my.recipes.toml: 2 mistakes\n  recipe.a.pipeline: found 1;")
    assert refused(capsys, "forecast", "none.toml").splitlines() == [
        "none.toml: 1 mistake",
        "  none.toml: found no such file; a TOML file with tables [recipe.NAME]",
    ]


def test_a_file_that_may_not_be_written_is_refused(
    asked: Asked, path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("kept.json").write_text("kept")
    monkeypatch.setattr(os, "access", lambda *given: False)
    sentence = refused(capsys, "forecast", str(path), "--recipe", "bf16", "--json", "kept.json")
    assert sentence == "argument --json: 'kept.json' cannot be written: it may not be written to."
    assert Path("kept.json").read_text() == "kept"


def test_a_command_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys) == "the following arguments are required: COMMAND"


def test_each_recipe_takes_the_models_that_have_its_pipeline(
    asked: Asked, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = ["flux.1-dev", "black-forest-labs/FLUX.1-schnell", "FLUX.1-schnell", "black-forest-labs/flux.1-dev"]
    assert main(["forecast", str(path), *(word for model in models for word in ("--model", model))]) == 0
    assert asked.recipes == [
        (recipe, model)
        for recipe in ("nf4", "bf16", "own")  # a factory's pipeline is not known before it is run
        for model in ("flux.1-dev", "black-forest-labs/FLUX.1-schnell")
    ]
    assert "left out, as no --model has their pipeline: video (WanPipeline)\n" in capsys.readouterr().err


def test_without_a_model_a_recipe_is_forecast_with_its_own(
    asked: Asked, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["forecast", str(path), "--recipe", "bf16"]) == 0
    assert asked.recipes == [("bf16", None)]
    assert "GPU · flux.1-dev · 1024×1024" in capsys.readouterr().out


def test_what_is_asked_for_arrives(asked: Asked, path: Path) -> None:
    arguments = "--recipe bf16 --gpu RTX_4090 --gpu l40s --size 480x832x81 --size 1024x1024 --steps 28"
    assumed = ["--assume", "t5_wo_float32=true", "--assume", "transformers=4.55", "--assume", "attention=math"]
    assert main(["forecast", str(path), *arguments.split(), *assumed]) == 0
    for (_, _, given), card in zip(asked.calls, ("rtx-4090", "l40s"), strict=True):
        del given["progress"]
        assert given == {
            "sizes": ((480, 832, 81), (1024, 1024)),
            "steps": 28,
            "gpu": card,
            "assume": {"t5_wo_float32": True, "transformers": "4.55", "attention": "math"},
            "kwargs": None,
        }


def test_what_is_not_asked_for_is_left_to_the_recipe(asked: Asked, path: Path) -> None:
    main(["forecast", str(path), "--recipe", "bf16"])
    ((_, _, given),) = asked.calls
    assert {**given, "progress": None} == dict.fromkeys(("sizes", "steps", "gpu", "assume", "kwargs", "progress"))


BUDGET = """
[recipe.budget]
pipeline = "tiny-flux"
[recipe.budget.forecast]
model = "flux.1-schnell"
max_memory = "40GiB"
sizes = [512, 512]
num_inference_steps = 4
assume = { attention = "math", cublas_workspace = false }
kwargs = { max_sequence_length = 256 }
"""


def test_what_a_recipes_own_part_says_holds_where_the_command_says_nothing(asked: Asked, path: Path) -> None:
    path.write_text(BUDGET)
    assert main(["forecast", str(path)]) == 0
    assert main(["forecast", str(path), "--steps", "9", "--assume", "attention=fused", "--size", "64x64"]) == 0
    (_, model, own), (_, _, told) = asked.calls
    assert model == "flux.1-schnell"
    assert (own["sizes"], own["steps"]) == (((512, 512),), 4)
    assert own["assume"] == {"attention": "math", "cublas_workspace": False}
    assert own["kwargs"] == {"max_sequence_length": 256}
    assert (told["sizes"], told["steps"]) == (((64, 64),), 9)
    assert told["assume"] == {"attention": "fused", "cublas_workspace": False}


def test_it_prints_the_table_and_what_the_columns_stand_for(
    asked: Asked, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["forecast", str(path), "--recipe", "bf16"]) == 0
    said = capsys.readouterr()
    assert "12 GB          16 GB     24 GB   80 GB\n" in said.out
    assert said.out.endswith(
        "\n\n12 GB, 16 GB, 24 GB, 80 GB: 'fits' is every known card of that size, 'may fit' is not sure of all; "
        "--gpu names one.\n"
    )
    assert "a library's own words" not in said.out
    assert said.err == "a library's own words\n"  # and no progress, as it is no terminal


def test_the_details_follow_where_they_are_asked_for(
    asked: Asked, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["forecast", str(path), "--recipe", "bf16", "--details"])
    assert "\n\nbf16 · flux.1-dev\n  FluxPipeline, bfloat16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--gpu", "rtx-4090"], 0),
        (["--gpu", "rtx-a4000"], 1),  # may fit: 13.9 to 16.1 of 15.61
        (["--gpu", "rtx-4060"], 1),
        (["--max-memory", "17GiB"], 0),
        (["--max-memory", "16GiB"], 1),
        (["--max-memory", "16100000000"], 1),
        ([], 0),
    ],
)
def test_only_what_surely_fits_passes(asked: Asked, path: Path, arguments: list[str], status: int) -> None:
    assert main(["forecast", str(path), "--recipe", "bf16", *arguments]) == status


def test_a_recipe_that_fails_says_why_and_the_others_still_run(
    asked: Asked, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked.answers["nf4"] = PreparationError("No component is called 'unet'.")
    assert main(["forecast", str(path), "--model", "flux.1-dev", "--json", "out.json"]) == 1
    assert [recipe for recipe, _ in asked.recipes] == ["nf4", "bf16", "own"]
    said = capsys.readouterr().out
    assert "nf4 · flux.1-dev could not be forecast: No component is called 'unet'.\n" in said
    whole = json.loads(Path("out.json").read_text(encoding="utf-8"))
    assert [one["recipe"] for one in whole["forecasts"]] == ["bf16", "own"]
    assert [one["recipe"] for one in whole["failures"]] == ["nf4"]


def test_what_is_no_mistake_of_the_user_is_raised(asked: Asked, path: Path) -> None:
    asked.answers["bf16"] = ZeroDivisionError("ours")
    with pytest.raises(ZeroDivisionError, match="ours"):
        main(["forecast", str(path), "--recipe", "bf16"])


def test_an_interrupt_is_no_traceback(
    asked: Asked, path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*given: object) -> list[Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "forecast_rows", interrupted)
    assert main(["forecast", str(path), "--recipe", "bf16"]) == 130
    assert capsys.readouterr().err == "diffopt forecast: interrupted\n"


def test_json_on_standard_output_is_alone_there(asked: Asked, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["forecast", str(path), "--recipe", "bf16", "--json", "-", "--gpu", "rtx-4090"]) == 0
    said = capsys.readouterr()
    whole = json.loads(said.out)
    assert [one["target"] for one in whole["fits"]] == ["rtx-4090"]
    assert Forecast.from_json(json.dumps(whole["forecasts"][0])) == made("bf16")
    assert "Peak memory in GiB" in said.err


def test_a_picture_a_recipe(asked: Asked, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked.answers["own"] = made("own", residency=None)
    main(["forecast", str(path), "--model", "flux.1-dev", "--svg", "over-time.svg", "--max-memory", "16GiB"])
    assert sorted(found.name for found in Path().glob("*.svg")) == ["over-time-bf16.svg", "over-time-nf4.svg"]
    assert ">the limit, 16.00 GiB<" in Path("over-time-nf4.svg").read_text(encoding="utf-8")
    assert "own · flux.1-dev: nothing was written down over time, so there is no picture\n" in capsys.readouterr().err
    main(["forecast", str(path), "--recipe", "bf16", "--svg", "one.svg"])
    assert Path("one.svg").is_file()


@pytest.mark.parametrize(
    ("jobs", "names"),
    [
        ([("a", "flux.1-dev")], ["out.svg"]),
        ([("a", "flux.1-dev"), ("b: c", "flux.1-dev")], ["out-a.svg", "out-b_c.svg"]),
        ([("a", "m"), ("a", "n")], ["out-a-m.svg", "out-a-n.svg"]),
        ([("A", "m"), ("a", "m")], ["out-A.svg", "out-a-2.svg"]),
    ],
)
def test_pictures_of_different_recipes_have_different_names(jobs: list[tuple[str, str]], names: list[str]) -> None:
    made_jobs = [Job(Recipe(recipe, "tiny-flux"), None, model) for recipe, model in jobs]
    assert [found.name for found in command.picture_paths(Path("out.svg"), made_jobs)] == names


@pytest.mark.parametrize("fail", [os.replace, os.fsync])
def test_a_file_is_written_whole_or_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: Callable[..., None]
) -> None:
    path = tmp_path / "out.json"
    path.write_text("before")

    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, fail.__name__, full)
        with pytest.raises(OSError, match="No space left"):
            write_whole(path, "after")
    assert [found.name for found in tmp_path.iterdir()] == ["out.json"]
    assert path.read_text() == "before"
    write_whole(path, "after ×")
    assert path.read_text(encoding="utf-8") == "after ×"


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_link_is_followed_and_a_device_takes_what_comes(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.touch()
    link.symlink_to(target)
    write_whole(link, "text")
    assert link.is_symlink()
    assert target.read_text() == "text"
    write_whole(Path(os.devnull), "text")


def test_a_file_that_can_no_longer_be_written_is_told_after_the_table(
    asked: Asked, path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(whole_files, "write_whole", full)
    assert main(["forecast", str(path), "--recipe", "bf16", "--json", "out.json"]) == 2
    said = capsys.readouterr()
    assert "Peak memory in GiB" in said.out
    assert said.err.endswith("error: argument --json: 'out.json' cannot be written: No space left on device.\n")


def test_progress_says_which_recipe_and_what_is_done(asked: Asked, path: Path) -> None:
    said: list[str] = []
    jobs = [Job(Recipe(name, "tiny-flux"), "flux.1-dev", "flux.1-dev") for name in ("a", "b")]
    options = command.Options(path, (), (), (), None, None, {}, None, False, None, None)
    command.forecast_rows(jobs, options, said.append)
    assert said[1] == "1 of 2 · a · flux.1-dev · loading transformer"
    assert said[2:] == ["2 of 2 · b · flux.1-dev", "2 of 2 · b · flux.1-dev · loading transformer"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_and_colours_are_for_terminals(asked: Asked, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    main(["forecast", str(path), "--recipe", "bf16"])
    assert "\x1b[32mfits" in out.getvalue()
    assert "\x1b[?25l" in err.getvalue()  # the cursor is hidden while the line is there
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", out := Terminal())
    main(["forecast", str(path), "--recipe", "bf16"])
    assert "\x1b" not in out.getvalue()
    assert max(map(len, out.getvalue().splitlines())) <= 80


def test_the_models_are_listed_with_where_their_configs_are_from(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (flux,) = [line for line in lines if line.startswith("flux.1-dev ")]
    assert flux.split()[:4] == ["flux.1-dev", "black-forest-labs/FLUX.1-dev", "FluxPipeline", "1024×1024"]
    assert {line.split()[0] for line in lines} >= set(registry.full_sizes)


def test_the_cards_are_listed_with_what_they_have_and_where_their_memory_was_seen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["cards"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (card,) = [line.split() for line in lines if line.startswith("rtx-5090 ")]
    title = ["NVIDIA", "GeForce", "RTX", "5090"]
    assert card == ["rtx-5090", *title, "sm_120", "170", "1792", "32", "31.37", "Wan-Video/Wan2.1#465"]
    assert {line.split()[0] for line in lines if line} >= set(CARDS)
    assert "desktop up to 1 GiB" in " ".join(lines)
    assert "8.9 is sm_89" in " ".join(lines)


def test_a_cards_name_is_whole_in_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["cards"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines if line} >= set(CARDS)
    assert max(map(len, lines)) <= 80


def test_the_common_sizes_are_those_of_known_cards() -> None:
    for target in command.common_sizes():
        assert target.cards
        assert {f"{card.nominal_bytes // GIB} GB" for card in target.cards} == {target.title}


def run_alone(code: str) -> str:
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return ran.stdout.strip()


@pytest.mark.parametrize(
    ("arguments", "not_imported"),
    [
        (["--help"], ["torch", "numpy", "pydantic", "rich", "pytest"]),
        (["forecast", "--help"], ["torch", "numpy", "pydantic", "rich", "pytest"]),
        (["cards"], ["torch", "numpy", "pydantic", "pytest"]),
        (["models"], ["torch", "numpy", "pytest", "diffusers", "transformers"]),
    ],
)
def test_what_needs_no_torch_imports_none(arguments: list[str], not_imported: list[str]) -> None:
    code = f"""
import contextlib, io, sys
from pytest_diffopt.__main__ import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main({arguments!r})
print([name for name in {not_imported!r} if name in sys.modules])
"""
    assert run_alone(code) == "[]"


@pytest.mark.skipif(os.name == "nt", reason="pipes end otherwise there")
def test_a_reader_that_has_enough_is_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        ran = subprocess.run(
            [sys.executable, "-m", "pytest_diffopt", "cards"], stdout=write, stderr=subprocess.PIPE, text=True
        )
    finally:
        os.close(write)
    assert (ran.returncode, ran.stderr) == (1, "")


def test_the_usage_line_has_the_name_by_which_the_command_was_called(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.scripts]\ndiffopt = "pytest_diffopt.command_line.main:main"\n' in project
    monkeypatch.setattr("sys.argv", ["diffopt", "cards", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().out.startswith("usage: diffopt cards ")
    monkeypatch.setattr("sys.argv", ["__main__.py", "cards", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_module("pytest_diffopt", run_name="__main__")
    assert capsys.readouterr().out.startswith("usage: python -m pytest_diffopt cards ")
