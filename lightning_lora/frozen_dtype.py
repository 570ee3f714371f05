"""Frozen weights stored in the dtype that autocast computes in, so that it need not cast them in each step."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from lightning_lora.adapter import Adapter
from lightning_lora.fingerprint import note_base_weights
from lightning_lora.layers import kind_of
from lightning_lora.layers.linear import AdaptedLinear
from lightning_lora.layers.seam import replaced_forward
from lightning_lora.sites import Slot, sites, slots_of

_HALF = (torch.bfloat16, torch.float16)


def store_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Store frozen fp32 weights of linear layers in half precision, in place.

    Under autocast of this dtype each product is the same bit for bit. Left alone are biases, trained and tied weights,
    those that something else reads or computes, those on the meta device, and those that their adapters need in full.

    Args:
        model: The adapted model; its forward has to run under autocast from now on.
        dtype: ``torch.bfloat16`` or ``torch.float16``.

    Raises:
        ValueError: If it is another one.
    """
    if dtype not in _HALF:
        raise ValueError(
            f"frozen_dtype={dtype}: must be the dtype that autocast computes in, torch.bfloat16 or torch.float16"
        )
    modules = list(model.modules())
    holders = Counter(_memory(p) for module in modules for p in module._parameters.values() if p is not None)
    read = {(id(owner), name) for module in modules for owner, name in _reads(module)}
    stored = []
    for module in modules:
        weight = _multiplied_by(module)
        if weight is not None and holders[_memory(weight)] == 1 and (id(module), "weight") not in read:
            stored.append((module, weight))
    if dtype != torch.bfloat16:  # to which fingerprints round, so that these are the same after it
        changed = {id(module) for module, _ in stored}
        note_base_weights([site for site in sites(model) if id(site.module) in changed])
    for _, weight in stored:
        weight.data = weight.data.to(dtype)


def _memory(tensor: Tensor) -> int:
    """Return what is the same for tensors that lie in the same memory."""
    known = type(tensor) is nn.Parameter and not tensor.is_meta
    return (tensor.untyped_storage().data_ptr() if known else 0) or id(tensor)


def _reads(module: nn.Module) -> list[tuple[nn.Module, str]]:
    kind = kind_of(module)
    return [] if kind is None else kind.reads(module)


def _multiplied_by(module: nn.Module) -> nn.Parameter | None:
    """Return the frozen fp32 weight of a layer that does nothing but multiply by it, unless its adapters need it so."""
    kind, weight = kind_of(module), module._parameters.get("weight")
    if (
        type(weight) is not nn.Parameter
        or weight.dtype != torch.float32
        or weight.is_meta
        or weight.requires_grad
        or kind is None
        or not issubclass(kind, AdaptedLinear)
        or kind.multiplies_by(module) is None
        or replaced_forward(module)
    ):
        return None
    return None if any(map(_needs_weight, slots_of(module).values())) else weight


def _needs_weight(slot: Slot) -> bool:
    adapters: list[Adapter] = list(slot.values())  # type: ignore[arg-type]
    return slot.merged or any(a.needs_weight or a.waits_for_weight or a.method.writes_to_base for a in adapters)
