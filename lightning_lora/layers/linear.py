"""Adapters on layers that multiply by a matrix."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.adapter import Adapter
from lightning_lora.functional import (
    are_ordinary,
    fused_linear,
    fused_step,
    linear_fuses,
    low_rank_step,
    step_fuses,
    with_gain,
)
from lightning_lora.layers.seam import Called, plain_class
from lightning_lora.layout import Layout
from lightning_lora.sites import slots_of

_CLOSE = 1e-2  # relative; rounding in half precision stays below, masks and scales do not


class AdaptedLinear(Called):
    """``nn.Linear`` plus the low-rank step on its input."""

    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    linear: ClassVar[bool] = True

    @staticmethod
    def matrices(module: nn.Module) -> list[str]:
        """Return the weight's name."""
        return ["weight"]

    @staticmethod
    def size(module: nn.Module, parameter: str) -> tuple[int, ...]:
        """Return (out_features, in_features), which hold for packed weights too."""
        return module.out_features, module.in_features  # type: ignore[return-value]

    @classmethod
    def computes_as_plain(cls, module: nn.Module) -> bool:
        """Tell whether the forward gives what the weight and the bias give, by running both where its class is new.

        Packed weights, whose layers multiply by what they stand for, cannot be compared.
        """
        weight = module.weight
        if super().computes_as_plain(module) or type(weight) is not nn.Parameter or not weight.is_floating_point():
            return True
        if weight.is_meta:
            return False
        x = torch.linspace(-1, 1, 2 * weight.shape[1], dtype=weight.dtype, device=weight.device).view(2, -1)
        mode = module.training
        module.training = False
        try:
            with torch.no_grad():
                expected = F.linear(x, weight, module.bias)  # type: ignore[arg-type]
                return bool((module.forward(x) - expected).norm() <= _CLOSE * expected.norm())
        except (RuntimeError, TypeError, AttributeError):  # a forward of another signature
            return False
        finally:
            module.training = mode

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the plain layer and its one adapter as one operation where that can be, else one after the other."""
        adapter = _only_adapter(self) if len(args) + len(kwargs) == 1 else None
        if adapter is None:
            return super().forward(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        weight, bias = self.multiplies_by(self), _own(self, "bias")
        if weight is not None and linear_fuses(x, weight, bias) and (bias is not None or self.bias is None):
            output: Tensor = adapter(_with_base, x, weight, bias)
        elif adapter.needs_weight:
            output = super().forward(*args, **kwargs)
        else:
            output = adapter(_added, self, super(Called, self).forward(*args, **kwargs), x)
        return output

    @staticmethod
    def multiplies_by(layer: nn.Module) -> Tensor | None:
        """Return the (out, in) matrix if the plain forward is nothing but a product with it and the bias."""
        return _own(layer, "weight") if plain_class(layer).forward is nn.Linear.forward else None

    @staticmethod
    def step(layer: nn.Module, output: Tensor, x: Tensor, up: Tensor, down: Tensor, scaling: float) -> Tensor:
        """Return the output plus the low-rank step."""
        return (fused_step if step_fuses(output, x, up, down) else low_rank_step)(output, x, up, down, scaling)

    @staticmethod
    def add(layer: nn.Module, adapter: Adapter, output: Tensor, input: Tensor) -> Tensor:
        """Return the output plus the low-rank step, which keeps a mask of the dropout and not what it left."""
        up, down = adapter.factors()
        if step_fuses(output, input, up, down):
            return fused_step(output, input, up, down, adapter.scaling, adapter.drops())
        return low_rank_step(output, adapter.dropped(input), up, down, adapter.scaling)

    @staticmethod
    def product(layer: nn.Module, x: Tensor, weight: Tensor, size: torch.Size) -> Tensor:
        """Return the product with an (out, in) weight."""
        return F.linear(x, weight.to(x.dtype))


class AdaptedConv1D(AdaptedLinear):
    """The ``Conv1D`` of transformers (GPT-2): a linear layer whose weight lies as (in, out)."""

    adapts = ()

    @classmethod
    def fits(cls, plain: type[nn.Module]) -> bool:
        """Tell it by its name, because transformers need not be installed."""
        return any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in plain.__mro__)

    @classmethod
    def computes_as_plain(cls, module: nn.Module) -> bool:
        """Tell whether it is that class itself."""
        return plain_class(module).__name__ == "Conv1D"

    @staticmethod
    def multiplies_by(layer: nn.Module) -> Tensor | None:
        """Return the (out, in) matrix: layers with another forward are not of this kind."""
        weight = _own(layer, "weight")
        return weight if weight is None else weight.mT

    @staticmethod
    def layout(module: nn.Module, parameter: str) -> Layout:
        """Return the layout of an (in, out) weight."""
        return Layout(transposed=True)

    @staticmethod
    def product(layer: nn.Module, x: Tensor, weight: Tensor, size: torch.Size) -> Tensor:
        """Return the product with an (in, out) weight."""
        return x @ weight.to(x.dtype)

    @staticmethod
    def size(module: nn.Module, parameter: str) -> tuple[int, ...]:
        """Return (in, out)."""
        return tuple(getattr(module, parameter).shape)


def _own(layer: nn.Module, name: str) -> Tensor | None:
    """Return a tensor that the layer has, and does not compute; FSDP puts it in the instance's dictionary."""
    own: Tensor | None = layer.__dict__.get(name, layer._parameters.get(name))
    return own


def _only_adapter(layer: nn.Module) -> Adapter | None:
    """Return the adapter in use if it is the only one, changes the whole weight and has nothing to do before."""
    slots = slots_of(layer)
    if len(slots) != 1:
        return None
    (slot,) = slots.values()
    if slot.layout.rows is not None or slot.per_example is not None:
        return None
    adapters = slot.in_use()
    if len(adapters) != 1:
        return None
    (adapter,) = adapters
    gain_on_input = (adapter.needs_weight and slot.layout.looked_up) or adapter.drops_for_gain()
    return None if gain_on_input or not adapter.low_rank or adapter.waits_for_weight else adapter


def _added(adapter: Adapter, layer: AdaptedLinear, output: Tensor, x: Tensor) -> Tensor:
    return layer.add(layer, adapter, output, x)


def _with_base(adapter: Adapter, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return what the layer and its adapter give together."""
    up, down = adapter.factors()
    gain = adapter.gain(weight) if adapter.needs_weight else None
    if are_ordinary(up, down):
        output = fused_linear(x, weight, bias, up, down, adapter.scaling, adapter.drops(), share=adapter.shares_inputs)
    else:
        output = low_rank_step(F.linear(x, weight, bias), adapter.dropped(x), up, down, adapter.scaling)
    return output if gain is None else with_gain(output, gain.squeeze(-1) - 1, bias)
