"""Weights that are stored packed: bitsandbytes' 4-bit and 8-bit ones, torchao's int8 ones.

No other room knows these packages, and neither is imported before a weight of its kind is met. bitsandbytes packs a
weight when its layer is first moved to a device, the CPU included; torchao when ``quantize_`` is called.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Format = Literal["4-bit", "8-bit", "torchao"]
_CPU_KERNEL = "support_avx512bf16_for_cpu"  # a flag on each 4-bit layer of bitsandbytes
_ON_THE_LAYER = (  # what layers of bitsandbytes have beside PyTorch's own attributes
    *("compute_dtype", "compute_type_is_set", "quant_state", "quant_storage", _CPU_KERNEL),
    *("state", "index"),
)


def format_of(weight: Tensor) -> Format | None:
    """Return the packed format that a weight is in, or will be in once it is moved; None for an ordinary tensor."""
    if hasattr(weight, "quant_state"):  # told by attributes, because a pickle brings back a plain Parameter
        return "4-bit"
    if hasattr(weight, "has_fp16_weights"):
        return "8-bit"
    if type(weight) is nn.Parameter or type(weight) is Tensor:  # all that torch.compile has to follow
        return None
    return "torchao" if type(weight).__module__.startswith("torchao.") else None


def is_quantized(weight: Tensor) -> bool:
    """Tell whether a weight is packed now, so that its entries are not those of a matrix."""
    kind, packed = format_of(weight), cast(Any, weight)
    if kind == "4-bit":
        return packed.quant_state is not None
    return kind == "torchao" or (kind == "8-bit" and packed.dtype == torch.int8)


def awaits_quantization(weight: Tensor) -> bool:
    """Tell whether a weight has its full values still and loses some of their precision at the next move."""
    kind = format_of(weight)
    in_8_bit = kind == "8-bit" and not cast(Any, weight).has_fp16_weights  # else it is packed anew by each forward
    return not is_quantized(weight) and (kind == "4-bit" or in_8_bit)


def number_of_values(weight: Tensor) -> int:
    """Return how many values a weight stands for; two lie in each byte of a packed 4-bit one."""
    if is_quantized(weight) and format_of(weight) == "4-bit":
        return int(cast(Any, weight).quant_state.shape.numel())
    return weight.numel()


def dense_weight(module: nn.Module, parameter: str = "weight") -> Tensor:
    """Return a weight as its layer computes with it: in floating point, (out, in) where the layer is linear.

    This is the parameter itself where it is not packed. bitsandbytes' 4-bit weights and torchao's come in the dtype
    that they had before, 8-bit ones, which know none, in fp32.

    Args:
        module: The layer.
        parameter: The parameter's name.
    """
    weight: Any = getattr(module, parameter)
    kind = format_of(weight) if is_quantized(weight) else None
    if kind == "4-bit":
        return _dense_4bit(weight)
    if kind == "8-bit":
        state: Any = module.state if weight.SCB is None else weight  # the first forward moves it there
        return weight.detach().float() * (state.SCB * (1.0 / 127.0))[:, None]  # type: ignore[no-any-return]
    if kind == "torchao":
        dense = weight.get_original_weight() if hasattr(weight, "get_original_weight") else weight.detach().dequantize()
        input_scale = getattr(weight, "act_pre_scale", None)  # AWQ, SmoothQuant
        return dense if input_scale is None else dense * input_scale  # type: ignore[no-any-return]
    return weight  # type: ignore[no-any-return]


def identifying_values(module: nn.Module, parameter: str) -> Tensor | None:
    """Return the values by which a weight is told from another; None where there are no values that stay.

    A packed 4-bit weight counts by its codes alone, because kernels round its scales (see ``keep_differentiable``); any
    other counts by what it stands for.

    Args:
        module: The layer.
        parameter: The parameter's name.
    """
    weight = module._parameters.get(parameter)  # none where a parametrization computes it
    if weight is None or weight.is_meta or awaits_quantization(weight):
        return None
    if is_quantized(weight) and format_of(weight) == "4-bit":
        return _plainly_packed(weight)[0].view(torch.uint8)
    return dense_weight(module, parameter)


def check_requantizable(weight: Tensor) -> None:
    """Raise ``ValueError`` if another matrix cannot be packed as a weight is; one that is not packed passes."""
    if format_of(weight) != "torchao":
        return
    activations = [getattr(weight, name, None) for name in ("act_quant_kwargs", "act_pre_scale")]
    if type(weight).__name__ != "Int8Tensor" or activations != [None, None]:
        raise ValueError(
            f"torchao's {type(weight).__name__} in this configuration cannot be packed again (int8 weight-only can): "
            "call dequantize_(model, dtype) first, or keep the adapter unmerged"
        )


@torch.no_grad()
def requantize(module: nn.Module, parameter: str, dense: Tensor) -> tuple[nn.Parameter, float]:
    """Pack a matrix in the format of a layer's present weight, which stays as it is; one to be packed later waits too.

    Args:
        module: The layer.
        parameter: The parameter's name.
        dense: The matrix (out, in), in the dtype that ``dense_weight`` gives.

    Returns:
        The new parameter, for ``set_parameter``, and the relative error (Frobenius norm) that packing made.

    Raises:
        ValueError: If the format cannot be written.
    """
    weight: Tensor = getattr(module, parameter)
    check_requantizable(weight)
    pack = {"4-bit": _pack_4bit, "8-bit": _pack_8bit, "torchao": _pack_torchao}[cast(Format, format_of(weight))]
    holder = nn.Module()
    holder.register_parameter("packed", pack(weight, dense) if is_quantized(weight) else _unpacked_yet(weight, dense))
    packed: nn.Parameter = holder.packed  # type: ignore[assignment]
    size = dense.double().norm().clamp_min(torch.finfo(torch.float64).tiny)
    return packed, ((dense_weight(holder, "packed").double() - dense.double()).norm() / size).item()


def set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Give a layer another parameter, and let it forget what it had derived from the one before.

    Args:
        module: The layer.
        name: The parameter's name.
        parameter: The new one, of the same format.
    """
    before: Any = module._parameters[name]
    kind = format_of(before)
    if kind == "8-bit":
        state: Any = module.state
        if is_quantized(before) and before.SCB is None:  # it goes back to where a forward took it from
            before.CB, before.SCB = state.CB, state.SCB
        state.reset_grads()
    elif kind == "4-bit":
        module.quant_state = cast(Any, parameter).quant_state
    module._parameters[name] = parameter


