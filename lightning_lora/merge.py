"""Write adapters into the base's weights, for good or for a while."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_lora.adapter import Adapter
from lightning_lora.inject import remove
from lightning_lora.layers import swap_layer
from lightning_lora.layers.seam import adapted_weight, unswap
from lightning_lora.quantized import (
    check_requantizable,
    dense_weight,
    forget_quantizer,
    format_of,
    is_quantized,
    requantize,
    set_parameter,
    unpack_,
)
from lightning_lora.sharding import is_flattened, is_sharded
from lightning_lora.sites import Slot, clean, join, named_base_modules, sites, slots, slots_at, slots_of

_ROUNDING = 16  # in units of the last place, relative to the whole matrix


class _Adapted(NamedTuple):
    """A parameter with adapters on it, and all the modules that have it."""

    names: list[str]
    owners: list[nn.Module]
    parameter: str
    slots: list[Slot]
    tied_to: list[str]  # names under which others have it, without the adapters


class _Loss(NamedTuple):
    """What rounding did to one adapted weight, and what the adapters had done to it, both relative to its norm."""

    error: float
    change: float
    name: str


@torch.no_grad()
def merge_(model: nn.Module) -> nn.Module:
    """Write the adapters in use into the base, in place, and remove them all: a plain model again.

    A quantized weight is packed again in its own format, which rounds it; a warning says by how much. To merge without
    this loss call ``dequantize_`` first.

    Args:
        model: The adapted model.

    Returns:
        The same object, for chaining.

    Raises:
        ValueError: If nothing is adapted, or an adapted weight is tied to that of a layer without the adapter, is in a
            quantized format that cannot be written, or is computed by a parametrization that cannot give the merged
            one.
        RuntimeError: If the model is inside ``merged``, or its base is divided over processes.
    """
    adapted = _adapted_parameters(model)
    for one in adapted:
        if one.tied_to:
            raise ValueError(
                f"cannot merge into {one.names[0]}: it is tied to {' and '.join(one.tied_to)}, which would change with "
                "it: untie them first, or adapt both, which then share one adapter; merged(model) works as it is"
            )
    losses: list[_Loss] = []
    with ExitStack() as undo:
        for one in sorted(adapted, key=lambda one: not _computed(one)):  # those that can fail go first
            if not _in_use(one):
                continue
            if _computed(one):
                undo.callback(_load, one, _set_computed(one))
            elif format_of(getattr(one.owners[0], one.parameter)) is None:
                _write(one, getattr(one.owners[0], one.parameter))
            else:
                _put(one, _packed(one, losses))
        undo.pop_all()
    for slot in (slot for one in adapted for slot in one.slots):
        slot.written_by = slot.before = None  # the merged values stay
    remove(model)
    _warn_of(losses)
    return model


@torch.no_grad()
def dequantize_(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Turn every quantized layer into PyTorch's own, in place, with the weight that it computed with; adapters stay.

    Args:
        model: Any model, adapted or not.
        dtype: Of the new weights and of these layers' biases: that of the activations.

    Returns:
        The same object, for chaining: ``merge_(dequantize_(model, torch.bfloat16))``.

    Raises:
        RuntimeError: If the model is inside ``merged``.
    """
    check_not_merged(model, "dequantize")
    for module in model.modules():
        forget_quantizer(module)
        if any(parameter is not None and format_of(parameter) for parameter in module._parameters.values()):
            unswap(module)
            unpack_(module, dtype)
            if slots_of(module):
                swap_layer(module)
    return model


@contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """Run with merged weights in the adapted layers; on leaving, they have their own again, bit for bit.

    The plain parameters are kept aside meanwhile and never written to, so a layer that is tied to an adapted one keeps
    its weight. Training inside raises.

    Args:
        model: The adapted model.

    Raises:
        ValueError: If nothing is adapted, or an adapted weight is quantized or computed as ``merge_`` refuses it.
        RuntimeError: If the model is merged already.
    """
    losses: list[_Loss] = []
    with ExitStack() as undo:
        for one in _adapted_parameters(model):
            if _in_use(one) and _computed(one):
                undo.callback(_load, one, _set_computed(one))
            elif _in_use(one):
                plain: nn.Parameter = getattr(one.owners[0], one.parameter)
                undo.callback(_put, one, plain)
                if format_of(plain) is None:
                    weight = plain.detach().clone()
                    _write(one, weight)
                    _put(one, nn.Parameter(weight, requires_grad=False))
                else:
                    _put(one, _packed(one, losses))
            for slot in one.slots:
                undo.callback(setattr, slot, "merged", False)
                slot.merged = True
        _warn_of(losses)
        yield model


