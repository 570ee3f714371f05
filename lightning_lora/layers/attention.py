"""Adapters on attention and on PyTorch's encoder: they read weights of their children without calling them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from lightning_lora.layers.seam import AdaptedLayer, Reader
from lightning_lora.quantized import is_quantized
from lightning_lora.sites import slots_at


class AdaptedMultiheadAttention(Reader):
    """``nn.MultiheadAttention``: reads its own input projections and the weight of ``out_proj``."""

    adapts = (nn.MultiheadAttention,)
    linear: ClassVar[bool] = True

    @staticmethod
    def matrices(module: nn.Module) -> list[str]:
        """Return the packed input projection, or the three separate ones."""
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return [name for name in names if getattr(module, name, None) is not None]

    @staticmethod
    def reads(module: nn.Module) -> list[tuple[nn.Module, str]]:
        """Return the input projections and ``out_proj.weight``."""
        own = [(module, name) for name in AdaptedMultiheadAttention.matrices(module)]
        return [*own, (module.out_proj, "weight")]  # type: ignore[list-item]


class InferenceReader(Reader):
    """A reader only outside of training, where PyTorch's fused path bypasses the children."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the plain forward; in training mode the children are called and do their own work."""
        if self.training:
            return super(Reader, self).forward(*args, **kwargs)
        return super().forward(*args, **kwargs)


class AdaptedTransformerEncoderLayer(InferenceReader):
    """``nn.TransformerEncoderLayer``: in eval mode one fused kernel reads all of its children's weights."""

    adapts = (nn.TransformerEncoderLayer,)

    @staticmethod
    def reads(module: nn.Module) -> list[tuple[nn.Module, str]]:
        """Return what the attention reads, and the weights of the two linear layers.

        A subclass that has other children in their places has a forward of its own, which calls them.
        """
        attention = getattr(module, "self_attn", None)
        found = AdaptedMultiheadAttention.reads(attention) if isinstance(attention, nn.MultiheadAttention) else []
        linears = [getattr(module, name, None) for name in ("linear1", "linear2")]
        return found + [(linear, "weight") for linear in linears if isinstance(linear, nn.Linear)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the plain forward, which calls the children where weights are packed: its kernel cannot read them."""
        if self.training or not _reads_packed(self):
            return super().forward(*args, **kwargs)
        fused = getattr(self, "activation_relu_or_gelu", 0)
        self.activation_relu_or_gelu = 0  # one of PyTorch's conditions for its kernel
        try:
            return super(Reader, self).forward(*args, **kwargs)
        finally:
            self.activation_relu_or_gelu = fused


class AdaptedTransformerEncoder(AdaptedLayer):
    """``nn.TransformerEncoder``: packs a padded batch into nested tensors, which only the fused path can compute.

    It decides by asking whether the weights of its first layer need a gradient; those of all adapters have a say too.
    """

    adapts = (nn.TransformerEncoder,)

    @staticmethod
    def reads(module: nn.Module) -> list[tuple[nn.Module, str]]:
        """Return what the layers of PyTorch's own kind read."""
        layers = [layer for layer in getattr(module, "layers", ()) if isinstance(layer, nn.TransformerEncoderLayer)]
        return [pair for layer in layers for pair in AdaptedTransformerEncoderLayer.reads(layer)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the plain forward, without nested tensors where the layers do not take the fused path."""
        nested = getattr(self, "use_nested_tensor", False)
        needs_gradient = torch.is_grad_enabled() and self._needs_gradient()
        if self.training or not nested or not (needs_gradient or _reads_packed(self)):
            return super().forward(*args, **kwargs)
        self.use_nested_tensor = False
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.use_nested_tensor = nested

    def _needs_gradient(self) -> bool:
        slots = [slot for owner, parameter in self.reads(self) for slot in slots_at(owner, parameter)]
        adapters = [adapter for slot in slots for adapter in slot.in_use()]
        return any(parameter.requires_grad for adapter in adapters for parameter in adapter.parameters())


def _reads_packed(module: AdaptedLayer) -> bool:
    weights = [owner._parameters.get(parameter) for owner, parameter in module.reads(module)]
    return any(weight is not None and is_quantized(weight) for weight in weights)
