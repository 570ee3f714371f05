"""Let tasks hold frozen tensors that are alike once, and part them before one of them gets others."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn

from lightning_lora.adapter import Adapter, Shared
from lightning_lora.sites import slots


def join_shared(model: nn.Module, task: str) -> None:
    """Let the adapters of a task hold what those of another task share, where the values are the same.

    Args:
        model: The adapted model.
        task: The task, which has just got its values.
    """
    held = list(_holders(model))
    theirs = {id(shared): shared for other, _, shared in held if other != task}
    for _, adapter, shared in [one for one in held if one[0] == task]:
        adapter.shared = next((other for other in theirs.values() if _alike(shared, other)), shared)


def part_shared(model: nn.Module, task: str) -> None:
    """Give a task a copy of what it holds together with other tasks.

    Args:
        model: The adapted model.
        task: The task, whose values are about to change.
    """
    held = list(_holders(model))
    theirs = {id(shared) for other, _, shared in held if other != task}
    own: dict[int, Shared] = {}
    for _, adapter, shared in [one for one in held if one[0] == task and id(one[2]) in theirs]:
        adapter.shared = own.setdefault(id(shared), copy.deepcopy(shared))


def _holders(model: nn.Module) -> Iterator[tuple[str, Adapter, Shared]]:
    for slot in slots(model):
        for task, adapter in slot.items():
            shared = adapter._modules.get("shared")
            if isinstance(adapter, Adapter) and isinstance(shared, Shared):
                yield task, adapter, shared


def _alike(one: Shared, other: Shared) -> bool:
    if type(one) is not type(other) or one.stored != other.stored:
        return False
    pairs = list(zip(one.parameters(), other.parameters(), strict=True))
    return all(
        a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and not a.is_meta and torch.equal(a, b)
        for a, b in pairs
    )
