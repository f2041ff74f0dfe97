"""What the device does while it is dry, operation by operation, and that nothing of it is left afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pytest_diffopt.accelerators import simulated

LARGE = (256, 256)  # 256 KiB of float32
MIB = 1 << 20
UNKNOWN = "the value of a tensor is needed that nobody computed.*when running aten::_local_scalar_dense"
LEFT_OVER = "made while it was dry and has no data; the device is not dry any more"


def hollow_row() -> torch.Tensor:
    """A small tensor that depends on a large one."""
    return torch.empty(LARGE, device="cuda")[0, :4].clone()


# ------------------------------------------------------------------------------------------------- what is hollow


def test_a_block_is_hollow_where_it_is_larger_than_a_real_one() -> None:
    with simulated.dry(real_bytes=1024):
        assert not simulated.is_hollow(torch.empty(256, device="cuda"))
        assert simulated.is_hollow(torch.empty(257, device="cuda"))
        assert not simulated.is_hollow(torch.empty(0, device="cuda"))


def test_what_depends_on_a_hollow_tensor_is_hollow_however_small() -> None:
    with simulated.dry():
        row = hollow_row()
        assert simulated.is_hollow(row.sum())
        assert simulated.is_hollow(torch.ones(4, device="cuda") + row)
        assert simulated.is_hollow(row.nonzero())


def test_what_depends_on_real_tensors_alone_is_computed() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 8)
    with simulated.dry():
        y = x.to("cuda")
        assert torch.equal((y @ y).softmax(-1).cpu(), (x @ x).softmax(-1))
        assert y.argmax().item() == x.argmax().item()


def test_a_real_tensor_that_a_hollow_one_is_added_to_is_hollow_and_so_are_its_views() -> None:
    with simulated.dry():
        x = torch.ones(4, device="cuda")
        view, other = x[:2], torch.ones(4, device="cuda")
        (block,) = simulated.memory_blocks([x])
        x += hollow_row()
        assert simulated.is_hollow(view)
        assert simulated.is_hollow(x)
        assert not simulated.is_hollow(other)
        assert simulated.memory_blocks([x]) == [block]


def test_an_out_argument_is_hollow_and_takes_the_size_of_the_result() -> None:
    with simulated.dry():
        out = torch.empty(0, device="cuda")
        before = torch.cuda.memory_allocated()
        torch.exp(hollow_row(), out=out)
        assert simulated.is_hollow(out)
        assert (out.shape, torch.cuda.memory_allocated() - before) == ((4,), 16)


def test_views_are_charged_once() -> None:
    with simulated.dry():
        x = torch.empty(LARGE, device="cuda")
        before = torch.cuda.memory_allocated()
        views = [x.t(), x[3:], x.view(-1), x.detach(), x.unfold(0, 2, 1), x.view(torch.int32)]
        assert torch.cuda.memory_allocated() == before
        assert len({view.untyped_storage()._cdata for view in views}) == 1


@pytest.mark.parametrize(
    "grow",
    [
        lambda x: x.resize_(2 * x.numel()),
        lambda x: x.untyped_storage().resize_(2 * x.untyped_storage().nbytes()),
        lambda x: x.set_(x.untyped_storage(), 0, (2 * x.numel(),), (1,)),
    ],
    ids=["resize_", "resize_ of the storage", "set_"],
)
@pytest.mark.parametrize("elements", [4, 8192, 65536], ids=["small, hollow", "real, becomes hollow", "hollow"])
def test_storages_grow_without_being_read(grow: Callable[[torch.Tensor], object], elements: int) -> None:
    with simulated.dry():
        x = hollow_row() if elements == 4 else torch.zeros(elements, device="cuda")
        size, before = x.untyped_storage().nbytes(), torch.cuda.memory_allocated()
        grow(x)
        assert torch.cuda.memory_allocated() - before == size
        assert simulated.is_hollow(x) == (elements == 4 or 2 * size > 64 * 1024)


def test_a_parameters_data_moves_between_host_and_device() -> None:
    with simulated.dry():
        parameter = torch.nn.Parameter(torch.empty(LARGE))
        on_host = parameter.data
        before = torch.cuda.memory_allocated()
        parameter.data = on_host.to("cuda")
        assert simulated.is_hollow(parameter)
        assert torch.cuda.memory_allocated() - before == on_host.nbytes
        parameter.data = on_host
        assert (parameter.device.type, torch.cuda.memory_allocated()) == ("cpu", before)


# ------------------------------------------------------------------------------------------------------- the host


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_ten_gigabytes_on_the_host_cost_no_memory() -> None:
    before = resident_bytes()
    with simulated.dry():
        simulated.reset_peak_host_memory_stats()
        weight = torch.empty(10 << 30, dtype=torch.uint8)
        copy = weight.clone()
        again = copy.to("cuda")
        back = again.cpu()
        assert simulated.host_memory_stats()["allocated"] == 3 * (10 << 30)
        del weight, copy, back, again
        assert simulated.host_memory_stats() == {
            "allocated": 0,
            "peak_allocated": 3 * (10 << 30),
            "pinned": 0,
            "peak_pinned": 0,
        }
    assert resident_bytes() - before < 100 * MIB


def test_pinned_copies_are_pinned_and_counted_as_the_allocator_of_the_host_takes_them() -> None:
    def held() -> int:
        return simulated.host_memory_stats()["pinned"] - before

    with simulated.dry():
        simulated.empty_host_cache()
        before = simulated.host_memory_stats()["pinned"]
        pinned = torch.empty(5 * MIB, dtype=torch.uint8).pin_memory()
        assert pinned.is_pinned()
        assert held() == 8 * MIB  # a power of two
        del pinned
        assert held() == 8 * MIB  # kept
        again = [torch.empty(size, dtype=torch.uint8).pin_memory() for size in (7 * MIB, 8 * MIB, MIB + 1)]
        assert held() == (8 + 8 + 2) * MIB  # the first took what was kept
        del again
        simulated.empty_host_cache()
        assert held() == 0


def test_what_came_from_a_hollow_tensor_is_hollow_again_on_the_device_also_by_way_of_a_host_copy() -> None:
    with simulated.dry() as run:
        row = hollow_row()
        host = row.cpu()
        assert host.tolist() == [0, 0, 0, 0]
        assert list(run.blocks_read) == simulated.memory_blocks([row])
        assert simulated.is_hollow(host.to("cuda"))
        assert simulated.is_hollow(host.clone().to("cuda"))
        host.copy_(torch.arange(4.0))
        assert host.to("cuda").tolist() == [0, 1, 2, 3]


# --------------------------------------------------------------------------------------------------- values, sizes


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x[0].item(),
        lambda x: bool(x[0] > 0),
        lambda x: float(x[0]),
        lambda x: torch.arange(x[0], device="cuda"),
        lambda x: F.gaussian_nll_loss(x, x, x),
    ],
    ids=["item", "bool", "float", "arange", "a check of values"],
)
def test_a_value_that_nobody_computed_is_an_error_that_names_the_operation(
    read: Callable[[torch.Tensor], object],
) -> None:
    with simulated.dry(), pytest.raises(NotImplementedError, match=UNKNOWN):
        read(hollow_row())


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("aten::equal", lambda x: torch.equal(x, x)),
        ("aten::geqrf", lambda x: torch.geqrf(x.view(2, 2))),
        ("aten::repeat_interleave.Tensor", lambda x: x.repeat_interleave(x.long())),
    ],
)
def test_an_operation_without_meta_kernel_and_rule_is_an_error_that_names_both(
    name: str, call: Callable[[torch.Tensor], object]
) -> None:
    with simulated.dry(), pytest.raises(NotImplementedError) as raised:
        call(hollow_row())
    assert str(raised.value).splitlines()[0] == (
        f"On the dry device {name} has neither a meta kernel nor a rule, so nobody knows what it returns. "
        "pytest_diffopt.accelerators.simulated.register_dry_kernel gives it one."
    )


def test_rules_answer_them() -> None:
    kernels = {"aten::_local_scalar_dense": lambda x: 7.0, "aten::equal": lambda x, y: True}
    with simulated.dry(kernels=kernels):
        row = hollow_row()
        assert (row[0].item(), torch.equal(row, row)) == (7.0, True)
    rule = simulated.register_dry_kernel("aten::geqrf", lambda x: (x.new_empty(x.shape), x.new_empty(x.shape[-1])))
    try:
        with simulated.dry():
            a, tau = torch.geqrf(hollow_row().view(2, 2))
            assert simulated.is_hollow(tau)
            assert simulated.is_hollow(a)
    finally:
        rule.remove()
    rule.remove()


def test_the_latest_rule_counts_until_it_is_removed() -> None:
    older = simulated.register_dry_kernel("aten::_local_scalar_dense", lambda x: 1.0)
    newer = simulated.register_dry_kernel("aten::_local_scalar_dense", lambda x: 2.0)
    with simulated.dry():
        row = hollow_row()
        with simulated.dry(kernels={"aten::_local_scalar_dense": lambda x: 3.0}):
            assert row[0].item() == 3
        assert row[0].item() == 2
        newer.remove()
        assert row[0].item() == 1
        older.remove()
        with pytest.raises(NotImplementedError, match=UNKNOWN):
            row[0].item()


def test_a_rule_for_an_operation_that_writes_leaves_what_it_writes_to_hollow() -> None:
    with simulated.dry():
        values, indices = hollow_row().cummax(0)
        assert simulated.is_hollow(values)
        assert simulated.is_hollow(indices)


@pytest.mark.parametrize(
    ("count", "most", "operation"),
    [
        (lambda x: x.nonzero(), (4, 1), "aten::nonzero"),
        (lambda x: x.masked_select(x > 0), (4,), "aten::masked_select"),
        (lambda x: x[x > 0], (4,), "aten::nonzero"),
        (lambda x: x.unique(), (4,), "aten::_unique2"),
        (lambda x: x.view(2, 2).unique(dim=0), (2, 2), "aten::unique_dim"),
        (lambda x: x.unique_consecutive(), (4,), "aten::unique_consecutive"),
    ],
)
def test_where_values_decide_a_size_the_most_is_taken_and_said(
    count: Callable[[torch.Tensor], torch.Tensor], most: tuple[int, ...], operation: str
) -> None:
    with simulated.dry() as run:
        found = count(hollow_row())
        assert (found.shape, simulated.is_hollow(found)) == (most, True)
    assert any(guess.startswith(operation) for guess in run.guesses)


def test_a_mask_that_is_known_is_counted() -> None:
    mask = torch.tensor([True, False, True, True], device="cuda")
    with simulated.dry() as run:
        row = hollow_row()
        assert row[mask].shape == (3,)
        row[mask] = torch.empty(LARGE, device="cuda")[0, :3]
        assert row[mask.cpu()].shape == (3,)
    assert run.guesses == ()


# ------------------------------------------------------------------------------------------------ nothing is left


def test_after_it_the_device_computes_the_same_bits_and_every_byte_is_given_back() -> None:
    def compute() -> torch.Tensor:
        torch.manual_seed(3)
        x = torch.randn(LARGE, device="cuda")
        found: torch.Tensor = F.layer_norm(x @ x, LARGE[-1:]).cpu()
        return found

    expected, before = compute(), torch.cuda.memory_allocated()
    with simulated.dry():
        assert not compute().any()
        with simulated.dry(real_bytes=MIB):
            assert torch.equal(compute(), expected)
        assert simulated.is_dry()
        assert not compute().any()
    assert not simulated.is_dry()
    assert torch.equal(compute(), expected)
    assert torch.cuda.memory_allocated() == before


def test_it_ends_with_a_raise_and_its_rules_too() -> None:
    with pytest.raises(KeyError), simulated.dry(kernels={"aten::equal": lambda x, y: True}):
        raise KeyError
    assert not simulated.is_dry()
    with simulated.dry():
        row = hollow_row()
        with pytest.raises(NotImplementedError, match="aten::equal has neither"):
            torch.equal(row, row)


def test_an_unknown_operator_is_refused_before_anything_is_changed() -> None:
    with pytest.raises(ValueError, match=r"There is no operator 'aten::nonzeros'"):
        simulated.dry(kernels={"aten::nonzero": lambda x: x, "aten::nonzeros": lambda x: x})
    with pytest.raises(ValueError, match="real_bytes: found -1; it takes a number of bytes, at least 0"):
        simulated.dry(real_bytes=-1)
    assert not simulated.is_dry()


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x + 1,
        lambda x: x.cpu(),
        lambda x: x[0].item(),
        lambda x: x.fill_(0),
        lambda x: torch.ones(4, device="cuda").copy_(x),
        lambda x: torch.neg(torch.ones(4, device="cuda"), out=x),
        lambda x: F.conv1d(x.view(1, 1, 4), torch.ones(1, 1, 2, device="cuda")),
        lambda x: x.view(2, 2) @ torch.ones(2, 2, device="cuda"),
    ],
    ids=["add", "cpu", "item", "fill_", "copy_", "out", "convolution", "mm"],
)
def test_a_hollow_tensor_that_outlives_it_is_refused(use: Callable[[torch.Tensor], object]) -> None:
    with simulated.dry():
        row = hollow_row()
    with pytest.raises(RuntimeError, match=LEFT_OVER):
        use(row)


def test_threads_find_the_device_dry() -> None:
    found: list[bool] = []
    with simulated.dry():
        threads = [
            threading.Thread(target=lambda: found.append(simulated.is_hollow(hollow_row() * 2))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [True] * 4


# --------------------------------------------------------------------------------------------------- memory, costs


def test_memory_that_does_not_suffice_is_missed_at_the_very_allocation() -> None:
    with simulated.dry():
        simulated.set_memory_limit(torch.cuda.memory_reserved() + 3 * MIB)
        kept = [torch.empty(MIB, dtype=torch.uint8, device="cuda") for _ in range(3)]
        with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 1024\.00 KiB"):
            torch.empty(MIB, dtype=torch.uint8, device="cuda")
        kept.pop()
        torch.empty(MIB, dtype=torch.uint8, device="cuda")


def test_a_cost_counts_while_arguments_results_and_scratch_are_there() -> None:
    def cost(results: list[torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> tuple[int, int, int]:
        assert (results[0].shape, x.shape) == (LARGE, LARGE)
        return 100, 1000, 5000

    with simulated.dry(costs={"aten::mm": cost}):
        x = torch.empty(LARGE, device="cuda")
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        simulated.record_memory_events()
        y = x @ x
        simulated.record_memory_events(False)
        assert torch.cuda.max_memory_allocated() - before == y.nbytes + 1000
        assert torch.cuda.memory_allocated() - before == y.nbytes
    scratch = [event for event in simulated.recorded_memory_events() if event.high]
    assert [(event.bytes, event.low, event.high, event.operation) for event in scratch] == [
        (1000, 100, 5000, "aten::mm")
    ]


def test_a_removed_cost_counts_no_more() -> None:
    rule = simulated.register_cost("aten::mm", lambda results, x, y: 10 * MIB)
    peaks = []
    with simulated.dry():
        x = torch.empty(LARGE, device="cuda")
        for remove in (lambda: None, rule.remove):
            remove()
            torch.cuda.reset_peak_memory_stats()
            (x @ x)
            peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[0] - peaks[1] == 10 * MIB


@pytest.mark.parametrize("wrong", [(3, 2, 1), -1, (1, 2), None, float("nan"), "x"])
def test_a_cost_that_is_none_is_an_error(wrong: Any) -> None:
    with simulated.dry(costs={"aten::mm": lambda results, x, y: wrong}):
        x = torch.empty(LARGE, device="cuda")
        with pytest.raises(ValueError, match="in rising order: at the least, expected, at the most; found"):
            x @ x


def test_what_the_events_say_is_reserved_is_what_the_device_reserved() -> None:
    torch.cuda.set_device(1)  # bitsandbytes keeps its tables on the first
    simulated.set_caching_allocator(True)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.memory_reserved() == torch.cuda.memory_allocated() == 0
    costs = {"aten::mm": lambda results, x, y: (0, 3 * MIB, 50 * MIB)}
    with simulated.dry(costs=costs):
        simulated.record_memory_events()
        kept = []
        for size in (100, 300, 700, 1500):
            x = torch.empty(size, size, device="cuda")
            kept.append((x @ x)[:1].clone())
            del x
            torch.cuda.empty_cache()
        simulated.record_memory_events(False)
        low, expected, high = (simulated.replay_reserved_memory(name) for name in ("low", "expected", "high"))
        assert expected == torch.cuda.max_memory_reserved()
        assert low < expected < high
        del kept


# ------------------------------------------------------------------------------------- computed and dry, side by side


def counted(program: Callable[[], object]) -> tuple[dict[str, int], Any]:
    """What the device counts while a program runs, and the layouts of what it returns."""
    simulated.reset_counts()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.manual_seed(0)
    found: Any = program()
    stats = torch.cuda.memory_stats()
    counts = {
        "peak_bytes": torch.cuda.max_memory_allocated() - before,
        "live_bytes": torch.cuda.memory_allocated() - before,
        "allocations": stats["allocation.all.allocated"],
        "kernels": simulated.kernel_count(),
        **simulated.transfer_stats(),
    }
    results = [one for one in torch.utils._pytree.tree_leaves(found) if isinstance(one, torch.Tensor)]
    return counts, [(one.dtype, one.shape, one.stride()) for one in results]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda")


def _trained() -> list[torch.Tensor | None]:
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.GELU(), torch.nn.Linear(16, 4))
    model.to("cuda")
    model(normal(3, 8)).square().mean().backward()
    return [parameter.grad for parameter in model.parameters()]


def _autocast() -> torch.Tensor:
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found: torch.Tensor = torch.nn.Linear(8, 8, device="cuda")(normal(3, 8)).softmax(-1)
        return found


SIDE_BY_SIDE: dict[str, Callable[[], object]] = {
    "conv1d": lambda: F.conv1d(normal(2, 4, 9), normal(6, 2, 3), normal(6), groups=2),
    "conv2d, channels_last": lambda: F.conv2d(
        normal(2, 4, 9, 9).to(memory_format=torch.channels_last), normal(6, 4, 3, 3), stride=2, padding=1
    ),
    "conv3d": lambda: F.conv3d(normal(1, 4, 5, 6, 7), normal(6, 4, 3, 3, 3), dilation=2, padding=2),
    "conv_transpose1d": lambda: F.conv_transpose1d(normal(1, 4, 5), normal(4, 3, 3), normal(6), stride=2, groups=2),
    "conv_transpose2d": lambda: F.conv_transpose2d(normal(1, 4, 5, 5), normal(4, 3, 3, 3), stride=2, output_padding=1),
    "conv_transpose3d": lambda: F.conv_transpose3d(normal(1, 4, 3, 3, 3), normal(4, 2, 2, 2, 2)),
    "attention": lambda: F.scaled_dot_product_attention(normal(1, 2, 7, 8), normal(1, 2, 7, 8), normal(1, 2, 7, 8)),
    "attention, mask": lambda: F.scaled_dot_product_attention(
        normal(1, 2, 7, 8), normal(1, 2, 7, 8), normal(1, 2, 7, 8), attn_mask=normal(7, 7)
    ),
    "attention, widths that the fused kernel does not take": lambda: F.scaled_dot_product_attention(
        normal(1, 2, 7, 8), normal(1, 2, 7, 8), normal(1, 2, 7, 6)
    ),
    "autocast": _autocast,
    "backward": _trained,
    "lstm": lambda: torch.nn.LSTM(5, 6, 2, bidirectional=True).to("cuda")(normal(3, 2, 5))[0].sum().backward(),
    "gru": lambda: torch.nn.GRU(5, 6, batch_first=True).to("cuda")(normal(3, 2, 5))[0].sum().backward(),
    "batched product": lambda: torch.baddbmm(normal(2, 3, 4), normal(2, 3, 5), normal(2, 5, 4)),
    "pixel_shuffle": lambda: F.pixel_shuffle(normal(1, 8, 3, 3), 2),
    "fft": lambda: torch.fft.ifftn(torch.fft.fftn(normal(4, 4), dim=(-2, -1)), dim=(-2, -1)).real,
    "inverse": lambda: torch.linalg.solve(normal(4, 4), normal(4)),
    "cumulated": lambda: (normal(4).logcumsumexp(0), normal(4).cummax(0)),
}


@pytest.mark.parametrize("name", SIDE_BY_SIDE)
def test_computed_and_dry_it_counts_the_same(name: str) -> None:
    computed = counted(SIDE_BY_SIDE[name])
    with simulated.dry(real_bytes=0):
        dry = counted(SIDE_BY_SIDE[name])
    if name == "inverse":  # whether the matrix was singular is read by the host, and not asked where nobody knows it
        assert computed[0].pop("d2h_calls") == 1
        assert computed[0].pop("d2h_bytes") == 1
        assert dry[0].pop("d2h_calls") == 0
        assert dry[0].pop("d2h_bytes") == 0
        assert computed[0].pop("allocations") - dry[0].pop("allocations") == 1
    assert dry == computed


def test_the_hosts_random_numbers_are_those_of_a_computed_run_and_the_devices_are_not_drawn() -> None:
    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(5)
        F.dropout(torch.empty(LARGE, device="cuda"), 0.5)
        torch.randn(LARGE, device="cuda")
        return torch.get_rng_state(), torch.cuda.get_rng_state()

    host, device = draw()
    with simulated.dry():
        dry_host, dry_device = draw()
    assert torch.equal(host, dry_host)
    torch.cuda.manual_seed(5)
    assert torch.equal(dry_device, torch.cuda.get_rng_state())
    assert not torch.equal(dry_device, device)


def test_a_rule_that_nobody_would_ask_for_is_refused() -> None:
    for name in ("aten::copy_", "aten::view", "aten::set_.source_Tensor", "aten::convolution"):
        with pytest.raises(ValueError, match=f"{name} is run by the device itself, wet and dry: a kernel for it would"):
            simulated.register_dry_kernel(name, torch.empty_like)
    for name in ("aten::linear", "aten::conv2d", "aten::scaled_dot_product_attention"):
        with pytest.raises(ValueError, match=f"{name} is made of other operations, and never runs itself: give those"):
            simulated.register_cost(name, lambda results, *rest: 0)
    with pytest.raises(ValueError, match="aten::copy_ is run by the device itself"):
        simulated.dry(costs={"aten::copy_": lambda results, *rest: 0})
    for kind, name in ((simulated.register_cost, "aten::convolution"), (simulated.register_dry_kernel, "aten::linear")):
        kind(name, torch.empty_like).remove()