@torch.no_grad()
def unpack_(module: nn.Module, dtype: torch.dtype) -> None:
    """Turn a layer with a packed weight into PyTorch's own, in place.

    Args:
        module: The layer; a class of bitsandbytes' becomes the one of PyTorch's that it derives from.
        dtype: Of the dense weight, and of the bias.
    """
    for name, parameter in module._parameters.items():
        if parameter is not None and format_of(parameter) is not None:
            dense = dense_weight(module, name).detach().to(dtype)
            module._parameters[name] = nn.Parameter(dense, requires_grad=False)
        elif parameter is not None:
            parameter.data = parameter.data.to(dtype)
    module.__dict__.pop("extra_repr", None)  # torchao's, which tells of the packed weight
    classes = type(module).__mro__
    if any(cls.__module__.startswith("bitsandbytes.") for cls in classes):
        module.__class__ = next(cls for cls in classes if cls.__module__.startswith("torch."))
        for name in _ON_THE_LAYER:
            module.__dict__.pop(name, None)
        module._load_state_dict_pre_hooks.clear()  # they would pack what is loaded
        module._load_state_dict_post_hooks.clear()


def forget_quantizer(module: nn.Module) -> None:
    """Take off a model what transformers noted when it quantized it, so that it is saved and loaded as an ordinary one.

    Args:
        module: Any module; one that holds no such note stays as it is.
    """
    if module.__dict__.pop("hf_quantizer", None) is None:
        return
    module.__dict__.pop("quantization_method", None)
    setattr(module, "is_quantized", False)  # noqa: B010 - no attribute that mypy knows
    if hasattr(module.config, "quantization_config"):
        del module.config.quantization_config


