"""What of a network is divided: its blocks, whose weights are gathered one at a time, but not what is trained."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_lora.sites import added_modules, sites


def kept_whole(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters that every process holds whole: the adapters', and what else is trained.

    Args:
        model: The adapted model.

    Raises:
        ValueError: If it has no adapters: then all that is trained would be whole, which divides nothing.
    """
    found = sites(model)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no adapters, and what is trained is not divided by this strategy: add "
            "LoRACallback to the Trainer's callbacks, or use strategy='fsdp' to train everything"
        )
    adapters = {parameter for site in found for parameter in site.slot.parameters()}
    return adapters | {parameter for parameter in model.parameters() if parameter.requires_grad}


def blocks_of(model: nn.Module, names: Sequence[str] | None = None) -> list[nn.Module]:
    """Return the repeated blocks of a model, outermost ones only.

    Args:
        model: The model.
        names: Names of their classes; None means every element of an ``nn.ModuleList``.

    Raises:
        ValueError: If a name is no class in the model.
    """
    added = added_modules(model)
    chosen: dict[int, nn.Module] = {}
    seen: set[str] = set()
    for module in model.modules():
        plain = {cls.__name__ for cls in type(module).__mro__}
        if names is None:
            found = list(module) if isinstance(module, nn.ModuleList) else []
        else:
            found = [module] if plain & set(names) else []
            seen |= plain & set(names)
        if id(module) not in added and id(module) not in chosen:
            chosen |= {id(block): block for block in found}
    unknown = [name for name in names or () if name not in seen]
    if unknown:
        known = sorted(
            {type(module).__name__ for module in model.modules() if next(module.children(), None) is not None}
        )
        raise ValueError(f"blocks={unknown}: no module of the model is of that class; it has {known}")
    inner = {id(part) for block in chosen.values() for part in block.modules() if part is not block}
    return [block for key, block in chosen.items() if key not in inner and any(True for _ in block.parameters())]
