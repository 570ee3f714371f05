"""DoRA: its equations in float64, its limits, PEFT as the reference, and what it costs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import safetensors.torch
import torch
from conftest import Lit, loader
from lightning.pytorch.callbacks import ModelCheckpoint
from test_checkpoints import Stateful
from test_contract import (
    KINDS,
    MODES,
    adapted,
    base,
    change,
    close,
    frozen,
    inject_into,
    run,
    same,
    set_adapted_weights,
)
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from lightning_lora import (
    AdapterEMA,
    DoRA,
    LoRA,
    LoRACallback,
    inject,
    load_adapter,
    merge_,
    offline,
    param_groups,
    save_adapter,
    sites,
    use,
)
from lightning_lora import adapter as adapter_module
from lightning_lora.adapter import Adapter
from lightning_lora.dropout import dropped
from lightning_lora.files import AdapterError, read_tensors
from lightning_lora.layout import Layout

NESTED_TENSORS_ARE_A_PROTOTYPE = "ignore:The PyTorch API of nested tensors:UserWarning"
pytestmark = pytest.mark.filterwarnings(NESTED_TENSORS_ARE_A_PROTOTYPE)
DORA = DoRA(r=2, alpha=3)
LINEAR = Layout()
every_kind = pytest.mark.parametrize("kind", KINDS)
every_mode = pytest.mark.parametrize("mode", MODES)
exactly_or_not = pytest.mark.parametrize("detach_norm", [True, False], ids=["detached", "exact"])


def adapters(model: nn.Module, task: str = "default") -> dict[str, Any]:
    return {site.name: site.adapter(task) for site in sites(model, task)}


def one(layout: Layout = LINEAR, shape: tuple[int, ...] = (6, 5), **options: Any) -> Any:
    """A changed adapter of its own, in float64."""
    method = DoRA(r=2, alpha=3, **options)
    adapter = method.build(shape, seed=1, device=torch.device("cpu"), dtype=torch.float64, layout=layout)
    values = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=values, dtype=torch.float64))
    return adapter


def weight_of(shape: tuple[int, ...] = (6, 5)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


LAYOUTS: dict[str, tuple[Layout, tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "matrix": (LINEAR, (6, 5), lambda w: w.norm(dim=1, keepdim=True)),
    "stack": (Layout(stacked=True), (3, 6, 5), lambda w: w.norm(dim=2, keepdim=True)),
    "looked up": (Layout(looked_up=True), (6, 5), lambda w: w.norm(dim=0, keepdim=True)),
    "kernel": (
        Layout(transposed=True, kernel=2),
        (6, 5),
        lambda w: w.reshape(-1, 2 * w.shape[1]).norm(dim=1).repeat_interleave(2)[:, None],
    ),
    "stack with kernel": (
        Layout(transposed=True, kernel=3, groups=2),
        (2, 6, 5),
        lambda w: w.reshape(2, -1, 3 * w.shape[2]).norm(dim=2).repeat_interleave(3, 1)[..., None],
    ),
}
every_layout = pytest.mark.parametrize(("layout", "shape", "norm"), LAYOUTS.values(), ids=LAYOUTS)


# ---- the equations


@every_layout
def test_the_norm_of_every_output_unit_is_the_size_of_its_magnitude(
    layout: Layout, shape: tuple[int, ...], norm: Callable[[Tensor], Tensor]
) -> None:
    adapter, weight = one(layout, shape), weight_of(shape)
    norms = layout.per_unit(norm(adapter.adapted(weight)))
    assert adapter.magnitude.numel() == norms.numel()
    torch.testing.assert_close(norms, adapter.magnitude.abs().flatten(), rtol=1e-14, atol=0)


@every_layout
def test_the_adapted_weight_is_magnitude_times_direction(
    layout: Layout, shape: tuple[int, ...], norm: Callable[[Tensor], Tensor]
) -> None:
    adapter, weight = one(layout, shape), weight_of(shape)
    v = weight + 1.5 * adapter.lora_B @ adapter.lora_A
    magnitude = (
        adapter.magnitude[..., None, :]
        if layout.looked_up
        else adapter.magnitude.repeat_interleave(layout.kernel, -1)[..., None]
    )
    torch.testing.assert_close(adapter.adapted(weight), magnitude * v / norm(v), rtol=1e-13, atol=1e-14)


@every_layout
def test_scaling_a_unit_of_v_changes_nothing(
    layout: Layout, shape: tuple[int, ...], norm: Callable[[Tensor], Tensor]
) -> None:
    adapter, weight = one(layout, shape), weight_of(shape)
    before = adapter.adapted(weight)
    factors = torch.rand(adapter.magnitude.shape, dtype=torch.float64) + 0.5
    by_row = factors[..., None, :] if layout.looked_up else factors.repeat_interleave(layout.kernel, -1)[..., None]
    with torch.no_grad():
        (adapter.lora_A if layout.looked_up else adapter.lora_B).mul_(by_row)
    torch.testing.assert_close(adapter.adapted(weight * by_row), before, rtol=1e-13, atol=1e-14)


@every_kind
@every_mode
def test_with_the_norms_themselves_as_magnitudes_it_is_lora_bit_for_bit(kind: str, mode: str) -> None:
    model, plain = adapted(kind, DORA, torch.float32), adapted(kind, LoRA(r=2, alpha=3), torch.float32)
    for name, adapter in adapters(model).items():
        twin = adapters(plain)[name]
        adapter.lora_A.data.copy_(twin.lora_A), adapter.lora_B.data.copy_(twin.lora_B)
    for site in sites(model):
        adapter = site.adapter("default")
        adapter.start_from(site.slot.layout.matrix(getattr(site.module, site.parameter).detach()))
    assert torch.equal(run(model, kind, mode, torch.float32), run(plain, kind, mode, torch.float32))


@every_layout
def test_magnitudes_start_as_the_norms_of_wherever_the_factors_start(
    layout: Layout, shape: tuple[int, ...], norm: Callable[[Tensor], Tensor]
) -> None:
    adapter, weight = one(layout, shape), weight_of(shape)  # B is not zero, as after PiSSA
    adapter.start_from(weight)
    v = weight + 1.5 * adapter.lora_B @ adapter.lora_A
    torch.testing.assert_close(adapter.magnitude.flatten(), layout.per_unit(norm(v)), rtol=1e-14, atol=0)
    assert torch.equal(adapter.gain(weight), torch.ones_like(adapter.gain(weight)))


def test_the_gradient_of_the_magnitudes_is_that_of_the_papers_equation_at_the_start() -> None:
    model = nn.Sequential(nn.Linear(5, 6)).double()
    inject(model, DORA)
    x, above = weight_of((7, 5)), weight_of((7, 6))
    model(x).backward(above)
    gradient, weight = above.T @ x, model[0].weight
    expected = (gradient * weight / weight.norm(dim=1, keepdim=True)).sum(1)
    torch.testing.assert_close(adapters(model)["0.weight"].magnitude.grad, expected, rtol=1e-13, atol=1e-13)


@every_layout
def test_gradients_with_and_without_a_constant_norm_differ_by_the_projection(
    layout: Layout, shape: tuple[int, ...], norm: Callable[[Tensor], Tensor]
) -> None:
    weight, above = weight_of(shape), torch.randn(shape, dtype=torch.float64)
    detached, exact = one(layout, shape), one(layout, shape, detach_norm=False)
    for adapter in (detached, exact):
        adapter.adapted(weight).backward(above)
    assert torch.equal(detached.magnitude.grad, exact.magnitude.grad)
    up, down = detached.factors()
    v = (weight + 1.5 * up @ down).detach()
    gain, direction = detached.gain(weight).detach(), v / norm(v)
    units = torch.zeros(v.shape, dtype=torch.float64) + norm(v)  # entries of one unit share its norm
    along = (above * direction).detach()
    shared = torch.stack([along[units == value].sum() for value in units.flatten()]).view(v.shape)
    for adapter, dv in ((detached, gain * above), (exact, gain * (above - shared * direction))):
        torch.testing.assert_close(adapter.lora_B.grad, 1.5 * dv @ down.mT, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(adapter.lora_A.grad, 1.5 * up.mT @ dv, rtol=1e-12, atol=1e-12)
    assert not close(detached.lora_B.grad, exact.lora_B.grad)


NOT_OF_WHAT_IT_COMPUTES = ("embedding with limited norm", "embedding with padding, scaled by frequency")  # by PyTorch


@exactly_or_not
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in NOT_OF_WHAT_IT_COMPUTES])
def test_the_layers_gradients_are_those_of_the_adapted_weight(kind: str, detach_norm: bool) -> None:
    """Of the dense formula, differentiated by autograd, with the norm held constant or not."""
    model, plain = adapted(kind, DoRA(r=2, alpha=3, detach_norm=detach_norm)), base(kind)
    change(model)
    weights, values = {}, {}
    for site in sites(model):
        adapter, layout, name = site.adapter("default"), site.slot.layout, site.name.partition("[")[0]
        ours = {key: p.detach().clone().requires_grad_() for key, p in adapter.named_parameters()}
        matrix = layout.matrix(plain.get_parameter(name).detach())
        v = matrix + adapter.scaling * ours["lora_B"] @ ours["lora_A"]
        norm = LAYOUTS["looked up"][2](v) if layout.looked_up else v.norm(dim=-1, keepdim=True)
        magnitude = ours["magnitude"]
        if layout.kernel > 1:
            norm = v.reshape(*v.shape[:-2], -1, layout.kernel * v.shape[-1]).norm(dim=-1, keepdim=True)
            norm = norm.repeat_interleave(layout.kernel, -2)
            magnitude = magnitude.repeat_interleave(layout.kernel, -1)
        magnitude = magnitude[..., None, :] if layout.looked_up else magnitude[..., None]
        whole = weights.get(name, plain.get_parameter(name).detach())
        weights[name] = layout.put(whole, magnitude * v / (norm.detach() if detach_norm else norm))
        values[site.name] = ours
    inputs = KINDS[kind].inputs()
    outputs = torch.func.functional_call(plain.train(), weights, (), inputs)
    padded = inputs.get("src_key_padding_mask")
    outputs = outputs if padded is None else outputs.masked_fill(padded[..., None], 0.0)
    outputs.square().sum().backward()
    run(model, kind, "training").square().sum().backward()
    for name, adapter in adapters(model).items():
        for key, parameter in adapter.named_parameters():
            torch.testing.assert_close(parameter.grad, values[name][key].grad, rtol=1e-9, atol=1e-10)


def test_it_trains_as_many_parameters_as_lora_and_one_for_each_output_unit() -> None:
    def trained(method: LoRA) -> int:
        model = nn.Sequential(nn.Linear(5, 6), nn.Conv2d(4, 7, 3), nn.Embedding(9, 3), nn.ConvTranspose1d(4, 8, 2))
        inject(model, method, ["0", "1", "2", "3"])
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    assert trained(DORA) == trained(LoRA(r=2)) + 6 + 7 + 3 + 8


# ---- the start


@every_kind
@every_mode
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32 adapters", "bf16 adapters"])
def test_a_bf16_model_starts_as_its_base_bit_for_bit(kind: str, mode: str, dtype: torch.dtype | None) -> None:
    half = torch.bfloat16
    model, plain = base(kind, half), frozen(kind, half) if mode == "inference" else base(kind, half)
    inject(model, DORA, KINDS[kind].targets, fused=KINDS[kind].fused, dtype=dtype)
    assert {adapter.magnitude.dtype for adapter in adapters(model).values()} == {torch.float32}
    assert torch.equal(run(model, kind, mode, half), run(plain, kind, mode, half))


@every_kind
def test_a_model_with_dropout_starts_as_its_base_bit_for_bit(kind: str) -> None:
    model, plain = base(kind, torch.float32), base(kind, torch.float32)
    inject_into(model, kind, DoRA(r=2, dropout=0.5))
    assert torch.equal(run(model, kind, "training", torch.float32), run(plain, kind, "training", torch.float32))


def test_the_norm_of_a_weight_depends_neither_on_how_it_lies_in_memory_nor_on_the_order_of_the_sum() -> None:
    """So the gain is still 1 when the model has moved, or was read from a file, after its magnitudes were set."""
    weight = torch.randn(300, 257)
    adapter = DORA.build((300, 257), seed=1, device=torch.device("cpu"), dtype=torch.float32)
    adapter.start(weight)
    strided = torch.randn(300, 600)
    strided[:, ::2][:, :257] = weight
    for same_weight in (weight.T.contiguous().T, strided[:, ::2][:, :257]):
        assert same_weight.stride() != weight.stride()
        assert torch.equal(adapter.gain(same_weight), torch.ones(300, 1))
    assert torch.equal(adapter.norm(weight[:, torch.randperm(257)]), adapter.norm(weight))


def test_drawing_the_factors_anew_starts_the_magnitudes_anew() -> None:
    model, x = nn.Sequential(nn.Linear(5, 6)).requires_grad_(False), torch.randn(3, 5)
    expected = model(x)
    inject(model, DORA)
    (adapter,) = adapters(model).values()
    change(model)
    assert not torch.equal(model(x), expected)
    adapter.reset_parameters()
    assert torch.equal(model(x), expected)
    torch.testing.assert_close(adapter.magnitude, model[0].weight.norm(dim=1))


# ---- dropout


DROPPING = ["linear", "linear without bias", "transformers' Conv1D", "convolution 2d with stride",
            "convolution 2d in groups, circular", "transposed convolution 2d in groups",
            "fused linear, two of its parts", "fused Conv1D, two of its parts"]  # fmt: skip


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Give every adapter that drops the same mask, which is in the list after the first call."""
    found: list[Tensor] = []

    def dropped(adapter: Adapter, x: Tensor) -> Tensor:
        if not adapter.drops():
            return x
        if not found:
            found.append(2 * (torch.rand(x.shape, dtype=x.dtype) < 0.5))
        return x * found[0]

    monkeypatch.setattr(Adapter, "dropped", dropped)
    return found


