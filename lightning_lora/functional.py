"""The low-rank step: what an adapter adds to the output of a layer that it sits on.

There is a plain form, two products and a sum that PyTorch differentiates, and a fused one with a backward of its own
that keeps less, launches less and moves less. They compute the same up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from lightning_lora.dropout import dropped, factor
from lightning_lora.shared_casts import shared_cast

_FUSED_ON = ("cpu", "cuda", "xpu", "mps")
_FUSED_IN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ORDINARY = (Tensor, nn.Parameter)  # no subclasses, which have rules of their own
_FEWEST_ROWS = 64  # below, a node that Python differentiates costs more than it saves
_MANY_ROWS = 1024  # the same where the weight is cast in both passes, and for half precision on a CPU
_FEWEST_ROWS_IN_HALF = 128  # below, a CPU computes small products in half precision slower than in full


def low_rank_step(y: Tensor, x: Tensor, up: Tensor, down: Tensor, scaling: float) -> Tensor:
    """Return ``y + scaling * (x @ down.T) @ up.T`` in the dtype of ``y``: the plain form.

    The small factors are cast to the dtype of ``x``, not ``x`` to theirs, but for few rows on a CPU, where products in
    half precision cost more than such a cast.

    Args:
        y: The base layer's output (..., out).
        x: Its input (..., in).
        up: (out, r).
        down: (r, in).
        scaling: The factor on the low-rank term.
    """
    few = x.dtype != down.dtype and x.is_cpu and x.numel() < _FEWEST_ROWS_IN_HALF * down.shape[-1]
    if few and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling():
        x = x.to(torch.promote_types(x.dtype, down.dtype))
    z = scaled(F.linear(x, _cast(down, x)), scaling)
    return y + _cast(F.linear(z, _cast(up, z)), y)


def scaled(z: Tensor, scaling: float) -> Tensor:
    """Return ``scaling * z``, for the small factor's product: inductor drops the alpha of a sum before a product.

    Args:
        z: (..., r).
        scaling: The factor; 1 takes no launch.
    """
    return z if scaling == 1 else scaling * z


def fused_step(y: Tensor, x: Tensor, up: Tensor, down: Tensor, scaling: float, dropout: float = 0.0) -> Tensor:
    """Return what ``low_rank_step`` does as one node of the autograd graph.

    Args:
        y: The base layer's output (..., out); nothing is written to it, because others may hold it.
        x: Its input (..., in), in the same dtype.
        up: (out, r).
        down: (r, in).
        scaling: The factor on the low-rank term.
        dropout: Probability with which an element of the term's input is zeroed.
    """
    return _applied(x, y, None, None, up, down, scaling, dropout)


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    up: Tensor,
    down: Tensor,
    scaling: float,
    dropout: float = 0.0,
    *,
    share: bool = True,
) -> Tensor:
    """Return ``x @ (weight + scaling * up @ down).T + bias``: a frozen linear layer and its step as one node.

    The step is added in place to what nobody else has: forward to the layer's output, backward to the gradient of its
    input. Kept are ``x`` as it is (where ``down`` is trained), ``x @ down.T``, and the mask where there is dropout.

    Args:
        x: The input (..., in).
        weight: The layer's (out, in), which gets no gradient.
        bias: The layer's (out,), which gets one if it asks for it.
        up: (out, r).
        down: (r, in).
        scaling: The factor on the low-rank term.
        dropout: Probability with which an element of the low-rank term's input is zeroed.
        share: Whether a cast of ``x`` is shared with the layers that were just given it.
    """
    dtype = computed_in(x)
    if x.dtype != dtype:
        x = shared_cast(x, dtype) if share else x.to(dtype)
    # a parameter is there anyway and cast when needed; what was computed from some would be kept in full for that
    up, down = (factor if factor.is_leaf else _cast(factor, x) for factor in (up, down))
    return _applied(x, None, weight, bias, up, down, scaling, dropout)


def with_gain(output: Tensor, excess: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``output + excess * (output - bias)``: a gain of ``1 + excess`` on all but the bias.

    Where the excess is 0 this is the output, bit for bit. Only the output is kept for the backward pass.

    Args:
        output: A linear layer's (..., out).
        excess: One value for each output unit (out,).
        bias: The layer's (out,).
    """
    if torch.is_grad_enabled():
        return _Gain.apply(output, excess, bias)  # type: ignore[no-any-return, no-untyped-call]
    return _gain(output, excess, bias)


