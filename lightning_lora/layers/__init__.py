"""What adapters do on each kind of layer.

A *called* layer is run by its owner, so adapters add their step to its output. A *reader* looks at weights without
calling the layers that own them, so during its forward the adapted weights stand in for the plain ones.
"""

from __future__ import annotations

from functools import cache

from torch import nn

from lightning_lora.layers.attention import (
    AdaptedMultiheadAttention,
    AdaptedTransformerEncoder,
    AdaptedTransformerEncoderLayer,
)
from lightning_lora.layers.convolution import AdaptedConvolution, AdaptedConvTranspose
from lightning_lora.layers.embedding import AdaptedEmbedding
from lightning_lora.layers.linear import AdaptedConv1D, AdaptedLinear
from lightning_lora.layers.parameters import AdaptedParameters
from lightning_lora.layers.recurrent import AdaptedCell, AdaptedRecurrent
from lightning_lora.layers.seam import AdaptedLayer, Called, plain_class, swap, unswap
from lightning_lora.sites import named_base_modules, slots_at, slots_of

KINDS: tuple[type[AdaptedLayer], ...] = (
    AdaptedLinear,
    AdaptedConv1D,
    AdaptedEmbedding,
    AdaptedConvolution,
    AdaptedConvTranspose,
    AdaptedMultiheadAttention,
    AdaptedTransformerEncoderLayer,
    AdaptedTransformerEncoder,
    AdaptedRecurrent,
    AdaptedCell,
)


def kind_of(module: nn.Module) -> type[AdaptedLayer] | None:
    """Return the kind of a layer, or None for a module of no known kind."""
    return _kind_of_class(plain_class(module))  # type: ignore[arg-type]


@cache
def _kind_of_class(plain: type[nn.Module]) -> type[AdaptedLayer] | None:
    return next((kind for kind in KINDS if kind.fits(plain)), None)


def kind_in_use(module: nn.Module) -> type[AdaptedLayer]:
    """Return what adapters on a module's own parameters do in it, or would do.

    A known layer whose class has another forward than PyTorch's is treated as one that reads its weight, unless that
    forward computes the same.
    """
    if isinstance(module, AdaptedLayer):
        return type(module).__mro__[1]
    kind = kind_of(module)
    if kind is None or (issubclass(kind, Called) and not kind.computes_as_plain(module)):
        return AdaptedParameters
    return kind


def swap_layer(module: nn.Module) -> None:
    """Give a module the class in which the adapters on its own parameters work."""
    swap(module, kind_in_use(module))


def swap_readers(model: nn.Module) -> None:
    """Swap every reader of an adapted weight, and swap back those whose weights are adapted no longer."""
    for _, module in named_base_modules(model):
        kind = kind_of(module)
        if kind is None:
            continue
        if any(slots_at(owner, parameter) for owner, parameter in kind.reads(module)):
            swap(module, kind)
        elif not slots_of(module):
            unswap(module)