@pytest.mark.parametrize("kind", DROPPING)
def test_dropout_acts_on_the_input_of_all_that_is_not_the_base(kind: str, masks: list[Tensor]) -> None:
    """``y = W x + b + (W' - W) x'``, that is ``W x + b + (c - 1) W x' + c s B A x'`` with the dropped ``x'``."""
    model, plain, changed = adapted(kind, DoRA(r=2, alpha=3, dropout=0.5)), base(kind), base(kind)
    set_adapted_weights(changed, model)
    outputs = run(model, kind, "training")
    (x,) = KINDS[kind].inputs().values()
    assert 0 < (masks[0] == 0).sum() < x.numel()
    expected = plain.layer(x) + changed.layer(x * masks[0]) - plain.layer(x * masks[0])
    assert close(outputs, expected)
    assert not close(outputs, changed.layer(x))


@torch.no_grad()
def scale_weights(plain: nn.Module, model: nn.Module) -> None:
    """Give a plain copy of the base its weights times the gains of the adapters."""
    for site in sites(model):
        layout, weight = site.slot.layout, plain.get_parameter(site.name.partition("[")[0])
        matrix = layout.matrix(weight)
        weight.copy_(layout.put(weight, site.adapter("default").gain(matrix) * matrix))


@pytest.mark.parametrize("kind", DROPPING)
def test_dropout_on_the_branch_leaves_the_input_of_the_scaled_weight_whole(kind: str, masks: list[Tensor]) -> None:
    """``y = c W x + b + c s B A x'`` with the dropped ``x'``."""
    method = DoRA(r=2, alpha=3, dropout=0.5, dropout_on="branch")
    model, scaled, changed = adapted(kind, method), base(kind), base(kind)
    set_adapted_weights(changed, model)
    scale_weights(scaled, model)
    outputs = run(model, kind, "training")
    (x,) = KINDS[kind].inputs().values()
    assert close(outputs, scaled.layer(x) + changed.layer(x * masks[0]) - scaled.layer(x * masks[0]))
    assert close(run(model, kind, "inference"), changed.layer(x))


