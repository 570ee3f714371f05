"""Write adapters into the base's weights, for good or for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from lightning_lora.inject import remove
from lightning_lora.layers.seam import adapted_weight
from lightning_lora.sites import Slot, clean, join, sites, slots_at


class _Adapted(NamedTuple):
    """A parameter with adapters on it, and all the modules that have it."""

    names: list[str]
    owners: list[nn.Module]
    parameter: str
    slots: list[Slot]
    tied_to: list[str]  # names under which others have it, without the adapters


@torch.no_grad()
def merge_(model: nn.Module) -> nn.Module:
    """Write the adapters in use into the base, in place, and remove them all: a plain model again.

    Args:
        model: The adapted model.

    Returns:
        The same object, for chaining.

    Raises:
        ValueError: If nothing is adapted, or an adapted weight is tied to that of a layer without the adapter, or is
            quantized.
        RuntimeError: If the model is inside ``merged``.
    """
    adapted = _adapted_parameters(model)
    for one in adapted:
        if one.tied_to:
            raise ValueError(
                f"cannot merge into {one.names[0]}: it is tied to {' and '.join(one.tied_to)}, which would change with "
                "it: untie them first, or adapt both, which then share one adapter; merged(model) works as it is"
            )
    for one in adapted:
        weight = adapted_weight(one.owners[0], one.parameter)
        if weight is not None:
            getattr(one.owners[0], one.parameter).copy_(weight)
    remove(model)
    return model


@contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """Run with merged weights in the adapted layers; on leaving, they have their own again, bit for bit.

    The plain parameters are kept aside meanwhile and never written to, so a layer that is tied to an adapted one keeps
    its weight. Training inside raises.

    Args:
        model: The adapted model.

    Raises:
        ValueError: If nothing is adapted, or an adapted weight is quantized.
        RuntimeError: If the model is merged already.
    """
    kept: list[tuple[_Adapted, nn.Parameter]] = []
    try:
        for one in _adapted_parameters(model):
            plain: nn.Parameter = getattr(one.owners[0], one.parameter)
            with torch.no_grad():
                weight = adapted_weight(one.owners[0], one.parameter)
            kept.append((one, plain))
            _put(one, plain if weight is None else nn.Parameter(weight, requires_grad=False), merged=True)
        yield model
    finally:
        for one, plain in kept:
            _put(one, plain, merged=False)


def _put(one: _Adapted, parameter: nn.Parameter, merged: bool) -> None:
    for owner in one.owners:
        owner._parameters[one.parameter] = parameter
    for slot in one.slots:
        slot.merged = merged


def _adapted_parameters(model: nn.Module) -> list[_Adapted]:
    """Check that a model's adapters can be merged, and return the parameters that they sit on."""
    found = sites(model)
    if not found:
        raise ValueError(f"nothing to merge: {type(model).__name__} has no adapters")
    check_not_merged(model, "merge again")
    holders: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            holders.setdefault(id(parameter), []).append((clean(join(prefix, name)), module, name))
    adapted: dict[tuple[int, str], _Adapted] = {}
    for site in found:
        parameter = getattr(site.module, site.parameter)
        if not parameter.is_floating_point():
            raise ValueError(
                f"cannot merge into {site.name}: it is stored as {parameter.dtype}; load the base in full precision"
            )
        slots = slots_at(site.module, site.parameter)
        one = _Adapted([], [], site.parameter, slots, [])
        for name, module, own_name in holders[id(parameter)]:
            if own_name == site.parameter and slots_at(module, own_name) == slots:
                one.names.append(name)
                one.owners.append(module)
            else:
                one.tied_to.append(name)
        adapted[id(site.module), site.parameter] = one
    return list(adapted.values())


def check_not_merged(model: nn.Module, action: str) -> None:
    """Raise ``RuntimeError`` if the model's adapters are merged at the moment.

    Args:
        model: The adapted model.
        action: What was about to happen, for the message.
    """
    if any(site.slot.merged for site in sites(model)):
        raise RuntimeError(f"cannot {action} while the adapters are merged: leave `merged(model)` first")