def gives_no_gradient(module: nn.Module) -> bool:
    """Tell whether a linear layer's packed weight passes no gradient to the layer's input."""
    weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
    if weight is None or weight.is_meta or format_of(weight) != "torchao":
        return False
    with torch.enable_grad():
        rows = torch.zeros(32, weight.shape[1], dtype=weight.dtype, device=weight.device, requires_grad=True)
        return not F.linear(rows, weight).requires_grad


def keep_differentiable(model: nn.Module) -> None:
    """Keep 4-bit layers in the form that gradients pass through, and warn of layers that have none.

    On CPUs with AVX512-BF16 bitsandbytes has a kernel for inference. It rewrites the weight at the first forward in
    eval mode, rounds its scales, and gives no gradient ever after. torchao's layers that quantize their input give none
    anywhere.

    Args:
        model: The model, with all its layers.
    """
    modules = list(model.named_modules())
    opaque = [name for name, module in modules if gives_no_gradient(module)]
    if opaque:
        warnings.warn(
            f"{len(opaque)} quantized layers (first: {opaque[0]}) give no gradient to their input, so what lies below "
            "them is not trained through them: quantize weights alone, as torchao's Int8WeightOnlyConfig does",
            stacklevel=2,
        )
    for _, module in modules:
        if _CPU_KERNEL not in module.__dict__:
            continue
        module.__dict__[_CPU_KERNEL] = False
        weight: Any = module.weight
        if is_quantized(weight):
            weight.data, weight.quant_state = _plainly_packed(weight)
            module.quant_state = weight.quant_state


def allow_inference_kernels(model: nn.Module) -> None:
    """Undo ``keep_differentiable``.

    Args:
        model: The model, when nothing is to be trained in it any longer.
    """
    for module in model.modules():
        if _CPU_KERNEL in module.__dict__:
            from bitsandbytes.functional import has_avx512bf16

            module.__dict__[_CPU_KERNEL] = has_avx512bf16()


def _dense_4bit(weight: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    data, state = _plainly_packed(weight)
    return dequantize_4bit(data.view(-1, 1), state).reshape(state.shape)  # type: ignore[no-any-return]


def _plainly_packed(weight: Any) -> tuple[Tensor, Any]:
    """Return the packed entries and their scales in the form that all kernels but one read."""
    state = weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        return weight.data, state
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = copy.copy(state)
    state.original_nested = False  # or the scales were rounded once more
    data, state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax = state.absmax.T.reshape(-1).float()  # bitsandbytes 0.50 leaves them transposed
    state.state2 = state.offset = None
    return data, state


def _unpacked_yet(weight: Any, dense: Tensor) -> nn.Parameter:
    other: nn.Parameter = copy.deepcopy(weight)
    other.data = dense
    return other


def _pack_4bit(weight: Any, dense: Tensor) -> nn.Parameter:
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Params4bit

    blocks = {"blocksize": weight.quant_state.blocksize, "compress_statistics": weight.compress_statistics}
    form = {**blocks, "quant_type": weight.quant_state.quant_type, "quant_storage": weight.quant_storage}
    data, state = quantize_4bit(dense.contiguous(), **form)
    return Params4bit(data, requires_grad=False, quant_state=state, bnb_quantized=True, **form)  # type: ignore[no-any-return]


def _pack_8bit(weight: Any, dense: Tensor) -> nn.Parameter:
    from bitsandbytes.functional import int8_vectorwise_quant
    from bitsandbytes.nn import Int8Params

    data, scale, _ = int8_vectorwise_quant(dense.to(torch.float16))
    return Int8Params(data, requires_grad=False, has_fp16_weights=False, CB=data, SCB=scale)  # type: ignore[no-any-return]


def _pack_torchao(weight: Any, dense: Tensor) -> nn.Parameter:
    from torchao.quantization import Int8Tensor, PerGroup, PerRow, PerTensor

    block, size = list(weight.block_size), list(weight.shape)
    by_row = PerRow() if block[1] == size[1] else PerGroup(block[1])
    packed = Int8Tensor.from_hp(dense, PerTensor() if block == size else by_row)
    return nn.Parameter(packed, requires_grad=False)