@pytest.mark.parametrize("dropout_on", ["change", "branch"])
def test_dropout_acts_alike_behind_another_adapter(dropout_on: Any, masks: list[Tensor]) -> None:
    model = nn.Sequential(nn.Linear(5, 6, dtype=torch.float64))
    inject(model, LoRA(r=1), ["0"], task="first")
    inject(model, DoRA(r=2, dropout=0.5, dropout_on=dropout_on), ["0"], task="second")
    change(model)
    use(model, "first", "second")
    x = torch.randn(3, 5, dtype=torch.float64)
    outputs, (site,) = model(x), sites(model)
    weight = site.adapter("first").adapted(model[0].weight)
    second = site.adapter("second")
    gain, branch = second.gain(weight), second.delta()
    on_gain = x if dropout_on == "branch" else x * masks[0]
    expected = x @ weight.T + on_gain @ ((gain - 1) * weight).T + (x * masks[0]) @ (gain * branch).T + model[0].bias
    assert close(outputs, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dropout_on_the_branch_multiplies_by_the_weight_once(dtype: torch.dtype) -> None:
    x = torch.randn(128, 40, dtype=dtype)  # enough rows for the fused form
    flops, outputs = {}, {}
    for dropout in (0.0, 0.5):
        model = nn.Sequential(nn.Linear(40, 48, dtype=dtype))
        inject(model, DoRA(r=2, dropout=dropout, dropout_on="branch"), ["0"])
        change(model)
        torch.manual_seed(0)
        with FlopCounterMode(display=False) as counted:
            outputs[dropout] = model(x)
        flops[dropout] = counted.get_total_flops()
    assert flops[0.0] == flops[0.5]
    torch.manual_seed(0)
    (adapter,), layer = adapters(model).values(), model[0]
    product = x @ layer.weight.T + dropped(x, 0.5)[0] @ adapter.delta().T
    torch.testing.assert_close(outputs[0.5], adapter.gain(layer.weight).T * product + layer.bias)


# ---- output units that have no direction


def with_zero_units(dtype: torch.dtype = torch.float32) -> nn.Module:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.conv, self.linear = nn.Embedding(7, 6), nn.Conv1d(6, 4, 3), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(torch.tanh(self.conv(self.embedding(x).mT)).mT)

    torch.manual_seed(0)
    model = Three().to(dtype)
    with torch.no_grad():
        model.embedding.weight[:, 2] = model.conv.weight[1] = model.linear.weight[[0, 3]] = 0
    return model


IDS = torch.tensor([[1, 2, 3, 4, 5]])


def test_peft_gives_nan_where_an_output_unit_is_zero() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, use_dora=True, target_modules=["linear"])
    assert peft.get_peft_model(with_zero_units(), config)(IDS).isnan().any()