def _in_use(one: _Adapted) -> bool:
    return any(slot.in_use() for slot in one.slots)


@torch.no_grad()
def _write(one: _Adapted, weight: Tensor) -> None:
    """Put the adapted weight in the place of an ordinary one."""
    for slot in one.slots:
        for adapter in slot.in_use():
            matrix = slot.layout.matrix(weight)
            adapter(_write_matrix, matrix)
            if matrix.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
                weight.copy_(slot.layout.put(weight, matrix))


def _write_matrix(adapter: Adapter, matrix: Tensor) -> None:
    adapter.start(matrix)
    adapter.write(matrix)


def _adapted_weight(one: _Adapted) -> Tensor:
    weight = adapted_weight(one.owners[0], one.parameter)
    assert weight is not None
    return weight


def _put(one: _Adapted, parameter: nn.Parameter) -> None:
    for owner in one.owners:
        set_parameter(owner, one.parameter, parameter)


@torch.no_grad()
def _packed(one: _Adapted, losses: list[_Loss]) -> nn.Parameter:
    """Return the adapted weight in the format of the plain one, and note what packing lost."""
    owner = one.owners[0]
    plain, weight = dense_weight(owner, one.parameter), _adapted_weight(one)
    if torch.equal(weight, plain):
        return getattr(owner, one.parameter)  # type: ignore[no-any-return]
    parameter, error = requantize(owner, one.parameter, weight)
    if is_quantized(parameter):
        change = (weight.double() - plain.double()).norm() / weight.double().norm()
        losses.append(_Loss(error, change.item(), one.names[0]))
    return parameter


def _warn_of(losses: list[_Loss]) -> None:
    in_one_process = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    if losses and (in_one_process or torch.distributed.get_rank() == 0):
        error, change, name = max(losses, key=lambda loss: loss.error / loss.change)
        warnings.warn(
            f"{len(losses)} quantized weights were rounded again with the adapters in them. The worst, {name}, is "
            f"{error:.2%} off its adapted value, which the adapters had changed by {change:.2%}: to merge without this "
            "loss call dequantize_(model, dtype) first",
            stacklevel=3,
        )


def _computed(one: _Adapted) -> bool:
    return is_parametrized(one.owners[0], one.parameter)


@torch.no_grad()
def _set_computed(one: _Adapted) -> dict[str, Tensor]:
    """Set a parametrized weight by what it is computed from, and return the state of that before."""
    owner, weight = one.owners[0], _adapted_weight(one)
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
        raise ValueError(f"nothing to merge: {type(model).__name__} has no adapters: call inject or load_adapter first")
    check_not_merged(model, "merge again")
    for site in found:
        site.slot.in_use()  # refuses, before anything is written, where each example has its own
    divided = next((site.name for site in found if is_sharded(site.weight) or is_flattened(site.weight)), None)
    if divided is not None:
        raise RuntimeError(
            f"cannot merge into {divided}: each process holds a part of it: save the adapters and merge in one "
            "process, with `lightning-lora merge` or load_from_checkpoint(..., merge=True)"
        )
    holders: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for prefix, module in named_base_modules(model):
        for name, parameter in module._parameters.items():
            holders.setdefault(id(parameter), []).append((clean(join(prefix, name)), module, name))
    adapted: dict[tuple[int, str], _Adapted] = {}
    for site in found:
        slots = slots_at(site.module, site.parameter)
        if is_parametrized(site.module, site.parameter):
            adapted[id(site.module), site.parameter] = _Adapted([site.name], [site.module], site.parameter, slots, [])
            continue
        parameter = getattr(site.module, site.parameter)
        if not parameter.is_floating_point() and not is_quantized(parameter):
            raise ValueError(
                f"cannot merge into {site.name}: it is stored as {parameter.dtype}; load the base in full precision"
            )
        try:
            check_requantizable(parameter)
        except ValueError as error:
            raise ValueError(f"cannot merge into {site.name}: {error}") from None
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
    if any(slot.merged for slot in slots(model)):
        raise RuntimeError(f"cannot {action} while the adapters are merged: leave `merged(model)` first")
