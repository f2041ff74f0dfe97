"""The replicas' cache: built once, whole or not at all, and loaded by the libraries as if it were the hub's."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_diffopt.errors import ReplicaError
from pytest_diffopt.replicas import Family, Registry, ensure, families, flux, hub_cache_environment, resolve
from pytest_diffopt.replicas.cache import MANIFEST, hub_directory, is_whole

# A family that writes two small files, and does what DIFFOPT_STUB says on the way.
STUB = """
import os, pathlib, time
import torch
from pytest_diffopt.replicas import Family

HERE = pathlib.Path(__file__).parent

class StubPipeline:
    components = {"part": torch.nn.Linear(1, 1), "scheduler": None}

    def save_pretrained(self, directory, safe_serialization):
        assert safe_serialization
        (directory / "model_index.json").write_text("{}")
        if os.environ.get("DIFFOPT_STUB") == "hang":
            (HERE / "half").touch()
            time.sleep(120)
        (directory / "part").mkdir()
        (directory / "part" / "weights").write_bytes(b"w" * 64)

def build(hub_id):
    (HERE / f"built-{os.getpid()}-{time.monotonic_ns()}").write_text(str(hub_id))
    torch.rand(3)
    if os.environ.get("DIFFOPT_STUB") == "race":
        deadline = time.monotonic() + 60
        while len(list(HERE.glob("built-*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    return StubPipeline()

FAMILY = Family("tiny-stub", ("stub-org/Stub-1",), ("part",), "StubPipeline", (8, 8), build)
"""

ENSURE_STUB = """
from pytest_diffopt.replicas import Registry, ensure
from stub_family import FAMILY
print(ensure("tiny-stub", registry=Registry(FAMILY)))
"""


@pytest.fixture(scope="module", autouse=True)
def replica_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        directory = tmp_path_factory.mktemp("replicas")
        patch.setenv("DIFFOPT_CACHE_DIR", str(directory))
        yield directory


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Family:
    monkeypatch.setenv("DIFFOPT_CACHE_DIR", str(tmp_path / "cache"))
    return write_stub(tmp_path, STUB)


def write_stub(directory: Path, source: str) -> Family:
    path = directory / "stub_family.py"
    path.write_text(source)
    shutil.rmtree(directory / "__pycache__", ignore_errors=True)  # of a text as long, written in the same second
    spec = importlib.util.spec_from_file_location("stub_family", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.FAMILY
    assert isinstance(made, Family)
    return made


def start(code: str, directory: Path, **environment: str) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(directory), str(root)])
    variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def builds(tmp_path: Path) -> int:
    return len(list(tmp_path.glob("built-*")))


def building(tmp_path: Path) -> Path:
    (found,) = (tmp_path / "cache" / "replicas").glob("*/building")
    return found


def test_a_replica_is_built_once_in_the_layout_of_the_hub_cache(stub: Family, tmp_path: Path) -> None:
    registry = Registry(stub)
    snapshot = ensure("tiny-stub", registry=registry)
    assert ensure("TINY-stub", registry=registry) == snapshot
    assert builds(tmp_path) == 1
    repository = hub_directory() / "models--pytest-diffopt--tiny-stub"
    assert snapshot == repository / "snapshots" / stub.source_hash()
    assert (repository / "refs" / "main").read_text() == stub.source_hash()
    assert json.loads((snapshot / MANIFEST).read_text())["files"] == {"model_index.json": 2, "part/weights": 64}
    assert list(building(tmp_path).iterdir()) == []


def test_a_public_id_in_any_case_is_one_replica_built_for_the_id_as_registered(stub: Family, tmp_path: Path) -> None:
    registry = Registry(stub)
    snapshot = ensure("STUB-org/stub-1", registry=registry)
    assert ensure("stub-org/Stub-1", registry=registry) == snapshot
    assert snapshot.parents[1].name == "models--stub-org--Stub-1"
    assert [path.read_text() for path in tmp_path.glob("built-*")] == ["stub-org/Stub-1"]
    resolved = resolve("Stub-ORG/stub-1", registry=registry)
    assert (resolved.path_or_id, resolved.kind, resolved.family) == (str(snapshot), "replica", stub)


def test_the_random_state_is_as_before_whatever_a_builder_draws(stub: Family) -> None:
    before = torch.get_rng_state()
    ensure("tiny-stub", registry=Registry(stub))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "harm",
    [
        lambda snapshot: (snapshot / "model_index.json").unlink(),
        lambda snapshot: (snapshot / MANIFEST).unlink(),
        lambda snapshot: (snapshot / MANIFEST).write_text("[]"),
        lambda snapshot: (snapshot / "part" / "weights").write_bytes(b"w" * 63),
        lambda snapshot: (snapshot / "part" / "weights").unlink(),
    ],
    ids=["no index", "no manifest", "wrong manifest", "truncated file", "missing file"],
)
def test_a_damaged_replica_is_built_again(stub: Family, tmp_path: Path, harm: Any) -> None:
    registry = Registry(stub)
    snapshot = ensure("tiny-stub", registry=registry)
    harm(snapshot)
    assert not is_whole(snapshot)
    assert ensure("tiny-stub", registry=registry) == snapshot
    assert is_whole(snapshot)
    assert builds(tmp_path) == 2
    assert list(building(tmp_path).iterdir()) == []


def test_a_missing_reference_is_written_without_a_build(stub: Family, tmp_path: Path) -> None:
    registry = Registry(stub)
    reference = ensure("tiny-stub", registry=registry).parents[1] / "refs" / "main"
    reference.unlink()
    ensure("tiny-stub", registry=registry)
    assert reference.read_text() == stub.source_hash()
    assert builds(tmp_path) == 1


def test_an_edited_family_is_built_again_beside_the_old_one(stub: Family, tmp_path: Path) -> None:
    old = ensure("tiny-stub", registry=Registry(stub))
    edited = write_stub(tmp_path, STUB + "\n# edited\n")
    new = ensure("tiny-stub", registry=Registry(edited))
    assert new != old
    assert is_whole(old)
    assert (new.parents[1] / "refs" / "main").read_text() == new.name


def test_two_processes_may_build_at_once_and_the_second_discards_its_own(stub: Family, tmp_path: Path) -> None:
    processes = [start(ENSURE_STUB, tmp_path, DIFFOPT_STUB="race") for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert builds(tmp_path) == 2
    (snapshot,) = {stdout.strip() for stdout, _ in outputs}
    assert is_whole(Path(snapshot))
    assert list(building(tmp_path).iterdir()) == []
    assert ensure("tiny-stub", registry=Registry(stub)) == Path(snapshot)
    assert builds(tmp_path) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows")
def test_a_build_that_is_killed_leaves_nothing_that_is_taken_for_whole(stub: Family, tmp_path: Path) -> None:
    process = start(ENSURE_STUB, tmp_path, DIFFOPT_STUB="hang")
    deadline = time.monotonic() + 60
    while not (tmp_path / "half").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    (abandoned,) = building(tmp_path).iterdir()
    assert [path.name for path in abandoned.iterdir()] == ["model_index.json"]
    repository = hub_directory() / "models--pytest-diffopt--tiny-stub"
    assert list((repository / "snapshots").iterdir()) == []
    os.utime(abandoned, (0, 0))  # as the next build long after sees it
    assert is_whole(ensure("tiny-stub", registry=Registry(stub)))
    assert list(building(tmp_path).iterdir()) == []


def test_a_cache_that_cannot_be_written_is_an_error_with_the_way_out(
    stub: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DIFFOPT_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(ReplicaError, match=r"cannot be written below .*file .*; set DIFFOPT_CACHE_DIR to a directory"):
        ensure("tiny-stub", registry=Registry(stub))


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("return StubPipeline()", "raise ValueError('no')", "tiny-stub: its builder raised ValueError: no"),
        ('("part",)', '("unet",)', "tiny-stub: the components that are modules are part; the family names unet."),
        ('"StubPipeline", (8', '"Other", (8', "tiny-stub: built a StubPipeline; the family names Other."),
    ],
)
def test_a_family_that_is_not_what_it_says_is_not_cached(
    stub: Family, tmp_path: Path, old: str, new: str, sentence: str
) -> None:
    wrong = write_stub(tmp_path, STUB.replace(old, new))
    with pytest.raises(ReplicaError) as raised:
        ensure("tiny-stub", registry=Registry(wrong))
    assert str(raised.value) == sentence
    assert list(building(tmp_path).iterdir()) == []


VIDEO = ("WanPipeline", "LTXPipeline", "CogVideoXPipeline", "HunyuanVideoPipeline")


def modules(pipeline: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def load(name: str, **kwargs: Any) -> Any:
    pipeline = import_module("diffusers").DiffusionPipeline.from_pretrained(resolve(name).path_or_id, **kwargs)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(pipeline: Any, prompt: str = "a photo of a cat") -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    arguments: dict[str, Any] = {"height": 96, "width": 96, "num_inference_steps": 2, "output_type": "pt"}
    arguments |= {"height": 64, "width": 64, "num_frames": 9} if type(pipeline).__name__ in VIDEO else {}
    images: torch.Tensor = pipeline(prompt, generator=generator, **arguments)[0].float()
    return images


@pytest.mark.parametrize("name", families())
def test_what_is_loaded_is_bitwise_what_was_built(name: str) -> None:
    built = families()[name].build(None)
    built.set_progress_bar_config(disable=True)
    loaded = load(name)
    assert type(loaded) is type(built)
    for component, module in modules(built).items():
        state, other = module.state_dict(), modules(loaded)[component].state_dict()
        assert state.keys() == other.keys()
        assert [key for key in state if not torch.equal(state[key], other[key])] == []
    prompt = "An astronaut, riding 2 horses: süß!"
    assert loaded.tokenizer(prompt).input_ids == built.tokenizer(prompt).input_ids
    # Loaded weights are mapped from the file, at its alignment: kernels round the same numbers otherwise.
    torch.testing.assert_close(run(loaded, prompt), run(built, prompt), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [name for name in families() if name != "tiny-wan"])
def test_a_replica_loads_and_runs_in_half_the_precision(name: str, dtype: torch.dtype) -> None:
    pipeline = load(name, dtype=dtype)
    # transformers keeps T5's `wo` from float16, for its range
    kept = {"wo"} if dtype is torch.float16 else set()
    parameters = [item for module in modules(pipeline).values() for item in module.named_parameters()]
    assert {p.dtype for name, p in parameters if not kept & set(name.split("."))} == {dtype}
    image = run(pipeline)
    assert torch.isfinite(image).all()
    assert image.std() > 0.05


def test_wan_loads_in_bfloat16_but_for_what_its_class_keeps_in_float32() -> None:
    pipeline = load("tiny-wan", dtype=torch.bfloat16)
    wide = {
        f"{c}.{n}" for c, m in modules(pipeline).items() for n, p in m.named_parameters() if p.dtype != torch.bfloat16
    }
    kept = pipeline.transformer._keep_in_fp32_modules
    names = [name for name, _ in pipeline.transformer.named_parameters()]
    assert wide == {f"transformer.{name}" for name in names if set(name.split(".")) & set(kept)}
    assert {"transformer.scale_shift_table", "transformer.condition_embedder.time_embedder.linear_1.weight"} < wide
    video = run(pipeline)
    assert torch.isfinite(video).all()
    assert video.std() > 0.05


@pytest.mark.parametrize(
    ("name", "component", "graphs"),
    [
        ("tiny-flux", "transformer", 2),
        ("tiny-sd", "unet", 2),
        ("tiny-sdxl", "unet", 1),
        ("tiny-wan", "transformer", 1),
        ("tiny-ltx", "transformer", 1),
        ("tiny-hunyuanvideo", "transformer", 2),
        ("tiny-qwen-image", "transformer", 1),
    ],
)
def test_the_repeated_blocks_of_a_replica_compile_without_breaks(name: str, component: str, graphs: int) -> None:
    from torch._dynamo.utils import counters

    pipeline = load(name)
    eager = run(pipeline)
    torch._dynamo.reset()
    counters.clear()
    try:
        getattr(pipeline, component).compile_repeated_blocks(fullgraph=True, backend="eager")
        compiled = run(pipeline)
        assert counters["stats"]["unique_graphs"] >= graphs
        assert not counters["graph_break"]
    finally:
        torch._dynamo.reset()
        counters.clear()
    torch.testing.assert_close(compiled, eager)


T5_KEPT = {f"text_encoder.encoder.block.{i}.layer.1.DenseReluDense.wo" for i in range(2)}


@pytest.mark.parametrize(
    ("backend", "kwargs", "layer"),
    [
        (
            "bitsandbytes_4bit",
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
            "Linear4bit",
        ),
        ("bitsandbytes_8bit", {"load_in_8bit": True}, "Linear8bitLt"),
    ],
    ids=["4bit", "8bit"],
)
@pytest.mark.parametrize(
    ("name", "components", "kept"),
    [
        # transformers keeps T5's `wo` as it is, for its range.
        (
            "tiny-flux",
            ["transformer", "text_encoder_2"],
            {f"text_encoder_2.encoder.block.{i}.layer.1.DenseReluDense.wo" for i in range(2)},
        ),
        ("tiny-sd", ["unet", "text_encoder"], set()),
        (
            "tiny-wan",
            ["transformer", "text_encoder"],
            T5_KEPT | {f"transformer.condition_embedder.time_embedder.linear_{i}" for i in (1, 2)},
        ),
        # transformers keeps the projection, a layer of its own beside the model.
        ("tiny-sdxl", ["unet", "text_encoder_2"], {"text_encoder_2.text_projection"}),
        (
            "tiny-sd3",
            ["transformer", "text_encoder_3"],
            {f"text_encoder_3.encoder.block.{i}.layer.1.DenseReluDense.wo" for i in range(2)},
        ),
        ("tiny-ltx", ["transformer", "text_encoder"], T5_KEPT),
        ("tiny-cogvideox", ["transformer", "text_encoder"], T5_KEPT),
        ("tiny-hunyuanvideo", ["transformer", "text_encoder"], set()),
        # transformers keeps the last layer of what generates text.
        ("tiny-qwen-image", ["transformer", "text_encoder"], {"text_encoder.lm_head"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_replica_loads_quantized_by_bitsandbytes_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    components: list[str],
    kept: set[str],
    backend: str,
    kwargs: dict[str, Any],
    layer: str,
) -> None:
    pytest.importorskip("bitsandbytes")
    diffusers, quantizers = import_module("diffusers"), import_module("diffusers.quantizers.bitsandbytes")
    # diffusers refuses to quantize without a GPU; the layers themselves run on the CPU.
    for quantizer in (quantizers.BnB4BitDiffusersQuantizer, quantizers.BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(quantizer, "validate_environment", lambda self, *args, **kwargs: None)
        monkeypatch.setattr(quantizer, "update_device_map", lambda self, device_map: device_map or {"": "cpu"})
    config = diffusers.PipelineQuantizationConfig(
        quant_backend=backend, quant_kwargs=kwargs, components_to_quantize=components
    )
    pipeline = load(name, dtype=torch.bfloat16, quantization_config=config)
    unquantized: set[str] = set()
    for component in components:
        linears = {n: m for n, m in modules(pipeline)[component].named_modules() if isinstance(m, torch.nn.Linear)}
        assert any(type(module).__name__ == layer for module in linears.values())
        unquantized |= {f"{component}.{n}" for n, m in linears.items() if type(m).__name__ != layer}
    assert unquantized == kept
    image, plain = run(pipeline), run(load(name, dtype=torch.bfloat16))
    assert torch.isfinite(image).all()
    assert image.std() > 0.05
    assert 1e-4 < ((image - plain).norm() / plain.norm()).item() < 0.2
    assert ((run(pipeline, "a photo of a dog") - image).norm() / image.norm()).item() > 1e-2


def test_a_fresh_process_finds_replicas_under_public_ids_with_no_patch(tmp_path: Path) -> None:
    environment = hub_cache_environment(
        [
            flux.DEV,
            "black-forest-labs/flux.1-SCHNELL",
            "runwayml/stable-diffusion-v1-5",
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        ]
    )
    assert environment == {"HF_HUB_CACHE": str(hub_directory()), "HF_HUB_OFFLINE": "1"}
    code = """
import json, torch
from diffusers import AutoencoderKL, AutoencoderKLWan, DiffusionPipeline, FluxPipeline
from transformers import T5EncoderModel, UMT5EncoderModel
dev = DiffusionPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16)
schnell = FluxPipeline.from_pretrained("black-forest-labs/flux.1-SCHNELL")
vae = AutoencoderKL.from_pretrained("runwayml/stable-diffusion-v1-5", subfolder="vae")
t5 = T5EncoderModel.from_pretrained("black-forest-labs/FLUX.1-dev", subfolder="text_encoder_2")
video = AutoencoderKLWan.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", subfolder="vae", dtype=torch.float32)
wan = DiffusionPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", vae=video, dtype=torch.bfloat16)
try:
    DiffusionPipeline.from_pretrained("black-forest-labs/FLUX.2-dev")
except OSError as error:
    missing = "FLUX.2-dev" in str(error)
print(json.dumps([type(dev).__name__, str(dev.transformer.dtype), dev.transformer.config.guidance_embeds,
    schnell.transformer.config.guidance_embeds, vae.config.latent_channels, t5.config.d_model, type(wan).__name__,
    str(wan.vae.dtype), isinstance(wan.text_encoder, UMT5EncoderModel), type(wan.scheduler).__name__, missing]))
"""
    process = start(code, tmp_path, **environment)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    found = json.loads(stdout)
    assert found[:6] == ["FluxPipeline", "torch.bfloat16", True, False, 4, 256]
    assert found[6:] == ["WanPipeline", "torch.float32", True, "UniPCMultistepScheduler", True]