@exactly_or_not
def test_units_that_are_zero_start_as_the_base_and_train_as_lora(detach_norm: bool) -> None:
    model = with_zero_units()
    inject(model, DoRA(r=2, detach_norm=detach_norm), ["embedding", "conv", "linear"])
    assert torch.equal(model(IDS), with_zero_units().requires_grad_(False)(IDS))
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        (model(IDS) - 1).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        optimizer.step()
    for name, units in (("embedding.weight", [2]), ("conv.weight", [1]), ("linear.weight", [0, 3])):
        adapter, layout = adapters(model)[name], Layout(looked_up=name.startswith("embedding"))
        assert adapter.magnitude[units].tolist() == [0.0] * len(units)
        assert adapter.magnitude.count_nonzero() == adapter.magnitude.numel() - len(units)
        weight = layout.matrix(model.get_parameter(name))
        gain = layout.per_unit(adapter.gain(weight))
        assert gain[units].tolist() == [1.0] * len(units)
        assert (gain != 1).sum() == gain.numel() - len(units)
        delta = adapter.delta()[:, units] if layout.looked_up else adapter.delta()[units]
        assert (delta != 0).any()
        rows = adapter.adapted(weight)[:, units] if layout.looked_up else adapter.adapted(weight)[units]
        assert torch.equal(rows, delta)


