"""Adapters on packed weights: bitsandbytes' 4-bit and 8-bit layers, torchao's int8 weights. All run on the CPU.

The reference is float64 arithmetic on what the packed entries stand for, decoded here from the formats' definitions.
"""

from __future__ import annotations

import copy
import pickle
import runpy
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Lit, loader
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import BitsandbytesPrecision
from torch import Tensor, nn

from lightning_lora import (
    AdapterError,
    DoRA,
    LoRA,
    LoRACallback,
    Method,
    dequantize_,
    inject,
    load_adapter,
    load_from_checkpoint,
    merge_,
    merged,
    offline,
    quantized,
    remove,
    save_adapter,
    sites,
    using,
)
from lightning_lora.fingerprint import base_weights
from lightning_lora.gradient_stops import gradient_stops
from lightning_lora.quantized import (
    awaits_quantization,
    check_requantizable,
    dense_weight,
    is_quantized,
    keep_differentiable,
    requantize,
    set_parameter,
    unpack_,
)
from lightning_lora.report import totals

FOUR_BIT = ["nf4", "nf4, scales packed too", "fp4"]
FORMATS = [*FOUR_BIT, "int8 of bitsandbytes", "int8 of torchao"]
every_format = pytest.mark.parametrize("form", FORMATS)


def packed(layer: nn.Linear, form: str, **options: Any) -> Any:
    """Return the layer as a user quantizes it, frozen."""
    if form == "int8 of torchao":
        ao = pytest.importorskip("torchao.quantization")
        holder = nn.Sequential(layer)
        ao.quantize_(holder, ao.Int8WeightOnlyConfig(version=2))
        return holder[0].requires_grad_(False)
    moved = unmoved(layer, form, **options).to("cpu")  # bitsandbytes packs at the first move
    return moved.requires_grad_(False)


def unmoved(layer: nn.Linear, form: str, **options: Any) -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    sizes = (layer.in_features, layer.out_features, layer.bias is not None)
    if form == "int8 of bitsandbytes":
        new = bnb.nn.Linear8bitLt(*sizes, **({"has_fp16_weights": False} | options))
    else:
        twice = form.endswith("packed too")
        new = bnb.nn.Linear4bit(*sizes, quant_type=form[:3], compress_statistics=twice, **options)
    new.load_state_dict(layer.state_dict())
    return new


def decoded(layer: Any) -> Tensor:
    """Return the matrix (out, in) that a layer's packed weight stands for, in float64."""
    weight = layer.weight
    if hasattr(weight, "quant_state"):
        state = weight.quant_state
        scales = state.absmax.double()
        if state.nested:
            rough = state.state2.absmax.double().repeat_interleave(state.state2.blocksize)[: len(scales)]
            scales = state.state2.code.double()[state.absmax.long()] * rough + state.offset.double()
        data = weight.data.view(torch.uint8).reshape(-1).long()
        levels = state.code.double()[torch.stack([data >> 4, data & 15], 1)].reshape(-1, state.blocksize)
        return (levels * scales[:, None]).reshape(state.shape)
    if hasattr(weight, "has_fp16_weights"):
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        return weight.data.double() * scales.double()[:, None] / 127
    return weight.qdata.double() * weight.scale.double()


def bits(layer: Any) -> list[Tensor]:
    """Return copies of the tensors that a packed weight consists of."""
    weight = layer.weight
    if hasattr(weight, "quant_state"):
        state = weight.quant_state
        parts = [weight.data, state.absmax, *([state.state2.absmax, state.offset] if state.nested else [])]
    elif hasattr(weight, "has_fp16_weights"):
        parts = [weight.data, weight.SCB if weight.SCB is not None else layer.state.SCB]
    else:
        parts = [weight.qdata, weight.scale]
    return [part.detach().clone() for part in parts]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def distance(value: Tensor, reference: Tensor) -> float:
    """Return the relative distance of two tensors (Frobenius norm)."""
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()


# Packed weights -------------------------------------------------------------------------------------------------------


@every_format
def test_a_dense_weight_is_what_the_packed_one_stands_for(form):
    plain = nn.Linear(64, 32)
    layer = packed(copy.deepcopy(plain), form)
    dense = dense_weight(layer)
    assert is_quantized(layer.weight)
    assert dense.dtype == torch.float32
    assert distance(dense, decoded(layer)) < 1e-6
    assert 1e-4 < distance(dense, plain.weight) < 0.2


@every_format
def test_a_dense_weight_does_not_depend_on_forwards_and_copies(form):
    layer = packed(nn.Linear(64, 32), form)
    before = dense_weight(layer)
    layer(torch.randn(2, 64, requires_grad=True))
    others = [layer, copy.deepcopy(layer)]
    if form != "int8 of torchao":  # torchao leaves an attribute on the layer that cannot be pickled
        others.append(pickle.loads(pickle.dumps(layer)))
    for other in others:
        assert torch.equal(dense_weight(other), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [*FOUR_BIT, "int8 of torchao"])
