"""Adapters on packed weights: bitsandbytes' 4-bit and 8-bit layers, torchao's int8 weights. All run on the CPU.

The reference is float64 arithmetic on what the packed entries stand for, decoded here from the formats' definitions.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora.quantized import (
    allow_inference_kernels,
    awaits_quantization,
    check_requantizable,
    dense_weight,
    is_quantized,
    keep_differentiable,
    requantize,
    set_parameter,
    unpack_,
)

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
    x = torch.randn(3, 64)
    assert distance(layer(x), x.double() @ dense_weight(layer).double().T + layer.bias.double()) < 1e-6
    with pytest.raises(
        ValueError, match=r"Int8Tensor in this configuration cannot be packed again .* dequantize_\(model"
    ):
        check_requantizable(layer.weight)


def test_the_four_bit_tensors_of_torchao_are_read_but_not_written():
    pytest.importorskip("torchao")
    nf4 = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    layer = nn.Linear(128, 64, bias=False)
    layer.weight = nn.Parameter(nf4.to_nf4(layer.weight.detach(), 64, 16), requires_grad=False)
    x = torch.randn(3, 128)
    assert distance(layer(x), x.double() @ dense_weight(layer).double().T) < 1e-6
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
    layer = packed(nn.Linear(64, 32), form)
    keep_differentiable(layer)
    stored = bits(layer)
    layer.eval()
    with torch.no_grad():
        layer(torch.randn(3, 64))
    layer.train()
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).sum().backward()
    assert distance(x.grad, decoded(layer).sum(0).expand(3, 64)) < 1e-6
    assert same(bits(layer), stored)


@pytest.mark.parametrize("form", FOUR_BIT)
def test_four_bit_layers_that_were_evaluated_before_give_gradients_too(form):
    layer = packed(nn.Linear(64, 32), form)
    before = decoded(layer)
    layer.eval()
    with torch.no_grad():
        output = layer(x := torch.randn(3, 64))
    after = dense_weight(layer)
    assert distance(after, before) < 0.005  # the kernel rounds scales to bf16
    assert distance(output, x @ after.T + layer.bias) < 0.01
    keep_differentiable(layer)
    assert torch.equal(dense_weight(layer), after)
    assert torch.equal(decoded(layer).float(), after)
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).sum().backward()
    assert distance(x.grad, after.sum(0).expand(3, 64)) < 1e-6


def test_the_kernel_is_allowed_again():
    if not has_kernel():
        pytest.skip("this CPU, or this bitsandbytes, has no such kernel")
    layer = packed(nn.Linear(64, 32), "nf4")
    plain = dict(layer.__dict__)
    keep_differentiable(layer)
    assert layer.__dict__ != plain
    allow_inference_kernels(layer)
    assert layer.__dict__ == plain


# Packages -------------------------------------------------------------------------------------------------------------


def test_neither_package_is_imported_where_nothing_is_packed():
    code = (
        "import sys, torch, lightning_lora as ll\n"
        "net = torch.nn.Sequential(torch.nn.Linear(4, 3))\n"
        "ll.inject(net, ll.LoRA(r=2)); ll.merge_(net)\n"
        "print({'bitsandbytes', 'torchao'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