def test_units_that_are_zero_are_no_pefts_and_survive_our_own_file(tmp_path: Path) -> None:
    model, fresh = with_zero_units(), with_zero_units()
    inject(model, DORA, ["linear"])
    with torch.no_grad():
        adapters(model)["linear.weight"].lora_B.add_(1)
    save_adapter(model, tmp_path / "a")
    why = read_tensors(tmp_path / "a" / "adapter_model.safetensors")[1]["not_for_peft"]
    assert why == "PEFT divides by the norm of an output unit whose weights are all zero: linear.weight"
    load_adapter(fresh, tmp_path / "a")
    assert torch.equal(fresh(IDS), model(IDS))
    assert not torch.equal(fresh(IDS)[..., [0, 3]], with_zero_units()(IDS)[..., [0, 3]])


def test_a_unit_that_training_brings_to_zero_gives_zero_and_no_nan() -> None:
    adapter, weight = one(), weight_of()
    with torch.no_grad():
        adapter.lora_A.copy_(torch.eye(2, 5))
        weight[0, 2:] = 0
        adapter.lora_B[0] = -weight[0, :2] / 1.5
    adapter.adapted(weight).sum().backward()
    assert torch.equal(adapter.adapted(weight)[0], torch.zeros(5, dtype=torch.float64))
    assert all(parameter.grad.isfinite().all() for parameter in adapter.parameters())


# ---- rank 0


NOTHING = DoRA(r=0)


@every_kind
def test_rank_zero_trains_the_magnitudes_alone(kind: str, tmp_path: Path) -> None:
    model = base(kind, torch.float32)
    inject_into(model, kind, NOTHING)
    start = run(base(kind, torch.float32), kind, "training", torch.float32)
    assert torch.equal(run(model, kind, "training", torch.float32), start)
    change(model)
    run(model, kind, "training", torch.float32).square().sum().backward()
    gradients = {name for name, p in model.named_parameters() if p.grad is not None and (p.grad != 0).any()}
    assert gradients == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.endswith(".magnitude") for name in gradients)
    save_adapter(model, tmp_path / "a")
    described = read_tensors(tmp_path / "a" / "adapter_model.safetensors")[1]
    assert described["not_for_peft"].startswith("PEFT has no adapter of rank 0")
    fresh, plain = base(kind, torch.float32), base(kind, torch.float32)
    load_adapter(fresh, tmp_path / "a")
    set_adapted_weights(plain, model)
    for mode in MODES:
        outputs = run(model, kind, mode, torch.float32)
        assert torch.equal(run(fresh, kind, mode, torch.float32), outputs)
        assert torch.allclose(run(plain, kind, mode, torch.float32), outputs, rtol=1e-4, atol=1e-5)
    torch.save(base(kind, torch.float32).state_dict(), tmp_path / "base.pt")
    (written,) = offline.merge(tmp_path / "a", tmp_path / "base.pt", tmp_path / "out.pt")
    assert same(torch.load(written), merge_(model).state_dict())
    ((_, rows),) = offline.inspect(tmp_path / "a")
    assert {(row.r, row.norm, row.effective_rank) for row in rows} == {(0, 0.0, 0.0)}


def test_one_site_has_rank_zero_by_its_pattern(trainer: Any, tmp_path: Path) -> None:
    module = Lit()
    callback = LoRACallback(DORA, rank_pattern={"first": 0}, lr_ratio=4)
    trainer(callbacks=[callback]).fit(module, loader())
    first, second = adapters(module).values()
    assert [p.numel() for p in first.parameters() if p.requires_grad] == [8]
    assert (first.magnitude != module.net.first.weight.norm(dim=1)).all()
    assert second.lora_B.count_nonzero() > 0
    save_adapter(module, tmp_path / "a")
    fresh = Lit()
    load_adapter(fresh, tmp_path / "a")
    assert same(fresh.state_dict(), module.state_dict())


def test_only_dora_takes_rank_zero() -> None:
    with pytest.raises(ValueError, match="r=0: the rank must be a whole number of at least 1"):
        LoRA(r=0)
    with pytest.raises(ValueError, match="r=-1: the rank must be a whole number of at least 0"):
        DoRA(r=-1)


# ---- what it costs


