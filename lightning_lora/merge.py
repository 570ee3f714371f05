"""Write adapters into the base's weights, for good or for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_lora.inject import remove
from lightning_lora.layers.seam import adapted_weight
from lightning_lora.sites import Slot, clean, join, sites, slots_at

_ROUNDING = 16  # in units of the last place, relative to the whole matrix


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
        ValueError: If nothing is adapted, or an adapted weight is tied to that of a layer without the adapter, is
            quantized, or is computed by a parametrization that cannot give the merged one.
        RuntimeError: If the model is inside ``merged``.
    """
    adapted = _adapted_parameters(model)
    for one in adapted:
        if one.tied_to:
            raise ValueError(
                f"cannot merge into {one.names[0]}: it is tied to {' and '.join(one.tied_to)}, which would change with "
                "it: untie them first, or adapt both, which then share one adapter; merged(model) works as it is"
            )
    with ExitStack() as undo:
        for one in sorted(adapted, key=lambda one: not _computed(one)):  # those that can fail go first
            weight = adapted_weight(one.owners[0], one.parameter)
            if weight is None:
                continue
            if _computed(one):
                undo.callback(_load, one, _set_computed(one, weight))
            else:
                getattr(one.owners[0], one.parameter).copy_(weight)
        undo.pop_all()
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
        ValueError: If nothing is adapted, or an adapted weight is quantized, or computed as for ``merge_``.
        RuntimeError: If the model is merged already.
    """
    with ExitStack() as undo:
        for one in _adapted_parameters(model):
            with torch.no_grad():
                weight = adapted_weight(one.owners[0], one.parameter)
            if weight is not None and _computed(one):
                undo.callback(_load, one, _set_computed(one, weight))
            elif weight is not None:
                undo.callback(_put, one, getattr(one.owners[0], one.parameter))
                _put(one, nn.Parameter(weight, requires_grad=False))
            for slot in one.slots:
                undo.callback(setattr, slot, "merged", False)
                slot.merged = True
        yield model


def _put(one: _Adapted, parameter: nn.Parameter) -> None:
    for owner in one.owners:
        owner._parameters[one.parameter] = parameter


def _computed(one: _Adapted) -> bool:
    return is_parametrized(one.owners[0], one.parameter)


@torch.no_grad()
def _set_computed(one: _Adapted, weight: Tensor) -> dict[str, Tensor]:
    """Set a parametrized weight by what it is computed from, and return the state of that before."""
    owner = one.owners[0]
    before = {
        name: tensor.clone()
        for name, tensor in owner.parametrizations[one.parameter].state_dict().items()  # type: ignore[index, union-attr]
    }
    kinds = ", ".join(type(p).__name__ for p in owner.parametrizations[one.parameter])  # type: ignore[index]
    try:
        setattr(owner, one.parameter, weight)
        error = float((getattr(owner, one.parameter) - weight).norm() / weight.norm())
    except (RuntimeError, NotImplementedError, ValueError):
        error = float("inf")
    if not error <= _ROUNDING * torch.finfo(weight.dtype).eps:
        _load(one, before)
        raise ValueError(
            f"cannot merge into {one.names[0]}: it is computed by {kinds}, which cannot give the merged weight: call "
            f"torch.nn.utils.parametrize.remove_parametrizations(layer, {one.parameter!r}) before the adapters are "
            "injected, or keep the adapter unmerged"
        )
    return before


def _load(one: _Adapted, state: dict[str, Tensor]) -> None:
    one.owners[0].parametrizations[one.parameter].load_state_dict(state)  # type: ignore[index, union-attr]


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
        slots = slots_at(site.module, site.parameter)
        if is_parametrized(site.module, site.parameter):
            adapted[id(site.module), site.parameter] = _Adapted([site.name], [site.module], site.parameter, slots, [])
            continue
        parameter = getattr(site.module, site.parameter)
        if not parameter.is_floating_point():
            raise ValueError(
                f"cannot merge into {site.name}: it is stored as {parameter.dtype}; load the base in full precision"
            )
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
