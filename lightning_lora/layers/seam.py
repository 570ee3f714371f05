"""The class swap: a subclass of a layer's own class, made once, in which adapters do their work.

Setting a module's ``__class__`` to it changes nothing else: names in the state dict, ``isinstance``, ``module.weight``,
hooks and references stay.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.adapter import Adapter
from lightning_lora.layout import Layout
from lightning_lora.quantized import dense_weight
from lightning_lora.sites import Slot, slots_at, slots_of


class AdaptedLayer(nn.Module):
    """Mixin of every class that takes a plain layer's place.

    Attributes:
        plain: The class that the module had, and gets back.
        adapts: The classes, each with all that derive from it, that this kind is for.
        linear: Whether ``"all-linear"`` means this kind.
    """

    plain: ClassVar[type[nn.Module]]
    adapts: ClassVar[tuple[type[nn.Module], ...]] = ()
    linear: ClassVar[bool] = False

    @classmethod
    def fits(cls, plain: type[nn.Module]) -> bool:
        """Tell whether layers of a class are of this kind."""
        return issubclass(plain, cls.adapts)

    @staticmethod
    def matrices(module: nn.Module) -> list[str]:
        """Return the names of the module's own parameters that can be adapted."""
        return []

    @staticmethod
    def layout(module: nn.Module, parameter: str) -> Layout:
        """Return how such a parameter lies as a matrix."""
        return Layout()

    @staticmethod
    def size(module: nn.Module, parameter: str) -> tuple[int, ...]:
        """Return the size that such a parameter has, or would have if it were not packed."""
        return tuple(getattr(module, parameter).shape)

    @staticmethod
    def reads(module: nn.Module) -> list[tuple[nn.Module, str]]:
        """Return the (owner, parameter) pairs that the module's forward reads instead of calling the owner."""
        return []

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy by the plain class, because the adapted one has no importable name."""
        reduced: Any = super().__reduce_ex__(protocol)
        kind = type(self).__mro__[1]
        return (_new_adapted, (kind, type(self).plain, *reduced[1][1:]), *reduced[2:])


class Called(AdaptedLayer):
    """A layer that its owner runs: each adapter in use adds its step to the output."""

    @classmethod
    def computes_as_plain(cls, module: nn.Module) -> bool:
        """Tell whether a layer's class has the forward that the step is made for, or one that computes the same."""
        forward = plain_class(module).forward
        return any(forward is plain.forward for plain in cls.adapts)

    @staticmethod
    def step(layer: nn.Module, output: Tensor, x: Tensor, up: Tensor, down: Tensor, scaling: float) -> Tensor:
        """Return the output plus what a low-rank change to the weight adds to it.

        Args:
            layer: The layer.
            output: What it gave, or those of its units that are changed.
            x: What it was given, after the adapter's dropout.
            up: The factor (out, r), or a stack of them.
            down: The factor (r, in), likewise.
            scaling: The factor on their product.
        """
        raise NotImplementedError

    @staticmethod
    def add(layer: Called, adapter: Adapter, output: Tensor, input: Tensor) -> Tensor:
        """Return the output plus what an adapter adds to it whose whole change is low-rank.

        Args:
            layer: The layer.
            adapter: The adapter.
            output: What the layer gave, or those of its units that are changed.
            input: What the layer was given.
        """
        return layer.step(layer, output, adapter.dropped(input), *adapter.factors(), adapter.scaling)

    @staticmethod
    def product(layer: nn.Module, x: Tensor, weight: Tensor, size: torch.Size) -> Tensor:
        """Return what the layer would give with another weight and without a bias.

        Args:
            layer: The layer.
            x: The input.
            weight: In the place of its own, or of some rows of it.
            size: The size of its output, which a call can choose for transposed convolutions.
        """
        raise NotImplementedError

    @staticmethod
    def along_units(layer: nn.Module, values: Tensor) -> Tensor:
        """Return one value for each output unit in a shape that fits the layer's output."""
        return values

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the plain layer, then add each adapter in use."""
        output: Tensor = super().forward(*args, **kwargs)
        return self.changed(output, args[0] if args else next(iter(kwargs.values())))

    def changed(self, output: Tensor, input: Tensor) -> Tensor:
        """Return an output of the plain layer as all adapters in use change it.

        Args:
            output: The output.
            input: What the layer was given.
        """
        for slot in slots_of(self).values():
            change: Callable[[Tensor, Tensor], Tensor]
            if slot.per_example is not None:
                change = partial(slot.per_example, self, slot)
            elif adapters := slot.in_use():
                change = partial(self.changed_by, slot, adapters)
            else:
                continue
            if slot.layout.rows is None:
                output = change(output, input)
            else:
                before, part, after = output.tensor_split(slot.layout.rows, -1)
                output = torch.cat([before, change(part, input), after], -1)
        return output

    def changed_by(self, slot: Slot, adapters: list[Adapter], output: Tensor, input: Tensor) -> Tensor:
        """Return an output as adapters of one slot change it.

        Args:
            slot: Where they sit.
            adapters: They, in the order in which their changes are added.
            output: What the plain layer gave, or those of its units that the slot is for.
            input: What the layer was given.
        """
        as_laid_out = type(self).layout(self, slot.parameter).looked_up == slot.layout.looked_up
        if all(adapter.low_rank and not adapter.needs_weight for adapter in adapters):
            if len(adapters) > 1 and not slot.layout.looked_up and not any(adapter.drops() for adapter in adapters):
                return self.step(self, output, input, *_side_by_side(self, slot, adapters))
            for adapter in adapters:
                output = adapter(_low_rank, self, slot, output, input)
        elif len(adapters) == 1 and adapters[0].low_rank and as_laid_out:
            output = adapters[0](_with_gain, self, slot, output, input)
        else:  # each changes what those before it made of the weight
            weight = slot.layout.matrix(dense_weight(self, slot.parameter))
            for adapter in adapters:
                output, weight = adapter(_dense, self, slot, output, input, weight)
        return output


def started_factors(adapter: Adapter, layer: nn.Module, slot: Slot) -> tuple[Tensor, Tensor]:
    """Return an adapter's factors, after what it takes from the weight; call it through the adapter.

    Args:
        adapter: The adapter.
        layer: The layer that it sits on.
        slot: Where in it.
    """
    if adapter.waits_for_weight:
        adapter.start(slot.layout.matrix(dense_weight(layer, slot.parameter)))
    return adapter.factors()


def _side_by_side(layer: Called, slot: Slot, adapters: list[Adapter]) -> tuple[Tensor, Tensor, float]:
    """Return the factors, and the factor on their product, of one adapter that changes what several change."""
    scaling = adapters[0].scaling
    ups, downs = zip(*(adapter(started_factors, layer, slot) for adapter in adapters), strict=True)
    scaled = [
        up if adapter.scaling == scaling else up * (adapter.scaling / scaling)
        for up, adapter in zip(ups, adapters, strict=True)
    ]
    return torch.cat(scaled, -1), torch.cat(downs, -2), scaling


def _low_rank(adapter: Adapter, layer: Called, slot: Slot, output: Tensor, input: Tensor) -> Tensor:
    if adapter.waits_for_weight:
        adapter.start(slot.layout.matrix(dense_weight(layer, slot.parameter)))
    return layer.add(layer, adapter, output, input)


def _with_gain(adapter: Adapter, layer: Called, slot: Slot, output: Tensor, input: Tensor) -> Tensor:
    """Return ``y + (gain - 1) * W x + gain * scaling * up @ down @ x``, which is ``y`` itself where the gain is 1."""
    matrix = slot.layout.matrix(dense_weight(layer, slot.parameter))
    adapter.start(matrix)
    x, (up, down), gain = adapter.dropped(input), adapter.factors(), adapter.gain(matrix)
    if gain is not None:
        if x is input or not adapter.drops_for_gain():
            bias: Tensor | None = getattr(layer, "bias", None)
            rows = slice(*slot.layout.rows) if slot.layout.rows is not None else slice(None)
            product = output if bias is None else output - layer.along_units(layer, bias[rows]).to(output.dtype)
        else:
            product = layer.product(layer, x, _as_weight(layer, slot, matrix), output.shape)
        output = output + layer.along_units(layer, slot.layout.per_unit(gain) - 1).to(output.dtype) * product
        up, down = (up, down * gain) if slot.layout.looked_up else (up * gain, down)
    return layer.step(layer, output, x, up, down, adapter.scaling) if down.shape[-2] else output


def _dense(
    adapter: Adapter, layer: Called, slot: Slot, output: Tensor, input: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the output, and the matrix, with a change that is not low-rank in them."""
    adapter.start(weight)
    x, change = adapter.dropped(input), adapter.change(weight)
    if adapter.drops() and not adapter.drops_for_gain() and (gain := adapter.gain(weight)) is not None:
        branch = gain * adapter.delta()
        kept = layer.product(layer, input, _as_weight(layer, slot, change - branch), output.shape)
        output, change = output + kept.to(output.dtype), branch
    output = output + layer.product(layer, x, _as_weight(layer, slot, change), output.shape).to(output.dtype)
    return output, adapter.adapted(weight)


