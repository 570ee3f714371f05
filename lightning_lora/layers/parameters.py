"""Adapters on any matrix that its own module's forward reads: stacked experts, tables, layers of another kind."""

from __future__ import annotations

from torch import nn

from lightning_lora.layers.seam import Reader
from lightning_lora.layout import Layout
from lightning_lora.sites import slots_of


class AdaptedParameters(Reader):
    """Any module: the adapted weights stand in for its own during its forward, whatever that computes from them."""

    @classmethod
    def fits(cls, plain: type[nn.Module]) -> bool:
        """Fit every class that has a forward."""
        return plain.forward is not nn.Module.forward

    @staticmethod
    def matrices(module: nn.Module) -> list[str]:
        """Return the names of the parameters that are a matrix or a stack of matrices."""
        return [name for name, p in module._parameters.items() if p is not None and p.dim() in (2, 3)]

    @staticmethod
    def layout(module: nn.Module, parameter: str) -> Layout:
        """Return that of an (out, in) matrix or of a stack of them, turned where the module says ``is_transposed``.

        transformers' expert layers say so; PEFT's ``target_parameters`` looks at it in the same way.
        """
        stacked = getattr(module, parameter).dim() == 3
        return Layout(stacked=stacked, transposed=stacked and bool(getattr(module, "is_transposed", False)))

    @staticmethod
    def reads(module: nn.Module) -> list[tuple[nn.Module, str]]:
        """Return what is adapted of the module's own."""
        return [
            (module, parameter) for parameter in dict.fromkeys(slot.parameter for slot in slots_of(module).values())
        ]