def test_a_dense_weight_has_the_dtype_from_before_packing(form, dtype):
    layer = packed(nn.Linear(64, 32), "int8 of torchao") if form not in FOUR_BIT else None
    if layer is None:
        layer = unmoved(nn.Linear(64, 32), form).to(dtype).to("cpu")
    else:
        layer = packed(nn.Linear(64, 32, dtype=dtype), form)
    assert dense_weight(layer).dtype == dtype


def test_an_ordinary_weight_is_its_own_dense_weight():
    layer = nn.Linear(4, 3)
    assert dense_weight(layer) is layer.weight
    assert not is_quantized(layer.weight)
    assert not awaits_quantization(layer.weight)


@pytest.mark.parametrize("form", [*FOUR_BIT, "int8 of bitsandbytes"])
def test_a_layer_of_bitsandbytes_is_packed_when_it_is_moved(form):
    layer = unmoved(nn.Linear(64, 32), form)
    assert awaits_quantization(layer.weight)
    assert not is_quantized(layer.weight)
    assert dense_weight(layer) is layer.weight
    layer = layer.to("cpu")
    assert is_quantized(layer.weight)
    assert not awaits_quantization(layer.weight)


def test_eight_bit_layers_that_keep_their_weight_are_never_packed():
    layer = unmoved(nn.Linear(64, 32), "int8 of bitsandbytes", has_fp16_weights=True).to("cpu")
    assert not is_quantized(layer.weight)
    assert not awaits_quantization(layer.weight)
    assert dense_weight(layer) is layer.weight


def test_scales_of_the_input_belong_to_the_dense_weight():
    ao = pytest.importorskip("torchao.quantization")
    layer = packed(nn.Linear(64, 32), "int8 of torchao")
    weight, scale = layer.weight, torch.linspace(0.5, 2, 64)
    layer.weight = nn.Parameter(
        ao.Int8Tensor(weight.qdata, weight.scale, weight.block_size, weight.dtype, act_pre_scale=scale),
        requires_grad=False,
    )
    x = torch.randn(3, 64, requires_grad=True)
    assert distance(layer(x), x.double() @ dense_weight(layer).double().T + layer.bias.double()) < 1e-6
    layer(x).sum().backward()
    assert distance(x.grad, dense_weight(layer).sum(0).expand(3, 64)) < 1e-6
    with pytest.raises(
        ValueError, match=r"Int8Tensor in this configuration cannot be packed again .* dequantize_\(model"
    ):
        check_requantizable(layer.weight)


def test_the_four_bit_tensors_of_torchao_are_read_but_not_written():
    pytest.importorskip("torchao")
    nf4 = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    layer = nn.Linear(128, 64, bias=False)
    layer.weight = nn.Parameter(nf4.to_nf4(layer.weight.detach(), 64, 16), requires_grad=False)
    x = torch.randn(3, 128, requires_grad=True)
    assert distance(layer(x), x.double() @ dense_weight(layer).double().T) < 1e-6
    layer(x).sum().backward()
    assert distance(x.grad, dense_weight(layer).sum(0).expand(3, 128)) < 1e-6
    with pytest.raises(ValueError, match="NF4Tensor in this configuration cannot be packed again"):
        check_requantizable(layer.weight)


@every_format
def test_packing_again_keeps_the_format_and_measures_its_error(form):
    layer = packed(nn.Linear(64, 32), form)
    before = bits(layer)
    wanted = dense_weight(layer) + 0.02 * torch.randn(32, 64)
    parameter, error = requantize(layer, "weight", wanted)
    assert same(bits(layer), before)
    old = layer.weight
    set_parameter(layer, "weight", parameter)
    assert type(layer.weight) is type(old)
    assert [part.dtype for part in bits(layer)] == [part.dtype for part in before]
    assert [part.shape for part in bits(layer)] == [part.shape for part in before]
    assert error == pytest.approx(distance(decoded(layer), wanted), rel=1e-4)
    assert (0.05 < error < 0.2) if form in FOUR_BIT else (0.001 < error < 0.01)


@pytest.mark.parametrize("form", ["nf4", "fp4", "int8 of bitsandbytes"])
def test_packing_what_was_packed_changes_nothing(form):
    layer = packed(nn.Linear(64, 32), form)
    parameter, error = requantize(layer, "weight", dense_weight(layer))
    before = decoded(layer)
    set_parameter(layer, "weight", parameter)
    assert torch.equal(decoded(layer), before)
    assert error == 0


def test_packing_again_keeps_block_size_and_storage():
    bnb = pytest.importorskip("bitsandbytes")
    layer = unmoved(nn.Linear(128, 32), "nf4", quant_storage=torch.bfloat16)
    layer.weight = bnb.nn.Params4bit(
        layer.weight.data, blocksize=128, compress_statistics=False, quant_type="nf4", quant_storage=torch.bfloat16
    )
    layer = layer.to("cpu")
    parameter, _ = requantize(layer, "weight", dense_weight(layer))
    assert parameter.dtype == torch.bfloat16
    assert parameter.blocksize == parameter.quant_state.blocksize == 128


