"""What only an installation can tell of a recipe: each thing that is missing is named, with what is there."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from pytest_diffopt import installation
from pytest_diffopt.errors import DiffoptError, Problem, RecipeError
from pytest_diffopt.installation import problems_with_installation
from pytest_diffopt.recipe import Compilation, Offloading, Quantization, Recipe
from pytest_diffopt.replicas import Family, Registry


def problems(*args: Any, **kwargs: Any) -> list[str]:
    return [str(problem) for problem in problems_with_installation(Recipe("a", *args, **kwargs), prefix="recipe.a")]


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_factories.py").write_text("def make(): ...\nclass Nested:\n    def make(): ...\nnumber = 3\n")
    (tmp_path / "broken_factories.py").write_text("raise RuntimeError('no network')\n")
    (tmp_path / "needy_factories.py").write_text("import a_missing_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)


NEEDY = "ModuleNotFoundError: No module named 'a_missing_dependency'"


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("some_factories:make", []),
        ("some_factories:Nested.make", []),
        ("no_factories:make", ["there is no module 'no_factories' on sys.path"]),
        ("no_factories.deep:make", ["there is no module 'no_factories' on sys.path"]),
        ("some_factories:mak", ["'some_factories' has no attribute 'mak'; did you mean 'make'?"]),
        ("some_factories:zzz", ["'some_factories' has no attribute 'zzz'"]),
        ("some_factories:Nested.zzz", ["'some_factories.Nested' has no attribute 'zzz'"]),
        ("some_factories:number", ["'some_factories.number' is of type int, which is not callable"]),
        (
            "broken_factories:make",
            ["importing 'broken_factories' raised RuntimeError: no network (broken_factories.py:1)"],
        ),
        (
            "needy_factories:make",
            [f"importing 'needy_factories' raised {NEEDY} (needy_factories.py:1)"],
        ),
    ],
)
def test_a_factory_that_cannot_be_had_is_named_with_the_reason(reference: str, expected: list[str]) -> None:
    assert problems(reference) == [f"recipe.a.pipeline: found {reference!r}; {reason}" for reason in expected]
    compiled = problems("tiny-sd", compilation={"component": "unet", "backend": reference})
    assert compiled == [f"recipe.a.compilation.backend: found {reference!r}; {reason}" for reason in expected]


def test_an_unknown_compile_backend_is_named() -> None:
    pytest.importorskip("torch")
    listed = [Compilation("unet"), Compilation("vae", backend="aot_eger")]
    (mistake,) = problems("tiny-sd", compilation=listed)
    assert mistake.startswith("recipe.a.compilation[1].backend: found 'aot_eger'; did you mean 'aot_eager'? allowed: ")
    assert "inductor" in mistake
    assert problems("tiny-sd", compilation=[Compilation("unet", backend="aot_eager"), Compilation("vae")]) == []


def test_an_unknown_dynamo_setting_or_a_wrong_type_is_named() -> None:
    torch = pytest.importorskip("torch")
    settings_: dict[str, Any] = {
        "recompile_limit": 8,
        "capture_scalar_outputs": True,
        "capture_scalar_output": True,
        "verbose": 1,
        "zzzzzz": 1,
    }
    near, wrong, unknown = problems("tiny-sd", dynamo=settings_)
    assert near.startswith(
        "recipe.a.dynamo.capture_scalar_output: found an unknown setting; did you mean 'capture_scalar_outputs'"
    )
    assert wrong == "recipe.a.dynamo.verbose: found 1; a value of type bool"
    assert unknown == (
        "recipe.a.dynamo.zzzzzz: found an unknown setting; "
        f"a setting of torch._dynamo.config or torch.fx.experimental._config of torch {torch.__version__}"
    )


def test_without_torch_only_imports_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    unchecked = {"compilation": {"component": "unet", "backend": "no"}, "dynamo": {"zzz": 1}}
    assert problems("tiny-sd", **unchecked) == []
    assert len(problems("no_factories:make", **unchecked)) == 1


THERE = "the pipeline has: text_encoder, text_encoder_2, transformer, vae"


def test_components_that_a_replica_does_not_have_are_named_in_every_part_with_those_it_has() -> None:
    assert problems(
        "tiny-flux",
        quantization=Quantization("bitsandbytes_4bit", ["transformer", "unet", "text_encoder_3"]),
        compilation=[Compilation("vae"), Compilation("trasformer")],
        offloading=Offloading("model", ["zzz"]),
    ) == [
        f"recipe.a.quantization.components: found 'unet'; {THERE}",
        f"recipe.a.quantization.components: found 'text_encoder_3'; did you mean 'text_encoder_2'? {THERE}",
        f"recipe.a.compilation[1].component: found 'trasformer'; did you mean 'transformer'? {THERE}",
        f"recipe.a.offloading.components: found 'zzz'; {THERE}",
    ]
    assert problems("tiny-flux", compilation=Compilation("unet")) == [
        f"recipe.a.compilation.component: found 'unet'; {THERE}"
    ]


def test_components_that_a_replica_has_and_parts_that_name_none_are_accepted() -> None:
    assert problems("tiny-flux", quantization=Quantization("bitsandbytes_8bit"), offloading=Offloading("model")) == []
    assert problems("tiny-flux", compilation=[Compilation(one) for one in ("transformer", "vae")]) == []
    assert problems("tiny-sd", compilation=Compilation("unet")) == []


def test_a_hub_id_has_the_components_of_the_replica_that_stands_for_it_unless_it_means_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_id, compiled = "black-forest-labs/flux.1-dev", Compilation("unet")
    found = [f"recipe.a.compilation.component: found 'unet'; {THERE}"]
    assert problems(hub_id, compilation=compiled) == found
    recipe = Recipe("a", hub_id, compilation=compiled)
    assert problems_with_installation(recipe, allow_hub=True) == []
    monkeypatch.chdir(tmp_path)
    (tmp_path / hub_id).mkdir(parents=True)
    (tmp_path / hub_id / "model_index.json").write_text("{}")
    assert problems(hub_id, compilation=compiled) == []


@pytest.mark.parametrize("pipeline", ["some-org/some-model", "os:getcwd", dict])
def test_components_of_a_pipeline_that_must_be_built_to_know_them_are_left_unchecked(pipeline: Any) -> None:
    recipe = Recipe("a", pipeline, compilation=Compilation("anything"))
    assert problems_with_installation(recipe, allow_hub=True) == []


@pytest.mark.parametrize(
    ("pipeline", "near"),
    [
        ("tiny-fluks", "did you mean 'tiny-flux' or 'tiny-sd'? replicas: tiny-cogvideox, "),
        ("black-forest-labs/FLUX.2", "did you mean 'black-forest-labs/FLUX.1-dev' or "),
        ("flux.1-dev", "it is a full-size model, "),
        ("zzz", "replicas: tiny-cogvideox, "),
    ],
)
def test_a_pipeline_that_is_nowhere_is_one_mistake(pipeline: str, near: str) -> None:
    (mistake,) = problems(pipeline, compilation=Compilation("anything"))
    assert mistake.startswith(f"recipe.a.pipeline: found {pipeline!r}; {near}")


def test_a_full_size_model_may_be_the_pipeline_of_a_recipe_that_asks_for_its_forecast() -> None:
    assert problems("flux.1-dev", forecast={"max_memory": "16GiB"}) == []
    assert len(problems("flux.1-dev", forecast={"max_memory": "16GiB", "model": "flux.1-dev"})) == 1


def test_a_family_that_a_third_party_registered_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    families = Registry(Family("tiny-mine", (), ("text_encoder", "denoiser"), "Mine", (96, 96), lambda hub_id: None))
    monkeypatch.setattr(installation, "registry", families)
    assert problems("tiny-mine", compilation=Compilation("denoise")) == [
        (
            "recipe.a.compilation.component: found 'denoise'; did you mean 'denoiser'? "
            "the pipeline has: denoiser, text_encoder"
        )
    ]


def test_components_are_checked_with_no_library_imported() -> None:
    code = (
        "import sys\n"
        "from pytest_diffopt.installation import problems_with_installation\n"
        "from pytest_diffopt.recipe import Recipe\n"
        "assert len(problems_with_installation(Recipe('a', 'tiny-flux', compilation={'component': 'unet'}))) == 1\n"
        "print([name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


# Forecasts.


def of_forecast(pipeline: Any = "tiny-flux", **budget: Any) -> list[str]:
    return problems(pipeline, forecast={"max_memory": "16GiB", **budget})


@pytest.mark.parametrize("model", ["flux.1-dev", "FLUX.1-Dev", "black-forest-labs/FLUX.1-dev"])
def test_a_full_size_model_of_the_recipes_class_is_right(model: str) -> None:
    assert of_forecast(model=model) == []
    assert of_forecast(lambda: None, model=model, gpu="NVIDIA RTX 4090") == []


def test_an_unknown_full_size_model_is_named_with_the_nearest() -> None:
    (mistake,) = of_forecast(model="flux.1-def")
    assert mistake.startswith(
        "recipe.a.forecast.model: found 'flux.1-def'; did you mean 'flux.1-dev'? full-size models: flux.1-dev, "
    )
    assert mistake.endswith(", their hub ids, and directories with a pipeline's config files")


def test_a_directory_that_lacks_a_config_file_is_named_with_what_it_lacks(tmp_path: Path) -> None:
    (mistake,) = of_forecast(model=str(tmp_path))
    assert mistake == (
        f"recipe.a.forecast.model: found {str(tmp_path)!r}; The directory {str(tmp_path)!r} holds no diffusers pipeline: "
        f"it lacks model_index.json."
    )


def test_a_model_may_be_left_out_where_the_pipeline_names_one() -> None:
    assert of_forecast("black-forest-labs/FLUX.1-dev") == []
    (mistake,) = of_forecast("tiny-flux")
    assert mistake.startswith(
        "recipe.a.forecast.model: found nothing; it must be given, since the pipeline 'tiny-flux' names none; "
        "full-size models: flux.1-dev, "
    )
    (mistake,) = of_forecast(make_a_pipeline)
    assert "found nothing; it must be given, since the pipeline test_installation:make_a_pipeline names none" in mistake


def make_a_pipeline() -> None:
    """A factory."""


def test_a_model_of_another_class_than_the_recipes_pipeline_is_named_with_those_of_it() -> None:
    assert of_forecast("tiny-flux", model="Wan-AI/Wan2.1-T2V-14B-Diffusers") == [
        (
            "recipe.a.forecast.model: found 'Wan-AI/Wan2.1-T2V-14B-Diffusers', a WanPipeline; "
            "'tiny-flux' is a FluxPipeline; in full size there are: flux.1-dev, flux.1-schnell"
        )
    ]
    assert of_forecast("tiny-sd", model="flux.1-dev") == [
        (
            "recipe.a.forecast.model: found 'flux.1-dev', a FluxPipeline; "
            "'tiny-sd' is a StableDiffusionPipeline; in full size there are: none"
        )
    ]


def test_an_unknown_card_is_named_with_the_nearest() -> None:
    (mistake,) = of_forecast(model="flux.1-dev", gpu="rtx-4091")
    assert mistake.startswith("recipe.a.forecast.gpu: found 'rtx-4091'; Did you mean 'rtx-4090'? There are gtx-1070, ")


def test_assumptions_are_checked_by_those_who_know_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def assumed(assume: Any) -> None:
        asked.append(dict(assume))
        if "torch" in assume:
            raise DiffoptError("assume has no 'torch'.")
        if "flash" in assume:
            raise RecipeError([Problem("assume.flash", "3", "true or false")])

    fake = types.ModuleType("pytest_diffopt.forecasting.assumptions")
    fake.assumed = assumed  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    assert of_forecast(model="flux.1-dev") == []
    assert asked == []
    assert of_forecast(model="flux.1-dev", assume={"attention": "math"}) == []
    assert of_forecast(model="flux.1-dev", assume={"torch": "3"}) == [
        "recipe.a.forecast.assume: found {'torch': '3'}; assume has no 'torch'."
    ]
    assert of_forecast(model="flux.1-dev", assume={"flash": 3}) == [
        "recipe.a.forecast.assume.flash: found 3; true or false"
    ]
    assert len(asked) == 3


def test_a_backend_whose_package_is_not_installed_is_named_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def version(name: str) -> str:
        if name == "optimum-quanto":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    several = [Quantization("layerwise_casting", "transformer"), Quantization("quanto", "text_encoder_2")]
    found = problems_with_installation(Recipe("r", "tiny-flux", quantization=several))
    assert [(one.path, one.found, one.allowed) for one in found] == [
        (
            "recipe.quantization[1].backend",
            "'quanto'",
            "it needs optimum-quanto, which is not installed: pip install pytest-diffopt[quanto]",
        )
    ]
