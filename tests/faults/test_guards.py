"""Each kind of guard, from a real recompile, and the advice for it: never what the recipe does already."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pytest_diffopt import Call, Contract
from pytest_diffopt.checks.guards import advice
from pytest_diffopt.observation.compilation import CompileWatch
from pytest_diffopt.recipe import Compilation, Recipe

from .conftest import Healthy, Judge, TwoPart, assert_all_pass


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.table: dict[Any, torch.Tensor] = {}
        self.history: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Freqs(Base):
    """Keeps a table of positions as large as the largest input so far."""

    freqs: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.freqs is None or self.freqs.shape[0] < x.shape[0]:
            self.freqs = torch.ones(x.shape[0], 8)
        return self.layer(x) * self.freqs[: x.shape[0]]


class OnTheClass(Base):
    freqs: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if OnTheClass.freqs is None or OnTheClass.freqs.shape[0] != x.shape[0]:
            OnTheClass.freqs = torch.ones(x.shape[0], 8)
        return self.layer(x) * OnTheClass.freqs


class InADict(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = x.shape[0]
        if size not in self.table:
            self.table[size] = torch.ones(size, 8)
        return self.layer(x) * self.table[size]


class Remembers(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.history.append(1)
        return self.layer(x) * len(self.history)


class Takes(Base):
    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None, **more: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + sum(more.values()) + (0 if y is None else y)


class Scaled(Base):
    def forward(self, x: torch.Tensor, number: float = 1.0) -> torch.Tensor:
        return self.layer(x) * (number if number > 3 else 1)


class Product(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def sizes(*rows: int, width: int = 8) -> list[dict[str, Any]]:
    return [{"x": torch.ones(count, width)} for count in rows]


X = {"x": torch.ones(4, 8)}
GUARDS: list[tuple[str, type[Base], list[dict[str, Any]], dict[str, Any], str]] = [
    ("a table on the module", Freqs, sizes(4, 6, 9), {}, "the size of a tensor that is kept (freqs)"),
    ("an attribute that is set", Freqs, sizes(4, 6), {"dynamic": True}, "that the code sets while it runs"),
    ("a table on the class", OnTheClass, sizes(4, 6, 9), {}, "the size of a tensor that is kept (OnTheClass.freqs)"),
    ("a table in a dict", InADict, sizes(4, 6), {"dynamic": True}, "it is the key of a dict"),
    ("a list that grows", Remembers, sizes(4, 4, 4), {}, "a list or a dict that the code sets"),
    ("a size", Base, sizes(4, 6), {}, "compile with dynamic = true"),
    ("a size of one, first", Base, sizes(1, 4), {"dynamic": True}, "sizes of 0 and 1"),
    ("a size of one, later", Base, sizes(4, 1), {"dynamic": True}, "sizes of 0 and 1"),
    (
        "equal sizes",
        Product,
        [{"x": torch.ones(6, 6)}, {"x": torch.ones(6, 8)}],
        {"dynamic": True},
        "x.size()[1] and x.size()[0] were equal when it was compiled",
    ),
    ("a keyword more", Takes, [X, {**X, "more": torch.ones(8)}], {}, "pass different arguments"),
    ("None or not", Takes, [X, {**X, "y": torch.ones(8)}], {}, "pass different arguments"),
    ("a number", Scaled, [{**X, "number": 1.0}, {**X, "number": 2.0}], {}, "or compile with dynamic = true"),
    (
        "a comparison",
        Scaled,
        [{**X, "number": 1.0}, {**X, "number": 2.0}, {**X, "number": 5.0}],
        {"dynamic": True},
        "a Python number that changes: pass it as a tensor",
    ),
    ("a dtype", Product, [X, {"x": torch.ones(4, 8, dtype=torch.float64)}], {}, "several dtypes"),
    ("a layout", Product, [X, {"x": torch.ones(8, 4).t()}], {}, "make the input contiguous"),
    ("a rank", Product, [X, {"x": torch.ones(4, 8, 1)}], {}, "another number of dimensions"),
    ("gradients", Product, [X, {"x": torch.ones(4, 8, requires_grad=True)}], {}, "compiled in another mode"),
]


@pytest.mark.parametrize(
    ("model", "calls", "compiled", "said"), [case[1:] for case in GUARDS], ids=[case[0] for case in GUARDS]
)
def test_each_guard_has_its_advice(
    model: type[Base], calls: list[dict[str, Any]], compiled: dict[str, Any], said: str
) -> None:
    OnTheClass.freqs = None
    torch.compiler.reset()
    module = model()
    run: Any = torch.compile(module, backend="eager", **compiled)
    with CompileWatch({id(module): ("model", "")}) as watch:
        for arguments in calls:
            run(**arguments)
    last = [frame for frame in watch.record.frames if frame.recompile][-1:]
    assert last, "nothing was compiled again"
    (tip,) = advice(last, Recipe("r", Base, compilation=Compilation("model", backend="eager", **compiled)))
    assert said in tip
    if compiled.get("dynamic"):
        assert "compile with dynamic" not in tip


class Coinciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + other.sum()


def coinciding() -> Call:
    pairs = ((12, 12), (12, 12), (20, 12))
    return Call(inputs=[{"x": torch.randn(a, 16), "other": torch.randn(b)} for a, b in pairs])


def test_torchs_settings_of_symbolic_sizes_can_be_given(judge: Judge) -> None:
    verdict = judge(Coinciding, call=coinciding(), dynamic=True)["recompiles"]
    assert "dynamo = { use_duck_shape = false }" in verdict.text
    apart = {"use_duck_shape": False}
    assert_all_pass(judge(Coinciding, call=coinciding(), dynamic=True, dynamo=apart))


# What is compiled before the first call.


class Server(TwoPart):
    """Runs its denoiser once, as a server warms up."""

    def __init__(self, mode: Any, again: bool = False, device: str = "cpu") -> None:
        super().__init__(Healthy().to(device), Healthy().to(device))
        model: Any = self.components["denoiser"]
        model.compile(backend="eager", dynamic=False)
        with mode():
            model(self.embed("warm"))
            if again:
                model(self.embed("warm").repeat(2, 1))

    @torch.no_grad()
    def __call__(self, prompt: str, num_inference_steps: int = 3) -> dict[str, torch.Tensor]:
        return super().__call__(prompt, num_inference_steps)


def judged(judge: Judge, *given: Any, **contract: Any) -> Any:
    return judge(
        lambda device: Server(*given, device=device),
        component="denoiser",
        call=Call(),
        dynamic=False,
        contract=Contract(**contract),
    )["recompiles"]


@pytest.mark.parametrize("contract", [{"max_recompiles": 0}, {"warmup_calls": 0}], ids=["none at all", "no warm-up"])
def test_what_was_compiled_in_another_mode_while_it_was_prepared_is_compiled_again(
    judge: Judge, contract: dict[str, int]
) -> None:
    verdict = judged(judge, torch.inference_mode, **contract)
    assert verdict.status == "failed"
    assert "dispatch key set mismatch" in verdict.text
    assert "warm up in the mode in which you call" in verdict.text
    healthy = judged(judge, torch.no_grad, **contract)
    assert healthy.status == "passed"
    assert "1 graph compiled while it was prepared" in healthy.sentence


def test_what_was_compiled_before_it_was_placed_is_compiled_again(judge: Judge) -> None:
    verdict = judge(
        lambda: Server(torch.no_grad),
        component="denoiser",
        call=Call(),
        dynamic=False,
        contract=Contract(max_recompiles=0),
    )["recompiles"]
    assert verdict.status == "failed"
    assert "place the pipeline before it is warmed up" in verdict.text


def test_a_recompile_while_it_is_prepared_counts(judge: Judge) -> None:
    assert judged(judge, torch.no_grad, True, max_recompiles=0).sentence == "1 in all, 0 allowed"
    assert judged(judge, torch.no_grad, True, max_recompiles=1).status == "passed"


class OtherServer(Server):
    """Warms up another part of the same class: it shares the code, and its own first compile is none again."""

    def __init__(self, device: str) -> None:
        super().__init__(torch.no_grad, device=device)
        other: Any = Healthy().to(device)
        other.compile(backend="eager", dynamic=False)
        self.components["refiner"] = other

    def __call__(self, prompt: str, num_inference_steps: int = 3) -> dict[str, torch.Tensor]:
        found = super().__call__(prompt, num_inference_steps)
        with torch.no_grad():
            return {"images": self.components["refiner"](found["images"])}


def test_a_first_compile_of_another_module_of_the_class_is_no_recompile(judge: Judge) -> None:
    both = Contract(max_recompiles=0)
    assert (
        judge(lambda device: OtherServer(device), component="denoiser", call=Call(), dynamic=False, contract=both)[
            "recompiles"
        ].status
        == "passed"
    )