def test_torchao_weights_in_groups_are_packed_in_the_same_groups():
    ao = pytest.importorskip("torchao.quantization")
    if not hasattr(ao.Int8WeightOnlyConfig(version=2), "granularity"):
        pytest.skip("this torchao has no groups")
    for granularity, scales in ((ao.PerGroup(32), (32, 2)), (ao.PerTensor(), (1, 1))):
        holder = nn.Sequential(nn.Linear(64, 32))
        ao.quantize_(holder, ao.Int8WeightOnlyConfig(version=2, granularity=granularity))
        parameter, error = requantize(holder[0], "weight", dense_weight(holder[0]))
        assert tuple(parameter.scale.shape) == scales
        assert error < 0.01


def test_a_weight_of_zeros_is_packed_without_error():
    layer = packed(nn.Linear(64, 32), "nf4")
    _, error = requantize(layer, "weight", torch.zeros(32, 64))
    assert error == 0


@every_format
def test_a_layer_computes_with_the_parameter_that_it_was_given_and_then_with_its_own_again(form):
    layer = packed(nn.Linear(64, 32), form)
    x = torch.randn(3, 64)
    before, own, stored = layer(x), layer.weight, bits(layer)
    parameter, _ = requantize(layer, "weight", dense_weight(layer) + 0.1)
    set_parameter(layer, "weight", parameter)
    assert distance(layer(x), x.double() @ decoded(layer).T + layer.bias.double()) < 1e-6
    if form in FOUR_BIT:
        assert layer.quant_state is parameter.quant_state  # where bitsandbytes looks if a wrapper drops the other
    set_parameter(layer, "weight", own)
    assert layer.weight is own
    assert torch.equal(layer(x), before)
    assert same(bits(layer), stored)


def test_eight_bit_layers_that_keep_their_weight_pack_the_new_one():
    layer = unmoved(nn.Linear(64, 32), "int8 of bitsandbytes", has_fp16_weights=True).to("cpu").requires_grad_(False)
    layer.eval()
    x = torch.randn(3, 64)
    layer(x)
    parameter, error = requantize(layer, "weight", layer.weight.detach() * 2)
    set_parameter(layer, "weight", parameter)
    assert error == 0
    assert distance(layer(x), x.double() @ layer.weight.double().T + layer.bias.double()) < 0.02


@every_format
def test_an_unpacked_layer_is_one_of_pytorchs_own(form):
    layer = packed(nn.Linear(64, 32), form)
    calls: list[Any] = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    wanted = decoded(layer)
    unpack_(layer, torch.bfloat16)
    assert type(layer) is nn.Linear
    assert type(layer.weight) is nn.Parameter
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.weight, wanted.float().bfloat16())
    assert set(layer.__dict__) == set(nn.Linear(1, 1).__dict__)
    assert set(layer.state_dict()) == {"weight", "bias"}
    layer.load_state_dict(nn.Linear(64, 32).state_dict())
    layer.to("cpu")(torch.randn(2, 64, dtype=torch.bfloat16))
    assert calls


# A kernel for inference, on CPUs with AVX512-BF16 ---------------------------------------------------------------------


def has_kernel() -> bool:
    return bool(getattr(pytest.importorskip("bitsandbytes").functional, "has_avx512bf16", bool)())


@pytest.mark.parametrize("form", FOUR_BIT)
def test_four_bit_layers_give_gradients_after_an_evaluation(form):
    layer = packed(nn.Linear(128, 64), form)
    keep_differentiable(layer)
    stored = bits(layer)
    layer.eval()
    with torch.no_grad():
        layer(torch.randn(3, 128))
    layer.train()
    x = torch.randn(3, 128, requires_grad=True)
    layer(x).sum().backward()
    assert distance(x.grad, decoded(layer).sum(0).expand(3, 128)) < 1e-6
    assert same(bits(layer), stored)


@pytest.mark.parametrize("form", FOUR_BIT)
def test_four_bit_layers_that_were_evaluated_before_give_gradients_too(form):
    layer = packed(nn.Linear(128, 64), form)
    before = decoded(layer)
    layer.eval()
    with torch.no_grad():
        output = layer(x := torch.randn(3, 128))
    after = dense_weight(layer)
    assert distance(after, before) < 0.005  # the kernel rounds scales to bf16
    assert distance(output, x @ after.T + layer.bias) < 0.01
    keep_differentiable(layer)
    assert torch.equal(dense_weight(layer), after)
    assert torch.equal(decoded(layer).float(), after)
    x = torch.randn(3, 128, requires_grad=True)
    layer(x).sum().backward()
    assert distance(x.grad, after.sum(0).expand(3, 128)) < 1e-6


def test_the_kernel_is_allowed_again_when_the_last_adapter_is_removed():
    if not has_kernel():
        pytest.skip("this CPU, or this bitsandbytes, has no such kernel")
    net = Net("nf4")
    flags = [layer.support_avx512bf16_for_cpu for layer in (net.first, net.second)]
    for task in ("one", "two"):
        inject(net, LoRA(r=2), ["first"], task=task)
    assert not any(layer.support_avx512bf16_for_cpu for layer in (net.first, net.second))
    remove(net, "one")
    assert not any(layer.support_avx512bf16_for_cpu for layer in (net.first, net.second))
    remove(net)
    assert [layer.support_avx512bf16_for_cpu for layer in (net.first, net.second)] == flags


# Packages -------------------------------------------------------------------------------------------------------------