def step_fuses(y: Tensor, x: Tensor, up: Tensor, down: Tensor) -> bool:
    """Tell whether ``fused_step`` can be taken.

    It cannot where something has to see every operation (torch.compile, export, tracing, torch.func, forward-mode
    differentiation), nor for tensors with rules of their own (distributed, packed or traced ones), and it is not for
    few rows.

    Args:
        y: The base layer's output.
        x: Its input.
        up: (out, r).
        down: (r, in).
    """
    if x.numel() < (_MANY_ROWS if _slow_in_half(x) else _FEWEST_ROWS) * down.shape[-1]:
        return False
    return _eager(x, y, up, down) and x.dtype == y.dtype == computed_in(x) and x.shape[:-1] == y.shape[:-1]


def linear_fuses(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Tell whether ``fused_linear`` can be taken: as for ``step_fuses``, and the weight has to be frozen.

    A weight that autocast casts is cast again in the backward pass instead of being kept twice, which takes more rows.

    Args:
        x: The input.
        weight: The layer's (out, in).
        bias: The layer's (out,).
    """
    rows = x.numel() // max(1, weight.shape[-1])
    if (
        rows < (_MANY_ROWS if _slow_in_half(x) else _FEWEST_ROWS)
        or not _eager(x, weight)
        or weight.requires_grad
        or (bias is not None and not are_ordinary(bias))
    ):
        return False
    if torch.is_autocast_enabled(x.device.type):
        cast = weight.dtype != torch.get_autocast_dtype(x.device.type)
        wide = torch.float64 in (x.dtype, weight.dtype)  # which autocast leaves as it is
        return not wide and not (cast and rows < _MANY_ROWS)
    return x.dtype == weight.dtype and (bias is None or x.dtype == bias.dtype)


def _slow_in_half(x: Tensor) -> bool:
    return x.is_cpu and computed_in(x).itemsize == 2


def computed_in(x: Tensor) -> torch.dtype:
    """Return the dtype in which a product with ``x`` is computed, which autocast may choose."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


def are_ordinary(*tensors: Tensor) -> bool:
    """Tell whether tensors are PyTorch's own and no subclass, which may be distributed, packed or traced."""
    return all(type(tensor) in _ORDINARY for tensor in tensors)


def _eager(*tensors: Tensor) -> bool:
    x = tensors[0]
    return (
        not torch.compiler.is_compiling()
        and are_ordinary(*tensors)
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and x.dtype in _FUSED_IN
        and x.device.type in _FUSED_ON
    )


def _applied(x: Tensor, *args: Any) -> Tensor:
    if torch.is_grad_enabled():
        return _LowRankStep.apply(x, *args)[0]  # type: ignore[no-any-return, no-untyped-call]
    return _forward(x, *args)[0]


def _forward(
    x: Tensor,
    base: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    up: Tensor,
    down: Tensor,
    scaling: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the output, ``x @ down.T`` (n, r), and the mask (n, in) of what dropout left of ``x``."""
    if weight is not None:
        output = F.linear(x, _cast(weight, x), bias if bias is None else _cast(bias, x))
        if output._is_view():  # of what nobody else has; autograd lets nobody write to a view that a function returned
            output = torch.ops.aten._unsafe_view(output, output.shape)
        flat = base_rows = output.view(-1, output.shape[-1])
    else:
        assert base is not None
        output = torch.empty_like(base, memory_format=torch.contiguous_format)
        flat = output.view(-1, output.shape[-1])
        base_rows = base.reshape(flat.shape)
    rows, mask = x.reshape(-1, x.shape[-1]), None
    if dropout:
        rows, mask = dropped(rows, dropout)
    z = rows.mm(_cast(down, x).t())
    torch.addmm(base_rows, z, _cast(up, x).t(), alpha=scaling, out=flat)
    return output, z, mask


def _cast(tensor: Tensor, x: Tensor) -> Tensor:
    return tensor if tensor.dtype == x.dtype else tensor.to(x.dtype)


class _LowRankStep(torch.autograd.Function):
    """The fused step, with ``z`` as a second output: so a backward through the backward knows where ``z`` came from.

    Casts of the weight and of the factors are made anew in the backward pass instead of being kept for it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        output, z, mask = _forward(x, *args)
        for_x, _, _, _, for_up, for_down, *_ = ctx.needs_input_grad
        _, weight, bias, up, down, ctx.scaling, ctx.dropout = args
        ctx.save_for_backward(
            x if for_down else None,
            weight if for_x else None,
            up if for_x or for_down else None,
            down if for_x else None,
            z if for_up else None,
            mask if for_x or for_down else None,
        )
        ctx.shape, ctx.bias_dtype, ctx.factor_dtypes = x.shape, bias is not None and bias.dtype, (up.dtype, down.dtype)
        ctx.set_materialize_grads(False)
        return output, z

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_z: Tensor | None) -> tuple[Tensor | None, ...]:
        given = grad if grad is not None else grad_z
        if given is not None and torch.is_autocast_enabled(given.device.type):
            with torch.autocast(given.device.type, enabled=False):
                return _backward(ctx, grad, grad_z)
        return _backward(ctx, grad, grad_z)


def _gain(output: Tensor, excess: Tensor, bias: Tensor | None) -> Tensor:
    factor = _cast(excess, output)
    changed = torch.addcmul(output, output, factor)
    return changed if bias is None else changed.sub_(factor * _cast(bias, output))


class _Gain(torch.autograd.Function):
    """``with_gain``."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, excess: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(output if ctx.needs_input_grad[1] else None, excess, bias)
        return _gain(output, excess, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        output, excess, bias = ctx.saved_tensors
        over = tuple(range(grad.dim() - 1))
        grad_excess = grad_bias = None
        summed = None if bias is None else grad.sum(over, dtype=excess.dtype)
        if ctx.needs_input_grad[1]:
            product = grad * output
            if bias is None:
                grad_excess = _summed(product, excess.dtype)
            else:  # what is left of two sums may be far smaller than they are, so they are not rounded
                grad_excess = product.sum(over, dtype=excess.dtype) - bias * summed
        if ctx.needs_input_grad[2]:
            grad_bias = (-excess * summed).to(bias.dtype)
        return torch.addcmul(grad, grad, _cast(excess, grad)), grad_excess, grad_bias


def _backward(ctx: Any, grad: Tensor | None, grad_z: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradients of ``_forward``'s arguments."""
    x, weight, up, down, z, mask = ctx.saved_tensors
    for_x, for_base, _, for_bias, for_up, for_down, *_ = ctx.needs_input_grad
    grad_x = grad_bias = grad_up = grad_down = None
    kept = 1 / (1 - ctx.dropout)
    given = grad if grad is not None else grad_z
    left = None if mask is None or given is None else factor(mask, given)
    u = grad_z  # the gradient of z, (n, r)
    if grad is not None:
        rows = grad.reshape(-1, grad.shape[-1])
        if for_bias:
            grad_bias = _summed(rows, ctx.bias_dtype)
        if for_up:
            grad_up = _crossed(rows, z, ctx.scaling, ctx.factor_dtypes[0])
        if for_x or for_down:
            u = _product(rows, _cast(up, rows), ctx.scaling)
            if grad_z is not None:
                u = u + grad_z
        if weight is not None:
            grad_x = rows.mm(_cast(weight, rows))
    if u is not None and for_x:
        if left is not None:
            if grad_x is None:
                grad_x = u.mm(_cast(down, u)).mul_(left).mul_(kept)
            else:
                grad_x.addcmul_(u.mm(_cast(down, u)), left, value=kept)
        elif grad_x is None:
            grad_x = u.mm(_cast(down, u))
        else:
            grad_x.addmm_(u, _cast(down, u))
        grad_x = grad_x.view(ctx.shape)
    if u is not None and for_down:
        rows = x.reshape(-1, x.shape[-1])
        rows, scaling = (rows, 1.0) if left is None else (rows * left, kept)
        grad_down = _crossed(u, rows, scaling, ctx.factor_dtypes[1])
    return grad_x, grad if for_base else None, None, grad_bias, grad_up, grad_down, None, None


def _crossed(one: Tensor, other: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """Return ``scaling * one.T @ other``, of two matrices with as many rows."""
    if one.is_cpu and one.itemsize == 2:  # a turned matrix is read slowly there
        if one.shape[1] <= other.shape[1]:
            product = _product(one.t().contiguous(), other, scaling)
        else:
            product = _product(other.t().contiguous(), one, scaling).t()
    else:
        product = _product(one.t(), other, scaling)
    return product.to(dtype, memory_format=torch.contiguous_format)


def _product(one: Tensor, other: Tensor, scaling: float) -> Tensor:
    """Return ``scaling * one @ other`` in one launch; what lay in the memory before is not read."""
    if scaling == 1:
        return one.mm(other)
    return one.new_empty(one.shape[0], other.shape[1]).addmm_(one, other, beta=0, alpha=scaling)


def _summed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum over all dimensions but the last one, added up in fp32 or wider; on a CPU rounded to bf16 then.

    There PyTorch would copy all values first to return another dtype than theirs.
    """
    over = tuple(range(tensor.dim() - 1))
    if tensor.is_cpu and tensor.dtype == torch.bfloat16:
        return tensor.sum(over).to(dtype)
    return tensor.sum(over, dtype=dtype)
