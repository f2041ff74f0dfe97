"""What a block's code becomes when it is compiled, and how its calls are made small."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_diffopt.documentation import rewriting, small_calls
from pytest_diffopt.documentation.small_calls import Shrunk, made_small


def rewritten(source: str, device: str = "xpu", **names: Any) -> dict[str, Any]:
    """What a block leaves in its namespace."""
    namespace: dict[str, Any] = {rewriting.NOTE_CAUGHT: lambda: None, **names}
    code = rewriting.compiled(source, page="page.md", line=1, device=device, folder="/folder")
    exec(code, namespace)
    return namespace


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ('"cuda"', "xpu"),
        ('"cuda:1"', "xpu:1"),
        ('f"cuda:{1 + 1}"', "xpu:2"),
        ('{"": "cuda"}', {"": "xpu"}),
        ('["cuda", "cpu", "cuda:0"]', ["xpu", "cpu", "xpu:0"]),
        ('"cuda is a device"', "cuda is a device"),
        ('"no_cuda"', "no_cuda"),
        ('f"on cuda:{1}"', "on cuda:1"),
        ("1", 1),
    ],
)
def test_a_device_in_a_string_becomes_the_one_in_use(expression: str, value: object) -> None:
    assert rewritten(f"x = {expression}")["x"] == value


def test_torch_cuda_becomes_the_module_of_the_device_in_use() -> None:
    torch = SimpleNamespace(cuda="real", xpu="simulated", backends=SimpleNamespace(cuda="flags"))
    found = rewritten("a = torch.cuda\nb = torch.backends.cuda\nc = th.cuda", torch=torch, th=torch)
    assert (found["a"], found["b"], found["c"]) == ("simulated", "flags", "real")


def test_imports_of_torch_cuda_are_of_the_device_in_use() -> None:
    source = "import torch.cuda\nimport torch as th\nfrom torch.cuda.amp import autocast\nfrom torch import cuda\nx = th.cuda"
    tree = ast.parse(source)
    rewriter = rewriting._Rewriter("xpu", "/folder", rewriting._names_of_torch(tree))
    assert ast.unparse(rewriter.visit(tree)).splitlines() == [
        "import torch.xpu",
        "import torch as th",
        "from torch.xpu.amp import autocast",
        "from torch import xpu as cuda",
        "x = th.xpu",
    ]


@pytest.mark.parametrize(
    ("call", "given"), [("x.cuda()", ("xpu",)), ("x.cuda(1)", ("xpu:1",)), ('x.to("cuda")', ("xpu",))]
)
def test_a_move_to_cuda_is_one_to_the_device_in_use(call: str, given: tuple[str, ...]) -> None:
    moved: list[tuple[str, ...]] = []
    rewritten(call, x=SimpleNamespace(to=lambda *args: moved.append(args)))
    assert moved == [given]


def test_nothing_is_rewritten_where_cuda_is_in_use() -> None:
    assert rewritten('x = "cuda:1"\ny = torch.cuda', "cuda", torch=SimpleNamespace(cuda="real"))["x"] == "cuda:1"


def test_tracebacks_and_syntax_errors_show_the_pages_own_lines() -> None:
    code = rewriting.compiled("a = 1\n\n1 / 0\n", page="page.md", line=40, device="xpu", folder="/folder")
    with pytest.raises(ZeroDivisionError) as caught:
        exec(code, {})
    assert rewriting.line_in(caught.value, "page.md") == 42
    with pytest.raises(SyntaxError) as wrong:
        rewriting.compiled("a = 1\nb = (\n", page="page.md", line=40, device="xpu", folder="/folder")
    assert (wrong.value.lineno, rewriting.line_in(wrong.value, "page.md")) == (41, 41)


def test_placeholder_paths_lead_into_the_blocks_own_folder() -> None:
    source = 'a = "/path/to/model"\nb = "path/to/disk"\nc = "/etc/path/to"\nd = "your/path"'
    found = rewritten(source)
    assert [found[name] for name in "abcd"] == [
        "/folder/path/to/model",
        "/folder/path/to/disk",
        "/etc/path/to",
        "/folder/your/path",
    ]
    leads = rewriting.placeholders(source, "/folder")
    assert leads == [Path("/folder/path/to/model"), Path("/folder/path/to/disk"), Path("/folder/your/path")]


def test_what_an_except_holds_back_is_told_with_its_line() -> None:
    source = (
        "try:\n    missing\nexcept NameError:\n    pass\n"
        "try:\n    try:\n        1 / 0\n    except ZeroDivisionError:\n        raise ValueError\nexcept Exception:\n    pass\n"
        "try:\n    {}['k']\nexcept:\n    pass\n"
    )
    told: list[tuple[str, int]] = []
    note = rewriting.on_caught(lambda error, line: told.append((type(error).__name__, line)), "page.md")
    exec(rewriting.compiled(source, page="page.md", line=11, device="xpu", folder="/f"), {rewriting.NOTE_CAUGHT: note})
    assert told == [("NameError", 12), ("ZeroDivisionError", 17), ("ValueError", 19), ("KeyError", 23)]


def test_the_line_of_an_error_that_was_never_on_the_page_is_nought() -> None:
    assert rewriting.line_in(ValueError(), "page.md") == 0


# Small calls.


def test_what_is_large_is_made_small_and_told() -> None:
    given = {"height": 1024, "width": 768, "num_inference_steps": 50, "max_sequence_length": 512, "guidance_scale": 7.5}
    small, shrunk = made_small(given, (96, 64))
    assert small == {
        "height": 96,
        "width": 64,
        "num_inference_steps": 4,
        "max_sequence_length": 64,
        "guidance_scale": 7.5,
    }
    assert list(map(str, shrunk)) == [
        "height=1024 as 96",
        "width=768 as 64",
        "num_inference_steps=50 as 4",
        "max_sequence_length=512 as 64",
    ]


def test_what_is_left_to_the_pipeline_is_made_small_too() -> None:
    small, shrunk = made_small({"height": None, "width": None, "num_frames": 81, "image": object()}, (64, 64, 9))
    assert (small["height"], small["width"], small["num_frames"]) == (64, 64, 9)
    assert shrunk[0] == Shrunk("height", None, 64)
    assert str(shrunk[0]) == "height=its own as 64"


def test_what_is_small_stays_and_nothing_is_told() -> None:
    given = {"height": 32, "width": 32, "num_inference_steps": 2, "prompt": ["a", "b"], "return_dict": True}
    assert made_small(given, (96, 96)) == (given, [])


def test_a_list_of_prompts_is_cut_with_what_goes_with_it() -> None:
    given = {"prompt": ["a"] * 8, "negative_prompt": ["b"] * 8, "generator": list(range(8)), "sigmas": [1.0, 0.5, 0.1]}
    small, shrunk = made_small(given)
    assert small == {"prompt": ["a"] * 2, "negative_prompt": ["b"] * 2, "generator": [0, 1], "sigmas": [1.0, 0.5, 0.1]}
    assert str(shrunk[0]) == "prompts=8 as 2"


def test_images_for_each_prompt_are_made_few_and_true_is_no_number() -> None:
    small, _ = made_small({"num_images_per_prompt": 16, "num_inference_steps": True})
    assert small == {"num_images_per_prompt": small_calls.BATCH, "num_inference_steps": True}


def test_a_pipeline_that_reuses_steps_keeps_them() -> None:
    assert made_small({"num_inference_steps": 50}, keeps_steps=True) == ({"num_inference_steps": 50}, [])