def test_neither_package_is_imported_where_nothing_is_packed(monkeypatch, tmp_path):
    for name in [*sys.modules, "bitsandbytes", "torchao"]:
        if name.partition(".")[0] in ("bitsandbytes", "torchao"):
            monkeypatch.setitem(sys.modules, name, None)  # an import of it raises from now on
    runpy.run_path(str(quantized.__file__))
    net = nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 1, 4, batch_first=True))
    inject(net, LoRA(r=2))
    net.eval()(torch.randn(2, 3, 4))
    save_adapter(net, tmp_path / "a")
    with merged(net):
        dequantize_(nn.Linear(4, 4), torch.bfloat16)
    remove(net)
    load_adapter(net, tmp_path / "a")
    merge_(net)


# Adapters on packed weights -------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A trained layer below two packed ones, one of which has no bias, and an ordinary one above."""

    def __init__(self, form: str | None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.below = nn.Linear(8, 64)
        self.first = nn.Linear(64, 128)
        self.second = nn.Linear(128, 64, bias=False)
        self.head = nn.Linear(64, 3)
        if form is not None:
            self.first, self.second = packed(self.first, form), packed(self.second, form)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(torch.tanh(self.below(x)))))))


TARGETS = ["first", "second"]


def adapt(net: nn.Module, method: Method = LoRA(r=4)) -> nn.Module:  # noqa: B008
    """Adapt the packed layers, with a B that is not zero, and train the layer below them in full."""
    torch.manual_seed(2)
    for site in inject(net, method, TARGETS, modules_to_save=["below"], seed=0):
        nn.init.normal_(site.adapter("default").lora_B, std=0.05)
    return net