class Saved:
    """The tensors that autograd keeps for the backward pass, but for parameters and the input."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.known = {p.data_ptr() for p in model.parameters()} | {x.data_ptr()}
        self.kept: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor):
            self.loss = model(x).sum()

    def pack(self, tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in self.known:
            self.kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor


@exactly_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_as_large_as_the_weight_is_kept_for_the_backward_pass(detach_norm: bool, dtype: torch.dtype) -> None:
    out, into, r, batch = 96, 64, 2, 3
    model = nn.Sequential(nn.Linear(into, out)).to(dtype)
    x = torch.randn(batch, into, dtype=dtype)
    inject(model, DoRA(r=r, detach_norm=detach_norm))
    kept = Saved(model, x).kept.values()
    assert max(kept) <= batch * out
    assert sum(kept) <= 2 * r * (into + out) + batch * (out + r) + 8 * out < into * out


@every_layout
def test_no_more_than_a_block_of_the_sum_exists_at_a_time(
    layout: Layout, shape: tuple[int, ...], norm: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            made = [t for t in (result if isinstance(result, tuple | list) else [result]) if isinstance(t, Tensor)]
            ours = [t for t in made if t.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()]
            self.numel = max([self.numel, *(t.numel() for t in ours)])
            return result

    shape = (*shape[:-2], 10 * shape[-2], 10 * shape[-1])
    adapter, weight = one(layout, shape), weight_of(shape)
    whole = adapter.norm(weight)
    assert close(whole.flatten(), layout.per_unit(norm(weight + 1.5 * adapter.lora_B @ adapter.lora_A)))
    monkeypatch.setattr(adapter_module, "BLOCK_ON_CPU", weight.numel() // 7)
    with torch.no_grad(), Largest() as largest:
        in_blocks = adapter.norm(weight)
    assert close(in_blocks, whole)
    assert largest.numel <= weight.numel() // 7


def test_the_norm_stays_exact_where_the_change_cancels_the_weight() -> None:
    """The expansion of the square into terms of A and B loses all its digits there; see docs/dora.md."""
    generator = torch.Generator().manual_seed(0)
    down, rows = (torch.randn(shape, generator=generator) for shape in ((16, 1024), (64, 16)))
    rest = torch.randn(64, 1024, generator=generator)
    for share, error in ((1, 1e-7), (1e-1, 2e-7), (1e-2, 2e-6), (1e-3, 2e-5), (1e-4, 2e-4)):
        weight = rows @ down
        weight += share * rest * weight.norm(dim=1, keepdim=True) / rest.norm(dim=1, keepdim=True)
        adapter: Any = DoRA(r=16, alpha=16).build((64, 1024), seed=1, device=torch.device("cpu"), dtype=torch.float32)
        with torch.no_grad():
            adapter.lora_A.copy_(down), adapter.lora_B.copy_(-rows)
        exact = (weight.double() - rows.double() @ down.double()).norm(dim=1)
        assert ((adapter.norm(weight) - exact).abs() / exact).max() < error


@exactly_or_not
def test_the_norm_is_not_rounded_under_autocast(detach_norm: bool) -> None:
    method, weight = DoRA(r=2, detach_norm=detach_norm), weight_of().float()
    adapter: Any = method.build((6, 5), seed=1, device=torch.device("cpu"), dtype=torch.float32)
    nn.init.normal_(adapter.lora_B)
    expected = adapter.gain(weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(adapter.gain(weight), expected)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("of_factors", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_weight", [torch.float32, torch.bfloat16], ids=str)
def test_the_norm_is_that_in_float64_whatever_is_in_half_precision(
    of_weight: torch.dtype, of_factors: torch.dtype, autocast: bool
) -> None:
    weight = weight_of().to(of_weight)
    adapter: Any = DoRA(r=2).build((6, 5), seed=1, device=torch.device("cpu"), dtype=of_factors)
    nn.init.normal_(adapter.lora_B)
    adapter.magnitude.data = adapter.magnitude.data.float()  # the norm comes in its dtype
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        norm = adapter.norm(weight)
    up, down = (factor.detach().double() for factor in adapter.factors())
    exact = (weight.double() + adapter.scaling * up @ down).norm(dim=1)
    assert ((norm - exact).abs() / exact).max() < 1e-6


def test_it_compiles_with_the_exact_gradient_too() -> None:
    kind = "linear"
    model = adapted(kind, DoRA(r=2, detach_norm=False))
    run(model, kind, "training").square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()
    run(torch.compile(model, fullgraph=True, backend="aot_eager"), kind, "training").square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or close(parameter.grad, gradients[name])


class Tied(nn.Module):
    """An embedding whose weight is the output layer's too; ``head_first`` is the order in which the two are found."""

    def __init__(self, head_first: bool) -> None:
        super().__init__()
        layers = {"embedding": nn.Embedding(7, 5), "head": nn.Linear(5, 7, bias=False)}
        for name in reversed(layers) if head_first else layers:
            self.add_module(name, layers[name])
        self.head.weight = self.embedding.weight

    def forward(self, index: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(index)))


@pytest.mark.parametrize("head_first", [False, True])
def test_tied_layers_compute_with_one_adapted_weight_though_only_one_of_them_has_its_units_as_outputs(
    head_first: bool,
) -> None:
    model, index = Tied(head_first).double(), torch.arange(7)
    inject(model, DoRA(r=2), ["embedding", "head"])
    change(model)
    expected = model(index)
    assert close(merge_(model)(index), expected)


def test_lora_after_dora_changes_what_dora_made() -> None:
    model, plain = adapted("linear", DORA), base("linear")
    inject(model, LoRA(r=1), task="second", seed=3)
    change(model)
    use(model, "default", "second")
    set_adapted_weights(plain, model, "default", "second")
    assert close(run(model, "linear", "training"), run(plain, "linear", "training"))


