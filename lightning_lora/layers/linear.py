"""Adapters on layers that multiply by a matrix."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.functional import low_rank_step
from lightning_lora.layers.seam import Called, plain_class
from lightning_lora.layout import Layout

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

    @staticmethod
    def step(layer: nn.Module, output: Tensor, x: Tensor, up: Tensor, down: Tensor, scaling: float) -> Tensor:
        """Return the output plus the low-rank step."""
        return low_rank_step(output, x, up, down, scaling)

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
