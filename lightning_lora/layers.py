"""What adapters do on each kind of layer, and the class swap that puts them there.

`adapted_class` derives, once per base class, a subclass that adds the adapters' work; setting a module's ``__class__``
to it changes nothing else: names in the state dict, ``isinstance``, ``module.weight``, hooks and references stay.

There are two kinds. A *called* layer is run by its owner, so the low-rank step is added to its output. A *reader* looks
at the weights of its children without calling them (``nn.MultiheadAttention`` and the fused inference path of
``nn.TransformerEncoderLayer``), so during its forward the adapted weights stand in for the plain ones.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.adapter import Adapter
from lightning_lora.functional import low_rank_step
from lightning_lora.sites import Slot, slot_of, slots_of


class AdaptedLayer(nn.Module):
    """Mixin of every class that takes a plain layer's place.

    Attributes:
        plain: The class that the module had, and gets back.
        adapts: The base classes that this kind is for.
    """

    plain: ClassVar[type[nn.Module]]
    adapts: ClassVar[type[nn.Module]]

    @staticmethod
    def matrices(module: nn.Module) -> list[str]:
        """Return the names of the module's own parameters that can be adapted."""
        return []

    @staticmethod
    def shape(module: nn.Module, parameter: str) -> tuple[int, int]:
        """Return (out, in) of such a parameter."""
        out_features, in_features = getattr(module, parameter).shape
        return out_features, in_features

    @staticmethod
    def reads(module: nn.Module) -> list[tuple[nn.Module, str]]:
        """Return the (owner, parameter) pairs that the module's forward reads instead of calling the owner."""
        return []

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy by the plain class, because the adapted one has no importable name."""
        reduced: Any = super().__reduce_ex__(protocol)
        return (_new_adapted, (type(self).plain, *reduced[1][1:]), *reduced[2:])


class AdaptedLinear(AdaptedLayer):
    """``nn.Linear`` plus the low-rank step on its input."""

    adapts = nn.Linear

    @staticmethod
    def matrices(module: nn.Module) -> list[str]:
        """Return the weight's name."""
        return ["weight"]

    @staticmethod
    def shape(module: nn.Module, parameter: str) -> tuple[int, int]:
        """Return (out_features, in_features), which hold for packed weights too."""
        return module.out_features, module.in_features  # type: ignore[return-value]

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the base layer, then add each adapter in use."""
        output: Tensor = super().forward(input, *args, **kwargs)
        for adapter in slot_of(self, "weight").in_use():  # type: ignore[union-attr]
            output = adapter(_linear_step, output, input)
        return output


def _linear_step(adapter: Adapter, output: Tensor, input: Tensor) -> Tensor:
    up, down = adapter.factors()
    return low_rank_step(output, adapter.dropped(input), up, down, adapter.scaling)


class Reader(AdaptedLayer):
    """A layer whose forward reads weights of others: they are shadowed by the adapted ones meanwhile.

    The shadow is an entry of the owner's instance dictionary, where Python looks before ``nn.Module.__getattr__``;
    the registered parameters never change.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the plain forward on adapted weights."""
        shadowed: list[tuple[nn.Module, str, Slot]] = []
        try:
            for owner, parameter in self.reads(self):
                slot = slot_of(owner, parameter)
                adapters = slot.in_use() if slot is not None else []
                if slot is None or not adapters:
                    continue
                weight = getattr(owner, parameter)
                for adapter in adapters:
                    weight = adapter(Adapter.adapted, weight)
                owner.__dict__[parameter] = weight
                slot.shadowed = True
                shadowed.append((owner, parameter, slot))
            return super().forward(*args, **kwargs)
        finally:
            for owner, parameter, slot in shadowed:
                del owner.__dict__[parameter]
                slot.shadowed = False


class AdaptedMultiheadAttention(Reader):
    """``nn.MultiheadAttention``: reads its own input projections and the weight of ``out_proj``."""

    adapts = nn.MultiheadAttention

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

    adapts = nn.TransformerEncoderLayer

    @staticmethod
    def reads(module: nn.Module) -> list[tuple[nn.Module, str]]:
        """Return what the attention reads, and the weights of the two linear layers.

        A subclass that has other children in their places has a forward of its own, which calls them.
        """
        attention = getattr(module, "self_attn", None)
        found = AdaptedMultiheadAttention.reads(attention) if isinstance(attention, nn.MultiheadAttention) else []
        linears = [getattr(module, name, None) for name in ("linear1", "linear2")]
        return found + [(linear, "weight") for linear in linears if isinstance(linear, nn.Linear)]


class AdaptedTransformerEncoder(AdaptedLayer):
    """``nn.TransformerEncoder``: packs a padded batch into nested tensors, which only the fused path can compute.

    It decides by asking whether the weights of its first layer need a gradient; those of all adapters have a say too.
    """

    adapts = nn.TransformerEncoder

    @staticmethod
    def reads(module: nn.Module) -> list[tuple[nn.Module, str]]:
        """Return what the layers of PyTorch's own kind read."""
        layers = [layer for layer in getattr(module, "layers", ()) if isinstance(layer, nn.TransformerEncoderLayer)]
        return [pair for layer in layers for pair in AdaptedTransformerEncoderLayer.reads(layer)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the plain forward, without nested tensors where an adapter in use needs a gradient."""
        nested = getattr(self, "use_nested_tensor", False)
        if self.training or not nested or not torch.is_grad_enabled() or not self._needs_gradient():
            return super().forward(*args, **kwargs)
        self.use_nested_tensor = False
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.use_nested_tensor = nested

    def _needs_gradient(self) -> bool:
        slots = [slot_of(owner, parameter) for owner, parameter in self.reads(self)]
        adapters = [adapter for slot in slots if slot is not None for adapter in slot.in_use()]
        return any(parameter.requires_grad for adapter in adapters for parameter in adapter.parameters())


KINDS: tuple[type[AdaptedLayer], ...] = (
    AdaptedLinear,
    AdaptedMultiheadAttention,
    AdaptedTransformerEncoderLayer,
    AdaptedTransformerEncoder,
)


def kind_of(module: nn.Module) -> type[AdaptedLayer] | None:
    """Return how a module is adapted, or None if it cannot be."""
    return next((kind for kind in KINDS if isinstance(module, kind.adapts)), None)


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def adapted_class(plain: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of a plain layer class that adapters work in, one for all its instances.

    Args:
        plain: The class of the layer.

    Raises:
        ValueError: If no kind of layer fits.
    """
    kind = next((kind for kind in KINDS if issubclass(plain, kind.adapts)), None)
    if kind is None:
        raise ValueError(f"{plain.__name__} cannot be adapted")
    if plain not in _classes:
        namespace = {"plain": plain, "__module__": plain.__module__, "__doc__": plain.__doc__}
        _classes[plain] = type(f"Adapted{plain.__name__}", (kind, plain), namespace)
    return _classes[plain]


def _new_adapted(plain: type[nn.Module], *args: Any) -> nn.Module:
    cls = adapted_class(plain)
    return cls.__new__(cls, *args)


def swap(module: nn.Module) -> None:
    """Give a module its adapted class; once is enough."""
    if not isinstance(module, AdaptedLayer):
        module.__class__ = adapted_class(type(module))


def unswap(module: nn.Module) -> None:
    """Give a module its own class back."""
    if isinstance(module, AdaptedLayer):
        module.__class__ = type(module).plain  # type: ignore[assignment]


def swap_readers(model: nn.Module) -> None:
    """Swap every reader of an adapted weight, and swap back those whose weights are adapted no longer."""
    for module in model.modules():
        kind = kind_of(module)
        if kind is None:
            continue
        reads_adapted = any(slot_of(owner, parameter) is not None for owner, parameter in kind.reads(module))
        if reads_adapted:
            swap(module)
        elif not slots_of(module):
            unswap(module)
