"""What only a GPU can show; where there is none all of it is skipped. ``python -m pytest tests/test_gpu.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from exact_resumes import Placed, same, train
from test_exact_resume import BOUNDARY, DATA, DROPOUT, EXACT, MIDDLE
from torch import Tensor, nn

from lightning_lora import LoRA, inject, known_methods, load_adapter, merged, save_adapter, using
from lightning_lora.functional import fused_linear, low_rank_step

DEVICE = "cuda"
METHODS = ["LoRA", "LoRAFA", "DoRA", "AdaLoRA", "VeRA"]
ROWS, WIDTH = 2048, 64  # enough for the fused form in every precision
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")


def base() -> nn.Module:
    """Return two linear layers, the same at every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))


def adapted(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the base with trained adapters, put in on the CPU and moved."""
    model = base().to(dtype)
    inject(model, known_methods()[name](r=4))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(DEVICE)


def batch(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(ROWS, WIDTH, device=DEVICE, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fused_step_is_as_near_to_the_exact_one_as_the_plain_step(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shapes = {"x": (ROWS, 96), "weight": (80, 96), "bias": (80,), "up": (80, 8), "down": (8, 96)}
    given = {name: torch.randn(shape, device=DEVICE, dtype=dtype) for name, shape in shapes.items()}

    def plain(x: Tensor, weight: Tensor, bias: Tensor, up: Tensor, down: Tensor, scaling: float) -> Tensor:
        return low_rank_step(F.linear(x, weight, bias), x, up, down, scaling)

    def found(form: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        own = {name: t.to(dtype).requires_grad_(name in ("x", "up", "down")) for name, t in given.items()}
        output = form(**own, scaling=0.7)
        return [output, *torch.autograd.grad(output.square().mean(), [own[n] for n in ("x", "up", "down")])]

    exact = found(plain, torch.float64)
    for one, other, right in zip(found(fused_linear, dtype), found(plain, dtype), exact, strict=True):
        assert (one - right).norm() <= 1.5 * (other - right).norm() + 1e-6 * right.norm()


@pytest.fixture
def syncs_forbidden() -> Iterator[Callable[[], None]]:
    """A function from whose call on nothing may wait for the device."""
    before = torch.cuda.get_sync_debug_mode()
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_waits_for_nothing(name: str, amp: bool, syncs_forbidden: Callable[[], None]) -> None:
    model, x = adapted(name), batch()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=amp):
        model(x).sum().backward()  # what is made at the first call only
        syncs_forbidden()
        model(x).sum().backward()


@pytest.mark.parametrize("name", METHODS)
def test_a_step_in_a_cuda_graph_is_the_eager_step(name: str) -> None:
    batches = [batch() for _ in range(6)]
    eager, captured = (adapted(name).train() for _ in range(2))
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (eager, captured)]
    given = batches[0].clone()

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        model(x).square().mean().backward()
        optimizer.step()

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for x in batches[:3]:
            given.copy_(x)
            step(captured, optimizers[1], given)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(captured, optimizers[1], given)
    for x in batches[3:]:
        given.copy_(x)
        graph.replay()
    for x in batches:
        step(eager, optimizers[0], x)
    torch.testing.assert_close(captured.state_dict(), eager.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_a_model_that_is_moved_after_injection_starts_as_the_base_bit_for_bit(name: str) -> None:
    model = base()
    inject(model, known_methods()[name](r=4))
    model, x = model.to(DEVICE), batch()
    with using(model):
        expected = model(x)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_merging_computes_the_same_and_gives_back_every_bit(name: str, dtype: torch.dtype) -> None:
    model, x = adapted(name, dtype).eval(), batch(dtype)
    before, expected = {n: t.clone() for n, t in model.state_dict().items()}, model(x)
    close = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    with merged(model):
        assert (model(x) - expected).norm() <= close * expected.norm()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_what_is_saved_there_loads_there_and_on_the_cpu(name: str, tmp_path: Path) -> None:
    model, x = adapted(name).eval(), batch()
    save_adapter(model, tmp_path / "adapter")
    there, here = base().to(DEVICE), base()
    for fresh in (there, here):
        load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(there.eval()(x), model(x))
    torch.testing.assert_close(here.eval()(x.cpu()), model(x).cpu(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's, in inductor
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_step_is_the_eager_step(mode: str) -> None:
    model, x = adapted("LoRA"), batch()
    model(x).square().mean().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for _ in range(3):
        model.zero_grad()
        compiled(x).square().mean().backward()
    for name, one in expected.items():
        assert (model.get_parameter(name).grad - one).norm() <= 1e-4 * one.norm(), name


@pytest.mark.parametrize("moment", [BOUNDARY, MIDDLE])
def test_a_resumed_run_is_the_uninterrupted_one(moment: str, tmp_path: Path) -> None:
    options = {"method": DROPOUT, "accelerator": "gpu"}
    whole = train(tmp_path, Placed(DATA, True), **options)
    assert same(train(tmp_path, Placed(DATA, True), moment, **options), whole) == EXACT


def test_frozen_weights_in_half_precision_change_no_bit() -> None:
    x, found = batch(), []
    for dtype in (None, torch.bfloat16):
        model = base()
        inject(model, LoRA(r=4), seed=0, frozen_dtype=dtype)
        model.to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            model(x).float().square().mean().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
