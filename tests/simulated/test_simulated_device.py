"""The device behaves as an accelerator does: indices, streams, generators, storages, files, modules."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn


def test_a_device_that_is_not_there_is_refused_in_cudas_words() -> None:
    for attempt in (
        lambda: torch.empty(1, device="cuda:7"),
        lambda: torch.zeros(1).to("cuda:7"),
        lambda: torch.arange(3, device="cuda:2"),
        lambda: torch.cuda.set_device(7),
        lambda: torch.cuda.memory_allocated(7),
        lambda: torch.Generator("cuda:7"),
        lambda: torch.cuda.synchronize("cuda:2"),
        lambda: torch.accelerator.synchronize(5),
        lambda: torch.accelerator.current_stream(100),
        lambda: torch.Stream(device="cuda:3"),
        lambda: torch.cuda.Stream("cuda:3"),
        lambda: torch.cuda.current_stream(3),
        lambda: torch.cuda.max_memory_reserved("cuda:4"),
        lambda: torch.cuda.mem_get_info(2),
        lambda: nn.Linear(1, 1).to("cuda:2"),
        lambda: nn.Linear(1, 1).cuda(2),
        lambda: torch.UntypedStorage(4, device="cuda:2"),
    ):
        with pytest.raises(torch.AcceleratorError, match=r"^CUDA error: invalid device ordinal"):
            attempt()
    assert torch.cuda.current_device() == 0
    with pytest.raises(AssertionError, match="Invalid device id"):
        torch.cuda.get_device_properties(2)
    with pytest.raises(ValueError, match="Expected a cuda device, but got: cpu"):
        torch.cuda.memory_allocated("cpu")


def test_two_devices_have_memory_of_their_own() -> None:
    base = [torch.cuda.memory_allocated(i) for i in range(2)]
    x = torch.ones(100, device="cuda:1")
    y = x + 1
    assert y.device == torch.device("cuda:1")
    assert [torch.cuda.memory_allocated(i) - base[i] for i in range(2)] == [0, 800]
    with torch.cuda.device(1):
        assert torch.cuda.current_device() == 1
        z = torch.ones(10, device="cuda")
    assert torch.cuda.current_device() == 0
    assert z.device.index == 1
    moved = x.to("cuda:0")
    assert [torch.cuda.memory_allocated(i) - base[i] for i in range(2)] == [400, 840]
    assert torch.equal(moved.cpu(), x.cpu())
    with torch.cuda.device_of(x):
        assert torch.cuda.current_device() == 1
    torch.cuda.set_device("cuda:1")
    assert torch.empty(1, device="cuda").device.index == 1


@pytest.mark.parametrize(
    "mix",
    [
        lambda a, b: a + b,
        lambda a, b: b + a,
        lambda a, b: torch.mm(a, b),
        lambda a, b: torch.cat([a, b]),
        lambda a, b: torch.where(a > 0, a, b),
        lambda a, b: a.add_(b),
        lambda a, b: torch.add(a, a, out=b),
        lambda a, b: a.gather(0, b.long()),
        lambda a, b: torch.conv2d(a[None, None], b[None, None]),
        lambda a, b: torch.nn.functional.linear(a, b),
    ],
)
@pytest.mark.parametrize("other", ["cpu", "cuda:1"])
def test_tensors_of_two_devices_do_not_mix(mix: Any, other: str) -> None:
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device, but found at least two"):
        mix(torch.ones(3, 3, device="cuda:0"), torch.ones(3, 3, device=other))


def test_the_message_names_both_devices() -> None:
    with pytest.raises(RuntimeError, match=r"found at least two devices, cuda:0 and cuda:1!"):
        torch.ones(3, device="cuda:0") + torch.ones(3, device="cuda:1")
    with pytest.raises(RuntimeError, match=r"found at least two devices, cuda:0 and cpu!"):
        torch.ones(3, device="cuda:0") * torch.ones(3)


def test_an_index_comes_from_the_host_or_from_the_same_device() -> None:
    x = torch.arange(5.0, device="cuda")
    assert x[torch.tensor([0, 3])].tolist() == [0, 3]
    with pytest.raises(RuntimeError, match=r"either on cpu or on the same device as the indexed tensor \(cuda:0\)"):
        x[torch.tensor([0, 3], device="cuda:1")]


@pytest.mark.parametrize(
    "mix",
    [
        lambda x, number: x + number,
        lambda x, number: number**x,
        lambda x, number: x.clone().eq_(number),
        lambda x, number: x.clone().fill_(number),
        lambda x, number: x.masked_fill(x > 0, number),
        lambda x, number: torch.where(x > 0, x, number),
        lambda x, number: torch.nn.functional.mse_loss(x[0], number),
        lambda x, number: torch._foreach_mul([x], number)[0],
        lambda x, number: x[number.long() - 1][None],
    ],
)
def test_a_number_in_a_tensor_of_the_host_goes_into_elementwise_operations(mix: Any) -> None:
    assert mix(torch.ones(3, device="cuda"), torch.tensor(2.0)).device == torch.device("cuda:0")


@pytest.mark.parametrize(
    "mix",
    [
        lambda x, number: x.index_select(0, number.long()),
        lambda x, number: x.gather(0, number.long()),
        lambda x, number: x.take(number.long()),
        lambda x, number: torch.nn.functional.cross_entropy(x, number.long()),
        lambda x, number: torch.bucketize(number, x),
        lambda x, number: torch.isin(number, x),
        lambda x, number: x.masked_select(number > 0),
        lambda x, number: number.add_(x[0]),
        lambda x, number: torch.add(x[0], x[1], out=number),
    ],
)
def test_a_number_in_a_tensor_of_the_host_goes_nowhere_else(mix: Any) -> None:
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device, but found at least two"):
        mix(torch.ones(3, device="cuda"), torch.tensor(0.0))


def test_a_result_that_is_a_host_argument_stays_on_the_host() -> None:
    number = torch.tensor(2.0)
    assert torch.add(torch.ones(2, device="cuda"), number).device.type == "cuda"
    assert number.item() == 2.0
    assert number.device.type == "cpu"


def test_generators_draw_by_their_own_state() -> None:
    generator = torch.Generator("cuda").manual_seed(5)
    host = torch.Generator().manual_seed(5)
    assert torch.equal(torch.randn(7, device="cuda", generator=generator).cpu(), torch.randn(7, generator=host))
    assert generator.device == torch.device("cuda:0")
    state = generator.get_state()
    first = torch.rand(3, device="cuda", generator=generator)
    generator.set_state(state)
    assert torch.equal(torch.rand(3, device="cuda", generator=generator), first)
    copied = generator.clone_state()
    assert torch.equal(
        torch.rand(3, device="cuda", generator=copied), torch.rand(3, device="cuda", generator=generator)
    )
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
        torch.randn(7, device="cuda", generator=host)
    with pytest.raises(RuntimeError, match="Expected a 'cpu' device type for generator but found 'cuda'"):
        torch.randn(7, generator=generator)


def test_each_device_has_a_default_generator_that_a_seed_sets() -> None:
    torch.manual_seed(1)
    first = [torch.rand(3, device=f"cuda:{i}") for i in range(2)]
    assert torch.equal(first[0].cpu(), first[1].cpu())
    states = torch.cuda.get_rng_state_all()
    more = torch.rand(3, device="cuda:1")
    assert torch.equal(torch.cuda.get_rng_state(0), states[0])
    torch.cuda.set_rng_state_all(states)
    assert torch.equal(torch.rand(3, device="cuda:1"), more)
    with torch.cuda.device(1):
        torch.cuda.manual_seed(9)
        assert torch.cuda.initial_seed() == 9
    torch.cuda.manual_seed_all(1)
    assert torch.equal(torch.rand(3, device="cuda"), first[0])
    with torch.random.fork_rng(devices=[0], device_type="cuda"):
        torch.rand(3, device="cuda")
    forked = torch.rand(3, device="cuda")
    torch.cuda.manual_seed_all(1)
    torch.rand(3, device="cuda")
    assert torch.equal(torch.rand(3, device="cuda"), forked)


def test_streams_are_entered_and_left() -> None:
    default = torch.cuda.current_stream()
    assert default == torch.cuda.default_stream()
    side = torch.cuda.Stream()
    assert side != default
    with torch.cuda.stream(side):
        assert torch.cuda.current_stream() == side
        x = torch.ones(3, device="cuda") + 1
        x.record_stream(side)
    with torch.cuda.stream(None):
        assert torch.cuda.current_stream() == default
    side.synchronize()
    default.wait_stream(side)
    assert side.query()
    other = torch.cuda.Stream(device=1)
    with torch.cuda.stream(other):
        assert torch.cuda.current_device() == 1
    assert torch.cuda.current_device() == 0
    assert isinstance(torch.cuda.current_stream(), torch.cuda.Stream)


def test_events_measure_time_if_they_were_asked_to() -> None:
    first, second = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    torch.ones(1000, device="cuda").sum()
    second.record()
    second.synchronize()
    assert second.query()
    assert 0 < first.elapsed_time(second) < 10_000
    untimed = torch.cuda.Event()
    untimed.record()
    with pytest.raises((ValueError, RuntimeError), match="enable_timing=True"):
        untimed.elapsed_time(second)
    torch.cuda.current_stream().wait_event(second)
    assert isinstance(second, torch.cuda.Event)


def test_pinned_memory_is_known_as_such() -> None:
    plain = torch.ones(10)
    pinned = plain.pin_memory()
    assert (plain.is_pinned(), pinned.is_pinned(), pinned[3:].is_pinned()) == (False, True, True)
    assert torch.empty(5, pin_memory=True).is_pinned()
    assert torch.equal(pinned.to("cuda", non_blocking=True).cpu(), plain)
    with pytest.raises(RuntimeError, match="Only dense CPU tensors can be pinned"):
        torch.empty(3, device="cuda", pin_memory=True)


def test_copies_and_files_keep_the_device(tmp_path: Path) -> None:
    model = nn.Linear(3, 2).to("cuda")
    twin = copy.deepcopy(model)
    assert twin.weight.device.type == "cuda"
    assert twin.weight.data_ptr() != model.weight.data_ptr()
    file = tmp_path / "state.pt"
    torch.save(model.state_dict(), file)
    for where, expected in ((None, "cuda:0"), ("cpu", "cpu"), ("cuda:1", "cuda:1")):
        loaded = torch.load(file, map_location=where, weights_only=True)
        assert loaded["weight"].device == torch.device(expected)
        assert torch.equal(loaded["weight"].cpu(), model.weight.detach().cpu())
    host = nn.Linear(3, 2)
    host.load_state_dict(model.state_dict())
    assert torch.equal(host.weight, model.weight.cpu())
    buffer = io.BytesIO()
    torch.save(torch.ones(3), buffer)
    buffer.seek(0)
    assert torch.load(buffer, map_location="cuda").device.type == "cuda"


def test_storages_share_and_copy() -> None:
    x = torch.arange(6.0, device="cuda")
    storage = x.untyped_storage()
    assert storage.device == torch.device("cuda:0")
    assert storage.nbytes() == 24
    assert x[2:].untyped_storage().data_ptr() == storage.data_ptr()
    assert storage.cpu().tolist() == torch.arange(6.0).untyped_storage().tolist()
    again = torch.empty(0, device="cuda").set_(storage, 2, (2,), (1,))
    again.fill_(9)
    assert x.tolist() == [0, 1, 9, 9, 4, 5]
    assert storage.clone().data_ptr() != storage.data_ptr()


def test_a_parameters_data_can_be_swapped_between_host_and_device() -> None:
    base = torch.cuda.memory_allocated()
    layer = nn.Linear(8, 4)
    host = layer.weight.data
    expected = layer(torch.ones(8))
    for _ in range(3):
        for parameter in layer.parameters():
            parameter.data = parameter.data.to("cuda")
        assert torch.cuda.memory_allocated() - base == 4 * (32 + 4)
        assert torch.equal(layer(torch.ones(8, device="cuda")).cpu(), expected)
        layer.weight.data = host
        layer.bias.data = layer.bias.data.cpu()
        assert torch.cuda.memory_allocated() == base
    assert torch.equal(layer(torch.ones(8)), expected)


def test_inference_mode_and_no_grad() -> None:
    with torch.inference_mode():
        x = torch.ones(3, device="cuda") * 2
        assert x.is_inference()
        assert x.view(1, 3).add_(1).sum().item() == 9
    w = torch.ones(3, device="cuda", requires_grad=True)
    with torch.no_grad():
        assert not (w * 2).requires_grad
        w.add_(1)
    (w * x.clone()).sum().backward()
    assert w.grad is not None
    assert w.grad.tolist() == [3, 3, 3]


def test_training_reaches_the_hosts_weights_to_the_bit() -> None:
    def train(device: str, optimizer: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Flatten(), nn.Linear(288, 4))
        images, target = torch.randn(4, 3, 8, 8), torch.randn(4, 4)
        model.to(device)
        steps = optimizer(model.parameters())
        for _ in range(3):
            steps.zero_grad()
            nn.functional.mse_loss(model(images.to(device)), target.to(device)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
            steps.step()
        return [p.detach().cpu() for p in model.parameters()]

    for optimizer in (
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=False),
        lambda p: torch.optim.AdamW(p, 0.01, foreach=False),
    ):
        host, device = train("cpu", optimizer), train("cuda", optimizer)
        assert [torch.equal(a, b) for a, b in zip(host, device, strict=True)] == [True] * len(host)


def test_checkpointing_and_hooks() -> None:
    layer = nn.Linear(4, 4).to("cuda")
    x = torch.ones(2, 4, device="cuda", requires_grad=True)
    seen: list[torch.device] = []
    layer.register_forward_hook(lambda module, args, out: seen.append(out.device))
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert seen == [torch.device("cuda:0")]  # the second run ends where nothing more is needed, before the hook
    assert x.grad is not None
    assert torch.equal(x.grad.cpu(), layer.weight.detach().cpu().sum(0).expand(2, 4))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_drops_the_same_elements_again(use_reentrant: bool) -> None:
    x = torch.ones(64, device="cuda", requires_grad=True)
    out = torch.utils.checkpoint.checkpoint(nn.Dropout(0.5), x, use_reentrant=use_reentrant)
    out.sum().backward()
    assert x.grad is not None
    assert 0 < int((out == 0).sum()) < 64
    assert torch.equal(x.grad, out)


def test_gradient_scaling_finds_overflow() -> None:
    w = torch.ones(3, device="cuda", requires_grad=True)
    optimizer = torch.optim.SGD([w], 0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    scaler.scale((w * torch.tensor([1.0, float("inf"), 1.0], device="cuda")).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert w.tolist() == [1, 1, 1]
    assert scaler.get_scale() == 2.0


def test_a_tensor_says_that_it_is_on_cuda() -> None:
    x = torch.ones(2).cuda()
    assert x.is_cuda
    assert x.get_device() == 0
    assert x.type() == "torch.cuda.FloatTensor"
    assert repr(x) == "tensor([1., 1.], device='cuda:0')"
    assert nn.Linear(1, 1).cuda().weight.is_cuda
    assert x.to(0).device == torch.ones(1, device=0).device == torch.device("cuda:0")
    assert torch.ones(1, device=1).device == torch.device("cuda:1")
    with torch.device("cuda"):
        assert torch.zeros(2).is_cuda
    assert torch.get_device_module("cuda") is torch.cuda


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_code_gives_the_eager_result(backend: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 4)).to("cuda")
    x = torch.randn(3, 16, device="cuda")
    eager = model(x)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    result = compiled(x)
    assert result.device == torch.device("cuda:0")
    torch.testing.assert_close(result, eager, rtol=0, atol=0 if backend != "inductor" else 1e-5)
    result.sum().backward()
    assert model[0].weight.grad is not None
    torch._dynamo.reset()