def twin(net: Any) -> Net:
    """Return the same net over ordinary layers that hold what the packed weights stand for, in float64."""
    other = Net(None)
    for name in TARGETS:
        getattr(other, name).weight.data = decoded(getattr(net, name)).float()
    other = adapt(other, sites(net)[0].adapter("default").method)
    ours = {name: value for name, value in net.state_dict().items() if "adapters" in name}
    other.load_state_dict(ours, strict=False)
    return other.double()


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@contextmanager
def rounding() -> Iterator[list[warnings.WarningMessage]]:
    """Collect the warnings of a merge."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


@every_format
def test_outputs_and_all_gradients_are_those_of_the_dense_model(form):
    net = adapt(Net(form))
    net.eval()
    with torch.no_grad():
        net(torch.randn(2, 8))  # a validation pass comes first in most runs
    net.train()
    x = torch.randn(5, 8)
    reference = twin(net)
    for model, dtype in ((net, torch.float32), (reference, torch.float64)):
        output = model(x.to(dtype))
        output.square().sum().backward()
    assert distance(net(x), reference(x.double())) < 1e-6
    expected = gradients(reference)
    assert set(gradients(net)) == set(expected)
    assert {"below.weight", "first.adapters.weight.default.lora_A"} < set(expected)
    for name, gradient in gradients(net).items():
        assert distance(gradient, expected[name]) < 1e-5, name


@every_format
def test_autocast_to_bf16_computes_the_same_up_to_its_precision(form):
    net = adapt(Net(form))
    x = torch.randn(5, 8)
    reference = twin(net)
    with torch.autocast("cpu", torch.bfloat16):
        output = net(x)
    output.float().square().sum().backward()
    reference(x.double()).square().sum().backward()
    assert output.dtype == torch.bfloat16
    assert distance(output, reference(x.double())) < 0.02
    for name, gradient in gradients(net).items():
        assert distance(gradient, gradients(reference)[name]) < 0.05, name


@every_format
def test_eval_mode_computes_the_same_up_to_the_packages_own_rounding(form):
    net = adapt(Net(form)).eval()
    x = torch.randn(5, 8)
    with torch.no_grad():
        assert distance(net(x), twin(net)(x.double())) < (0.03 if form == "int8 of bitsandbytes" else 1e-6)


@every_format
def test_adapters_are_fp32_and_the_base_keeps_its_names(form):
    net = Net(form)
    before, classes = set(net.state_dict()), [type(module) for module in net.modules()]
    adapt(net)
    assert {p.dtype for site in sites(net) for p in site.slot.parameters()} == {torch.float32}
    assert {name for name in net.state_dict() if "adapters" not in name} == before
    assert sites(net)[0].adapter("default").lora_A.shape == (4, 64)
    remove(net)
    assert [type(module) for module in net.modules()] == classes
    assert set(net.state_dict()) == before


def test_adapters_are_fp32_over_weights_that_are_stored_as_bf16():
    net = nn.Sequential(packed(nn.Linear(64, 32), "nf4", quant_storage=torch.bfloat16))
    assert net[0].weight.dtype == torch.bfloat16
    inject(net, LoRA(r=2))
    assert {p.dtype for site in sites(net) for p in site.slot.parameters()} == {torch.float32}
    assert sites(net)[0].adapter("default").lora_B.shape == (32, 2)


@every_format
def test_parameters_are_counted_as_if_none_were_packed(form):
    assert totals(adapt(Net(form))) == totals(adapt(Net(None)))


@every_format
def test_all_linear_means_packed_layers_too(form):
    assert [site.name for site in inject(Net(form), LoRA(r=2))] == [
        f"{name}.weight" for name in ("below", "first", "second", "head")
    ]


@every_format
def test_copies_and_moves_compute_the_same(form):
    net = adapt(Net(form))
    x = torch.randn(5, 8)
    others = [copy.deepcopy(net), copy.deepcopy(net).to("cpu")]
    if form != "int8 of torchao":  # as above
        others.append(pickle.loads(pickle.dumps(net)))
    for other in others:
        assert torch.equal(other(x), net(x))
        other(x).sum().backward()
        assert set(gradients(other)) == set(gradients(others[0]))
    half = copy.deepcopy(net).to(torch.bfloat16)
    assert {p.dtype for site in sites(half) for p in site.slot.parameters()} == {torch.float32}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # what torch.compile itself does
@pytest.mark.parametrize("form", ["nf4", "int8 of bitsandbytes", "int8 of torchao"])
def test_compiles_into_one_graph_that_computes_the_same(form):
    torch._dynamo.reset()
    net = adapt(Net(form))
    x = torch.randn(5, 8)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    found, expected = [], []
    for model, kept in ((compiled, found), (net, expected)):
        net.zero_grad()
        output = model(x)
        output.sum().backward()
        kept += [output.detach(), *gradients(net).values()]
    assert len(found) == len(expected) == 7
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layer", ["Embedding4bit", "Embedding8bit"])
def test_packed_embeddings_are_refused(layer):
    bnb = pytest.importorskip("bitsandbytes")
    net = nn.Sequential(getattr(bnb.nn, layer)(64, 64).to("cpu"))
    with pytest.raises(
        ValueError, match=rf"0.weight: .* only linear ones .* not a {layer}: .* exclude_modules=\['0'\]"
    ):
        inject(net, LoRA(r=2), ["0"])
    assert not sites(net)


@every_format
def test_dora_starts_as_the_packed_base_and_then_computes_as_on_the_dense_one(form):
    x, plain, net = torch.randn(5, 8), Net(form), Net(form)
    inject(net, DoRA(r=4), TARGETS, seed=0)
    for mode in (False, True, False):
        assert torch.equal(net.train(mode)(x), plain.train(mode)(x))
    net = adapt(Net(form), DoRA(r=4, dropout=0.1)).train(False)
    with torch.no_grad():
        for site in sites(net):
            site.adapter("default").magnitude.mul_(torch.rand(site.adapter("default").magnitude.shape) + 0.5)
    reference = twin(net).eval()
    tolerance = 0.03 if form == "int8 of bitsandbytes" else 1e-5
    for model, dtype in ((net, torch.float32), (reference, torch.float64)):
        model(x.to(dtype)).square().sum().backward()
    assert distance(net(x), reference(x.double())) < tolerance
    for name, gradient in gradients(net).items():
        assert distance(gradient, gradients(reference)[name]) < 3 * tolerance, name
    dropping = [net.train()(x) for _ in range(2)]
    assert not torch.equal(*dropping)


# Merging --------------------------------------------------------------------------------------------------------------


@every_format
def test_merging_packs_again_and_says_what_that_costs(form):
    net = adapt(Net(form))
    wanted = merge_(twin(net)).state_dict()
    base = {name: decoded(getattr(net, name)) for name in TARGETS}
    formats = {name: [(part.dtype, part.shape) for part in bits(getattr(net, name))] for name in TARGETS}
    plain = [type(module) for module in Net(form).modules()]
    with rounding() as caught:
        assert merge_(net) is net
    assert [type(module) for module in net.modules()] == plain
    errors, changes = {}, {}
    for name in TARGETS:
        layer, weight = getattr(net, name), wanted[f"{name}.weight"]
        assert [(part.dtype, part.shape) for part in bits(layer)] == formats[name]
        errors[name] = distance(decoded(layer), weight)
        changes[name] = ((weight - base[name]).norm() / weight.norm()).item()
    worst = max(TARGETS, key=lambda name: errors[name] / changes[name])
    assert [str(one.message) for one in caught] == [
        "2 quantized weights were rounded again with the adapters in them. The worst, "
        f"{worst}.weight, is {errors[worst]:.2%} off its adapted value, which the adapters had changed by "
        f"{changes[worst]:.2%}: to merge without this loss call dequantize_(model, dtype) first"
    ]
    assert (0.05 < errors[worst] < 0.2) if form in FOUR_BIT else (0.001 < errors[worst] < 0.01)


def test_eight_bit_layers_that_keep_their_weight_merge_without_loss():
    layer = unmoved(nn.Linear(64, 32), "int8 of bitsandbytes", has_fp16_weights=True).to("cpu")
    net = nn.Sequential(layer)
    adapter = inject(net, LoRA(r=4))[0].adapter("default")
    nn.init.normal_(adapter.lora_B, std=0.05)
    x = torch.randn(3, 64)
    net.eval()(x)  # packs a copy, which the merged weight must not leave in use
    wanted = adapter.adapted(layer.weight.detach())
    merge_(net)  # without a warning
    assert torch.equal(layer.weight, wanted)
    assert distance(net(x), x @ wanted.T + layer.bias) < 0.02


def test_only_the_first_process_says_what_merging_costs(monkeypatch):
    net = adapt(Net("nf4"))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    merge_(net)


@every_format
def test_a_merged_layer_computes_with_its_new_weight(form):
    net = adapt(Net(form))
    x = torch.randn(5, 8)
    net(x)
    with rounding():
        merge_(net)
    reference = Net(None).double()
    for name in TARGETS:
        getattr(reference, name).weight.data = decoded(getattr(net, name))
    assert distance(net(x), reference(x.double())) < 1e-6


@every_format
def test_merged_computes_what_merge_does_and_restores_every_bit(form):
    net = adapt(Net(form))  # in train mode, as layers of bitsandbytes are exact there
    x = torch.randn(5, 8)
    with torch.no_grad():
        before = net(x)
        stored = [part for name in TARGETS for part in bits(getattr(net, name))]
        parameters = [getattr(net, name).weight for name in TARGETS]
        with rounding() as caught, merged(net):
            inside = net(x)
        assert "2 quantized weights were rounded again" in str(caught[0].message)
        assert torch.equal(net(x), before)
        assert same([part for name in TARGETS for part in bits(getattr(net, name))], stored)
        assert all(getattr(net, name).weight is own for name, own in zip(TARGETS, parameters, strict=True))
        with rounding():
            merge_(net)
        assert torch.equal(net(x), inside)
        assert distance(inside, before) > 1e-4


@every_format
def test_merged_restores_every_bit_after_an_exception(form):
    net = adapt(Net(form))
    stored = [part for name in TARGETS for part in bits(getattr(net, name))]
    with rounding(), pytest.raises(RuntimeError), merged(net):
        net.eval()(torch.randn(5, 7))
    assert same([part for name in TARGETS for part in bits(getattr(net, name))], stored)


@every_format
def test_weights_that_no_adapter_changed_are_not_packed_again(form):
    untrained, unused = Net(form), adapt(Net(form))
    inject(untrained, LoRA(r=4), TARGETS)
    stored = bits(untrained.first)
    merge_(untrained)  # without a warning
    with using(unused):
        merge_(unused)
    assert same(bits(untrained.first), stored)
    assert same(bits(unused.first), stored)


def test_merging_is_refused_for_formats_that_cannot_be_written_and_leaves_all_as_it_was():
    ao = pytest.importorskip("torchao.quantization")
    net = Net(None)
    ao.quantize_(net.second, ao.Int8DynamicActivationInt8WeightConfig(version=2))
    with pytest.warns(UserWarning, match=r"1 quantized layers \(first: second\) give no gradient to their input"):
        adapt(net)
    assert "second is a linear layer that quantizes its input by torchao" in gradient_stops(net)
    x = torch.randn(5, 8)
    before = net(x)
    for merge in (merge_, lambda net: merged(net).__enter__()):
        with pytest.raises(ValueError, match=r"cannot merge into second.weight: torchao's Int8Tensor in this config"):
            merge(net)
    assert torch.equal(net(x), before)
    assert len(sites(net)) == 2


@every_format
def test_a_dequantized_model_has_plain_layers_and_merges_without_loss(form):
    net = adapt(Net(form))
    x = torch.randn(5, 8)
    reference = twin(net)
    assert dequantize_(net, torch.float32) is net
    assert distance(net(x), reference(x.double())) < 1e-6
    assert [site.name for site in sites(net)] == ["first.weight", "second.weight"]
    net(x).sum().backward()
    assert "second.adapters.weight.default.lora_B" in gradients(net)
    merge_(net)  # without a warning
    assert {type(module) for module in net.modules()} == {Net, nn.Linear}
    assert distance(net(x), reference(x.double())) < 1e-6
    assert distance(net.first.weight, merge_(reference).first.weight) < 1e-6


def test_a_model_without_adapters_is_dequantized_too():
    net = Net("nf4")
    wanted = decoded(net.second).float()
    dequantize_(net, torch.float32)
    assert torch.equal(net.second.weight, wanted)
    assert type(net.second) is nn.Linear


def test_a_merged_model_is_not_dequantized():
    net = adapt(Net("nf4"))
    with rounding(), merged(net), pytest.raises(RuntimeError, match="cannot dequantize while the adapters are merged"):
        dequantize_(net, torch.float32)


# Files ----------------------------------------------------------------------------------------------------------------


@every_format
def test_a_folder_loads_on_the_same_quantized_base_and_on_no_other(form, tmp_path):
    net = adapt(Net(form))
    save_adapter(net, tmp_path / "a")
    x = torch.randn(5, 8)
    fresh = Net(form)
    load_adapter(fresh, tmp_path / "a")
    assert torch.equal(fresh(x), net(x))
    with pytest.raises(AdapterError, match="trained on another base: 2 of 2 adapted weights differ"):
        load_adapter(Net(None), tmp_path / "a")
    load_adapter(Net(None), tmp_path / "a", allow_base_mismatch=True)


@every_format
def test_the_fingerprint_of_a_base_does_not_depend_on_what_was_done_with_it(form):
    net = adapt(Net(form))
    before = base_weights(sites(net))
    net.train()(torch.randn(2, 8)).sum().backward()
    with torch.no_grad():
        net.eval()(torch.randn(2, 8))
    assert base_weights(sites(net)) == before
    assert base_weights(sites(copy.deepcopy(net))) == before
    evaluated = Net(form).eval()
    with torch.no_grad():
        evaluated(torch.randn(2, 8))
    assert base_weights(sites(adapt(evaluated))) == before


@every_format
def test_the_fingerprint_of_a_base_depends_on_its_values(form):
    net = Net(form)
    before = base_weights(sites(adapt(Net(form))))
    parameter, _ = requantize(net.first, "weight", 0.9 * dense_weight(net.first).flip(0))
    set_parameter(net.first, "weight", parameter)
    after = base_weights(sites(adapt(net)))
    assert [name for name in before if before[name] != after[name]] == ["first.weight"]


def test_a_base_that_is_yet_to_be_packed_has_no_base_weights(tmp_path):
    net = adapt(Net("nf4"))
    save_adapter(net, tmp_path / "a")
    other = Net(None)
    other.first, other.second = unmoved(other.first, "nf4"), unmoved(other.second, "nf4")
    found = load_adapter(other, tmp_path / "a")
    assert {base.digest for base in base_weights(found).values()} == {None}
    other = other.to("cpu")
    x = torch.randn(5, 8)
    assert torch.equal(other(x), net(x))
    assert base_weights(found) == base_weights(sites(net))


@every_format
def test_weight_files_that_are_packed_are_not_merged_into(form, tmp_path):
    save_adapter(adapt(Net(form)), tmp_path / "a")
    torch.save(Net(form).state_dict(), tmp_path / "base.pt")
    with pytest.raises(AdapterError, match=r"first.weight is packed \(.*merge_\(dequantize_\(model, dtype\)\)"):
        offline.merge(tmp_path / "a", tmp_path / "base.pt", tmp_path / "merged.pt")
    assert not (tmp_path / "merged.pt").exists()


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without:UserWarning")  # PEFT cannot merge there
@pytest.mark.parametrize("form", ["nf4", "int8 of bitsandbytes", "int8 of torchao"])
def test_peft_loads_the_folder_on_the_same_quantized_base(form, tmp_path):
    peft = pytest.importorskip("peft")
    net = adapt(Net(form))
    save_adapter(net, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(Net(form), tmp_path / "a")
    x = torch.randn(5, 8)
    assert distance(theirs.train()(x), net(x)) < 1e-6


# Layers whose weights are read ----------------------------------------------------------------------------------------


def encoder_layer(form: str | None) -> Any:
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(64, 2, 128, dropout=0.0, batch_first=True)
    if form is not None:
        layer.linear1, layer.linear2 = packed(layer.linear1, form), packed(layer.linear2, form)
    return layer


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("targets", [["linear1"], ["self_attn", "linear1", "linear2"]])
@every_format
def test_encoders_compute_in_eval_mode_what_they_do_in_training(form, targets):
    first, reference = encoder_layer(form), encoder_layer(None)
    for name in ("linear1", "linear2"):
        getattr(reference, name).weight.data = decoded(getattr(first, name)).float()
    x, padded = torch.randn(2, 5, 64), torch.tensor([[False] * 5, [False, False, False, True, True]])
    outputs = []
    for layer in (first, reference):
        net = nn.TransformerEncoder(layer, 1)
        for site in inject(net, LoRA(r=4), targets, seed=0):
            torch.manual_seed(2)
            nn.init.normal_(site.adapter("default").lora_B, std=0.05)
        outputs.append(net(x, src_key_padding_mask=padded)[~padded])
        net.eval()
        with torch.no_grad():
            outputs.append(net(x, src_key_padding_mask=padded)[~padded])
    in_training, in_eval, expected, _ = outputs
    assert distance(in_training, expected) < 1e-6
    assert distance(in_eval, expected) < (0.03 if form == "int8 of bitsandbytes" else 1e-6)


@pytest.mark.parametrize("form", ["nf4", "int8 of torchao"])
def test_attention_reads_what_a_packed_projection_stands_for(form):
    torch.manual_seed(1)
    net = nn.MultiheadAttention(64, 2, batch_first=True)
    reference = copy.deepcopy(net)
    net.out_proj = packed(nn.Linear(64, 64), form)
    reference.out_proj.load_state_dict({"weight": decoded(net.out_proj), "bias": net.out_proj.bias})
    x = torch.randn(2, 5, 64)
    for model in (net, reference):
        for site in inject(model, LoRA(r=4), seed=0):
            torch.manual_seed(2)
            nn.init.normal_(site.adapter("default").lora_B, std=0.05)
        model(x, x, x)[0].square().sum().backward()
    assert distance(net(x, x, x)[0], reference(x, x, x)[0]) < 1e-6
    for name, gradient in gradients(net).items():
        assert distance(gradient, gradients(reference)[name]) < 1e-4, name


# Trainer --------------------------------------------------------------------------------------------------------------


class OnPacked(Lit):
    """A module whose network is quantized before the Trainer sees it."""

    def __init__(self, form: str) -> None:
        self.form = form
        super().__init__(width=64)

    def build(self) -> nn.Module:
        net = super().build()
        net.second = packed(net.second, self.form)
        return net


class OnDense(OnPacked):
    """The same network over the dense weight that the packed one stands for."""

    def build(self) -> nn.Module:
        net = super().build()
        weight = decoded(net.second).float()
        net.second = nn.Linear(64, 3)
        net.second.load_state_dict({"weight": weight, "bias": super().build().second.bias})
        return net


def callback() -> LoRACallback:
    return LoRACallback(LoRA(r=4), target_modules=["second"], modules_to_save=["first"])


@every_format
def test_a_fit_has_the_losses_of_one_on_dense_weights(form, trainer):
    packed_run, dense_run = OnPacked(form), OnDense(form)
    stored = bits(packed_run.net.second)
    for module in (packed_run, dense_run):
        trainer(callbacks=[callback()]).fit(module, loader(), loader())
    assert packed_run.losses == pytest.approx(dense_run.losses, rel=1e-4)
    assert packed_run.losses[-1] < packed_run.losses[0]
    assert same(bits(packed_run.net.second), stored)


@every_format
def test_checkpoints_hold_adapters_only_and_resume_exactly(form, trainer, tmp_path):
    def fit(module: Lit, **resume: Any) -> None:
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        run = trainer(callbacks=[callback(), keep], enable_checkpointing=True)
        run.fit(module, loader(), loader(), **resume)

    whole, resumed = OnPacked(form), OnPacked(form)
    fit(whole)
    state = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"]
    assert {name for name in state if name.startswith("net.")} == {
        "net.first.weight",
        "net.first.bias",
        "net.second.adapters.weight.default.lora_A",
        "net.second.adapters.weight.default.lora_B",
    }
    fit(resumed, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert resumed.losses == whole.losses[4:]
    tuned = load_from_checkpoint(OnPacked, tmp_path / "epoch=1.ckpt", form=form)
    x = torch.randn(5, 4)
    assert torch.equal(tuned(x), whole(x))


class BuiltLate(Lit):
    """A module that builds its network in ``configure_model``, where ``nn.Linear`` is the plugin's class."""

    def __init__(self) -> None:
        super().__init__(width=64)
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = self.build()