def _as_weight(layer: Called, slot: Slot, matrix: Tensor) -> Tensor:
    """Return a matrix in the shape of the layer's weight, or of the rows of it that a slot is for."""
    if slot.layout.rows is not None:
        return matrix.mT if slot.layout.transposed else matrix
    return slot.layout.put(matrix.new_empty(layer.size(layer, slot.parameter)), matrix)


class Reader(AdaptedLayer):
    """A layer whose forward reads weights, its own or of others: the adapted ones stand in for them meanwhile.

    A stand-in is an entry of the owner's instance dictionary, where Python looks before ``nn.Module.__getattr__``; the
    registered parameters never change.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the plain forward on adapted weights."""
        shadowed: list[tuple[nn.Module, str]] = []
        try:
            for owner, parameter in self.reads(self):
                weight = adapted_weight(owner, parameter)
                if weight is None:
                    continue
                owner.__dict__[parameter] = weight
                shadowed.append((owner, parameter))
                for slot in slots_at(owner, parameter):
                    slot.shadowed = True
            return super().forward(*args, **kwargs)
        finally:
            for owner, parameter in shadowed:
                del owner.__dict__[parameter]
                for slot in slots_at(owner, parameter):
                    slot.shadowed = False


def adapted_weight(owner: nn.Module, parameter: str) -> Tensor | None:
    """Return a weight, unpacked if need be, with all adapters in use in it, or None where there is none.

    Args:
        owner: The module that has the parameter.
        parameter: Its name.
    """
    in_use = [(slot, adapter) for slot in slots_at(owner, parameter) for adapter in slot.in_use()]
    if not in_use:
        return None
    weight = dense_weight(owner, parameter)
    for slot, adapter in in_use:
        weight = slot.layout.put(weight, adapter(_adapted, slot.layout.matrix(weight)))
    return weight