# ---- optimizers, averages, resuming


def test_loraplus_leaves_the_magnitudes_at_the_base_rate(trainer: Any) -> None:
    module = Lit(lambda m: AdamW(m.parameters(), lr=0.01, weight_decay=0.3))
    fitting = trainer(callbacks=[LoRACallback(DORA, lr_ratio=16, weight_decay={"magnitude": 0.0})])
    fitting.fit(module, loader())
    group_of = {id(p): group for group in fitting.optimizers[0].param_groups for p in group["params"]}
    for adapter in adapters(module).values():
        groups = {name: group_of[id(p)] for name, p in adapter.named_parameters()}
        assert {n: g["lr"] for n, g in groups.items()} == {"lora_A": 0.01, "lora_B": 0.16, "magnitude": 0.01}
        decays = {n: g["weight_decay"] for n, g in groups.items()}
        assert decays == {"lora_A": 0.3, "lora_B": 0.3, "magnitude": 0.0}
    rates = {group["name"]: group["lr"] for group in param_groups(module, 0.01, lr_ratio=16)}
    assert rates == {"lora_A": 0.01, "lora_B": 0.16, "magnitude": 0.01}


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("averaged", [False, True], ids=["plain", "averaged"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    precision: str, averaged: bool, trainer: Any, tmp_path: Path
) -> None:
    def fit(module: Lit, ckpt_path: Path | None = None) -> L.Trainer:
        saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=2)
        ours: list[L.Callback] = [LoRACallback(DoRA(r=2, dropout=0.0), lr_ratio=4), saver]
        ours += [AdapterEMA(decay=0.5)] if averaged else []
        fitting: L.Trainer = trainer(callbacks=ours, enable_checkpointing=True, precision=precision)
        fitting.fit(module, Stateful(), ckpt_path=ckpt_path)
        return fitting

    whole, rest = Lit(), Lit()
    first = fit(whole)
    second = fit(rest, tmp_path / "step=6.ckpt")
    assert rest.losses == whole.losses[6:]
    assert same(rest.state_dict(), whole.state_dict())
    moved = [a.magnitude for a in adapters(whole).values()]
    assert all((m != s.weight.float().norm(dim=1)).any() for m, s in zip(moved, sites(whole), strict=True))
    one, other = (f.optimizers[0].state_dict()["state"] for f in (first, second))
    assert all(torch.equal(one[i][k], other[i][k]) for i in one for k in ("exp_avg", "exp_avg_sq"))


# ---- PEFT


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.conv = nn.Conv2d(6, 4, (3, 1), stride=(2, 1), padding=(1, 0))
        self.linear, self.turned = nn.Linear(4, 5), Conv1D(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.conv(self.embedding(x).mT[..., None]).squeeze(-1))
        return self.turned(torch.tanh(self.linear(z.mT)))


CHOICES = {
    "each kind": ["embedding", "conv", "linear"],
    "linear": ["linear"],
    "Conv1D": ["turned"],
}
every_choice = pytest.mark.parametrize("targets", CHOICES.values(), ids=CHOICES)


def mixed() -> nn.Module:
    torch.manual_seed(0)
    return Mixed().double()


def changed_mixed(targets: list[str], method: LoRA = DORA) -> nn.Module:
    model = mixed()
    inject(model, method, targets, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, dtype=parameter.dtype))
    return model


def in_peft(folder: Path) -> Any:
    peft = pytest.importorskip("peft")
    loaded = peft.PeftModel.from_pretrained(mixed(), folder, is_trainable=True, autocast_adapter_dtype=False)
    return loaded.double()


def tensors(model: Any, folder: Path) -> dict[str, Tensor]:
    (save_adapter(model, folder) if isinstance(model, Mixed) else model.save_pretrained(folder))
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


@every_choice
@pytest.mark.parametrize("method", [DORA, DoRA(r=3, alpha=5, scaling="rsqrt")], ids=["linear scale", "rsqrt"])
def test_it_computes_and_trains_as_peft_does(targets: list[str], method: DoRA, tmp_path: Path) -> None:
    ours = changed_mixed(targets, method)
    before = tensors(ours, tmp_path / "start")
    theirs = in_peft(tmp_path / "start")
    assert torch.allclose(theirs(IDS), ours(IDS), rtol=0, atol=1e-12)
    assert not close(ours(IDS), mixed()(IDS))
    for model in (ours, theirs):
        optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            model(IDS).square().sum().backward()
            optimizer.step()
    one, other = tensors(ours, tmp_path / "ours"), tensors(theirs, tmp_path / "theirs")
    assert one.keys() == other.keys() == before.keys()
    assert all(one[name].shape == other[name].shape for name in one)
    assert all(torch.allclose(one[name], other[name], rtol=0, atol=1e-8) for name in one)
    assert all((one[name] - before[name]).abs().max() > 1e-3 for name in one)
    assert torch.allclose(theirs(IDS), ours(IDS), rtol=0, atol=1e-7)
    assert same_up_to(merge_(ours).state_dict(), theirs.merge_and_unload().state_dict())