@pytest.mark.parametrize("build", [lambda: Lit(width=64), BuiltLate])
@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4", "int8", "int8-training"])
def test_lightnings_plugin_packs_the_base_that_the_callback_adapts(mode, build, trainer, tmp_path):
    pytest.importorskip("bitsandbytes")

    def fit(module: Lit, **resume: Any) -> None:
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        run = trainer(callbacks=[LoRACallback(LoRA(r=4)), keep], enable_checkpointing=True)
        # Trainer(plugins=...) refuses it on the CPU; what the plugin itself does runs there
        dtype = torch.float16 if mode.startswith("int8") else torch.bfloat16
        run.strategy.precision_plugin = BitsandbytesPrecision(mode, dtype)
        run.fit(module, loader(), loader(), **resume)

    whole, resumed = build(), build()
    fit(whole)
    assert is_quantized(whole.net.second.weight) == (mode != "int8-training")
    adapters = [site.adapter("default") for site in sites(whole)]
    assert len(adapters) == 2
    assert all(adapter.lora_B.dtype == torch.float32 and adapter.lora_B.any() for adapter in adapters)
    assert {p.requires_grad for name, p in whole.named_parameters() if "adapters" not in name} == {False}
    fit(resumed, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert resumed.losses == whole.losses[4:]
    plain = merge_(dequantize_(whole, torch.float32)).net
    assert {type(layer) for layer in plain.children()} == {nn.Linear}
    doubled = {name: 2 * value for name, value in plain.state_dict().items()}
    plain.load_state_dict(doubled)  # Lightning's layers would pack what is loaded
    assert all(torch.equal(value, doubled[name]) for name, value in plain.state_dict().items())


# Documentation --------------------------------------------------------------------------------------------------------


def test_the_example_of_the_page_gives_a_plain_model():
    pytest.importorskip("bitsandbytes")
    page = (Path(__file__).parent.parent / "docs" / "quantized.md").read_text()
    namespace: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], namespace)
    assert type(namespace["plain"][0]) is nn.Linear


# transformers ---------------------------------------------------------------------------------------------------------


def test_a_model_that_transformers_quantized_is_tuned_merged_and_saved_as_an_ordinary_one(tmp_path):
    pytest.importorskip("bitsandbytes")
    hf = pytest.importorskip("transformers")
    config = hf.LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
    )
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    four_bit = hf.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = hf.LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=four_bit, device_map="cpu")
    found = inject(model, LoRA(r=4))
    assert len(found) == 7
    assert all(is_quantized(site.module.weight) for site in found)
    for site in found:
        nn.init.normal_(site.adapter("default").lora_B, std=0.05)
    ids = torch.randint(0, 32, (2, 7))
    model(ids, labels=ids).loss.backward()
    assert all(p.grad.any() for site in found for p in site.slot.parameters())
    logits = model.eval()(ids).logits
    merge_(dequantize_(model, torch.float32)).save_pretrained(tmp_path / "merged")
    plain = hf.LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert {type(module).__module__.partition(".")[0] for module in plain.modules()} == {"torch", "transformers"}
    assert distance(plain(ids).logits, logits) < 1e-5