def _adapted(adapter: Adapter, matrix: Tensor) -> Tensor:
    adapter.start(matrix)
    return adapter.adapted(matrix)


_classes: dict[tuple[type[AdaptedLayer], type[nn.Module]], type[nn.Module]] = {}


def adapted_class(kind: type[AdaptedLayer], plain: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of a plain layer class that adapters work in, one for all its instances.

    Args:
        kind: What adapters do in it.
        plain: The class of the layer.
    """
    if (kind, plain) not in _classes:
        namespace = {"plain": plain, "__module__": plain.__module__, "__doc__": plain.__doc__}
        _classes[kind, plain] = type(f"Adapted{plain.__name__}", (kind, plain), namespace)
    return _classes[kind, plain]


def _new_adapted(kind: type[AdaptedLayer], plain: type[nn.Module], *args: Any) -> nn.Module:
    cls = adapted_class(kind, plain)
    return cls.__new__(cls, *args)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module has without adapters."""
    return type(module).plain if isinstance(module, AdaptedLayer) else type(module)


def swap(module: nn.Module, kind: type[AdaptedLayer]) -> None:
    """Give a module its adapted class; once is enough.

    Args:
        module: The layer.
        kind: What adapters do in it.
    """
    if not isinstance(module, AdaptedLayer):
        module.__class__ = adapted_class(kind, type(module))
        _rebind_hooked_forward(module)


def unswap(module: nn.Module) -> None:
    """Give a module its own class back."""
    if isinstance(module, AdaptedLayer):
        module.__class__ = type(module).plain  # type: ignore[assignment]
        _rebind_hooked_forward(module)


def replaced_forward(module: nn.Module) -> bool:
    """Tell whether a module's own instance has another forward, which a class swap does not reach.

    Those of accelerate's hooks are no such: they run the forward that they keep as ``_old_forward``.
    """
    return "forward" in module.__dict__ and "_old_forward" not in module.__dict__


def _rebind_hooked_forward(module: nn.Module) -> None:
    """Let accelerate's hooks run the forward of the class that the module has now."""
    kept = module.__dict__.get("_old_forward")
    if isinstance(kept, MethodType) and kept.__self__ is module:
        module.__dict__["_old_forward"] = MethodType(type(module).forward, module)
