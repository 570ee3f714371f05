"""One adapter in several places: what LoRA-drop makes of those that matter little."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from lightning_lora.importance import alike
from lightning_lora.inject import remove
from lightning_lora.methods.lora_drop import LoRADrop
from lightning_lora.quantized import dense_weight
from lightning_lora.sites import sites


def share(model: nn.Module, kept: Collection[str], task: str = "default") -> None:
    """Leave adapters of their own to some matrices; the others of each group of like ones share one, or have none.

    What becomes of the others, and whether adapters start anew, is in the method that they were made by. The shared
    adapter is that of the first of them, in the order of the model, and the same module in all their places. An
    optimizer that was built before holds parameters that the model no longer has: build it anew.

    Args:
        model: A model with adapters by LoRADrop.
        kept: Site names, as ``select`` returns them.
        task: The adapters' task.

    Raises:
        ValueError: If a name is no site's, or the adapters are of another method.
    """
    found = {site.name: site for site in sites(model, task)}
    unknown = [name for name in kept if name not in found]
    if unknown:
        raise ValueError(f"kept={unknown[0]!r}: no site has this name; the model's are {', '.join(found)}")
    method = next((site.adapter(task).method for site in found.values()), None)
    if not isinstance(method, LoRADrop):
        raise ValueError(
            f"task={task!r}: its method is {type(method).__name__}, which does not say what the others get: "
            "inject(model, LoRADrop(rest='shared')) first"
        )
    groups = [[name for name in group if name not in kept] for group in alike(model, task)]
    firsts = {name: group[0] for group in groups for name in group}
    fresh = [*(kept if method.reinit else ()), *(set(firsts.values()) if method.rest == "shared" else ())]
    for name in fresh:
        site, adapter = found[name], found[name].adapter(task)
        adapter.reset_parameters()
        if adapter.waits_for_weight:  # now, so that a checkpoint written before the next batch has its values
            adapter.start(site.slot.layout.matrix(dense_weight(site.module, site.parameter)))
    if method.rest != "none":
        tie(model, firsts, task)
    elif firsts:
        remove(model, task, firsts)


def tie(model: nn.Module, firsts: Mapping[str, str], task: str) -> None:
    """Have sites share the adapters of others, which are frozen where the method says so.

    Args:
        model: The adapted model.
        firsts: Name of the site whose adapter it is, by the name of each site that shares it, that one's own too.
        task: The adapters' task.
    """
    found = {site.name: site for site in sites(model, task)}
    for name, first in firsts.items():
        adapter = found[first].adapter(task)
        adapter.is_shared = True
        found[name].slot[task] = adapter.requires_grad_(False) if adapter.method.freezes_shared else adapter


def shares(model: nn.Module, task: str) -> dict[str, str]:
    """Return what ``tie`` was given: the site whose adapter it is, by the name of each site that shares it.

    Args:
        model: The adapted model.
        task: The adapters' task.
    """
    first: dict[int, str] = {}
    shared = [site for site in sites(model, task) if site.adapter(task).is_shared]
    return {site.name: first.setdefault(id(site.adapter(task)), site.name) for site in shared}
