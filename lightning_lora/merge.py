"""Write adapters into the base's weights, for good or for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_lora.inject import remove
from lightning_lora.sites import Site, Slot, clean, join, sites


@torch.no_grad()
def merge_(model: nn.Module) -> nn.Module:
    """Write the adapters in use into the base, in place, and remove them all: a plain model again.

    Args:
        model: The adapted model.

    Returns:
        The same object, for chaining.

    Raises:
        ValueError: If nothing is adapted, or an adapted weight is tied to another module's or is quantized.
        RuntimeError: If the model is inside ``merged``.
    """
    for site, weight in _merged_weights(model):
        getattr(site.module, site.parameter).copy_(weight)
    remove(model)
    return model


@contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """Run with the adapters written into the base; on leaving, every weight is restored bit for bit.

    The plain weights are kept aside meanwhile, never recomputed by subtraction. Training inside raises.

    Args:
        model: The adapted model.

    Raises:
        ValueError: As ``merge_``.
        RuntimeError: If the model is merged already.
    """
    kept: list[tuple[Site, Slot, Tensor]] = []
    try:
        with torch.no_grad():
            for site, weight in _merged_weights(model):
                parameter = getattr(site.module, site.parameter)
                kept.append((site, site.slot, parameter.detach().clone()))
                parameter.copy_(weight)
                site.slot.merged = True
        yield model
    finally:
        with torch.no_grad():
            for site, slot, plain in kept:  # the slot is kept aside too: the site has lost it if it was removed inside
                getattr(site.module, site.parameter).copy_(plain)
                slot.merged = False


def _merged_weights(model: nn.Module) -> Iterator[tuple[Site, Tensor]]:
    """Check every site, then yield each with its merged weight, one at a time."""
    adapted = sites(model)
    if not adapted:
        raise ValueError(f"nothing to merge: {type(model).__name__} has no adapters")
    check_not_merged(model, "merge again")
    names: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            names.setdefault(id(parameter), []).append(clean(join(prefix, name)))
    for site in adapted:
        parameter = getattr(site.module, site.parameter)
        if len(names[id(parameter)]) > 1:
            raise ValueError(
                f"cannot merge into {site.name}: it is tied ({' = '.join(names[id(parameter)])}), so the other would "
                "change with it; untie them, or keep the adapter unmerged"
            )
        if not parameter.is_floating_point():
            raise ValueError(
                f"cannot merge into {site.name}: it is stored as {parameter.dtype}; load the base in full precision"
            )
    for site in adapted:
        weight = getattr(site.module, site.parameter).detach()
        for adapter in site.slot.in_use():
            weight = adapter.adapted(weight)
        yield site, weight


def check_not_merged(model: nn.Module, action: str) -> None:
    """Raise ``RuntimeError`` if the model's adapters are merged at the moment.

    Args:
        model: The adapted model.
        action: What was about to happen, for the message.
    """
    if any(site.slot.merged for site in sites(model)):
        raise RuntimeError(f"cannot {action} while the adapters are merged: leave `merged(model)` first")