def same_up_to(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[n], other[n], rtol=0, atol=1e-7) for n in one)


@every_choice
def test_what_peft_trained_is_loaded_merged_and_inspected(targets: list[str], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, lora_alpha=3, use_dora=True, target_modules=targets, fan_in_fan_out="turned" in targets
    )
    theirs = peft.get_peft_model(mixed(), config, autocast_adapter_dtype=False).double()
    started = {n: p.detach().clone() for n, p in theirs.named_parameters() if "magnitude" in n}
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, dtype=parameter.dtype))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, start = mixed(), mixed()
    load_adapter(ours, tmp_path / "theirs")
    assert torch.allclose(ours(IDS), theirs(IDS), rtol=0, atol=1e-12)
    inject(start, DORA, targets)
    values = sorted(p.numel() for p in started.values())
    assert values == sorted(a.magnitude.numel() for a in adapters(start).values())
    for name, adapter in adapters(start).items():
        (theirs_,) = (v for n, v in started.items() if f".{name.partition('.')[0]}." in n)
        assert torch.allclose(theirs_.flatten(), adapter.magnitude, rtol=0, atol=1e-12)
    assert {type(a.method) for a in adapters(ours).values()} == {DoRA}
    torch.save(mixed().state_dict(), tmp_path / "base.pt")
    (written,) = offline.merge(tmp_path / "theirs", tmp_path / "base.pt", tmp_path / "out.pt")
    assert same_up_to(torch.load(written), merge_(ours).state_dict())
    ((_, rows),) = offline.inspect(tmp_path / "theirs")
    assert all(row.r == 2 and row.norm > 0 for row in rows)


def test_the_tensors_have_pefts_names_and_shapes(tmp_path: Path) -> None:
    found = tensors(changed_mixed(CHOICES["each kind"]), tmp_path / "a")
    shapes = {name: tuple(t.shape) for name, t in found.items() if "magnitude" in name}
    assert shapes == {
        "base_model.model.embedding.lora_magnitude_vector": (6,),
        "base_model.model.conv.lora_magnitude_vector": (1, 4, 1, 1),
        "base_model.model.linear.lora_magnitude_vector": (5,),
    }
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["use_dora"]) == ("LORA", True)


def test_peft_folders_without_magnitudes_are_refused(tmp_path: Path) -> None:
    save_adapter(changed_mixed(["linear"], LoRA(r=2)), tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    stripped = tensors(changed_mixed(["linear"], LoRA(r=2)), tmp_path / "b")
    safetensors.torch.save_file(stripped, tmp_path / "a" / "adapter_model.safetensors", {"format": "pt"})
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    with pytest.raises(AdapterError, match=r"linear\.lora_magnitude_vector is missing"):
        load_adapter(mixed(), tmp_path / "a")


def test_where_peft_takes_no_dora_the_folder_is_our_own(tmp_path: Path) -> None:
    model, fresh = (nn.ModuleDict({"bag": nn.EmbeddingBag(4, 3)}) for _ in range(2))
    fresh.load_state_dict(model.state_dict())
    inject(model, DORA, ["bag.weight"])
    change(model)
    save_adapter(model, tmp_path / "a")
    why = read_tensors(tmp_path / "a" / "adapter_model.safetensors")[1]["not_for_peft"]
    assert why == "PEFT's target_parameters takes no DoRA: bag.weight"
    load_adapter(fresh, tmp_path / "a")
    assert same(fresh.state_dict(), model.state_dict())


def test_there_is_no_portable_form(tmp_path: Path) -> None:
    save_adapter(changed_mixed(["linear"]), tmp_path / "a")
    with pytest.raises(AdapterError, match="has no portable form: what DoRA adds depends on the base's weight"):
        offline.export(tmp_path / "a", tmp_path / "out")


# ---- what it can do


def test_magnitudes_of_a_diagonal_teacher_are_found_where_lora_of_that_rank_cannot(trainer: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, gains = torch.randn(12, 16, generator=generator), torch.rand(12, 1, generator=generator) * 2 + 0.5
    x = torch.randn(64, 16, generator=generator)
    target = x @ (gains * weight).T
    errors = {}
    for method in (DoRA(r=0), LoRA(r=1, alpha=1)):
        model = nn.Sequential(nn.Linear(16, 12, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(weight)
        inject(model, method)
        optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.0)
        for _ in range(300):
            optimizer.zero_grad()
            (model(x) - target).square().mean().backward()
            optimizer.step()
        missed = (merge_(model)[0].weight - gains * weight).norm() / ((gains - 1) * weight).norm()
        errors[type(method).__name__] = float(missed)
    values = torch.linalg.svdvals((gains - 1) * weight)
    floor = math.sqrt(float(values[1:].square().sum() / values.square().sum()))
    assert errors["DoRA"] < 1e-2
    assert errors["LoRA"] > 0.95 * floor > 0.5
