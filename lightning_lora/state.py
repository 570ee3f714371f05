"""Which entries of a model's state dict are ours: the adapters, and what is trained in full beside them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lightning_lora.adapter import Adapter
from lightning_lora.sites import clean, join

MARK = "trained_in_full"


def mark_trained_in_full(module: nn.Module, names: Iterable[str]) -> None:
    """Note on a module that these of its own parameters and buffers are trained in full, and train them.

    The mark stays with the module through copies, pickles, moves and ``freeze()``, so that what was trained is still
    known when it is saved.

    Args:
        module: The owner.
        names: Names of its own parameters or buffers.
    """
    names = frozenset(names)
    module.__dict__[MARK] = marked(module) | names
    for name in names:
        parameter = module._parameters.get(name)
        if parameter is not None:
            parameter.requires_grad_(True)


def marked(module: nn.Module) -> frozenset[str]:
    """Return the names of a module's own entries that are trained in full."""
    return module.__dict__.get(MARK, frozenset())  # type: ignore[no-any-return]


def unmark(model: nn.Module) -> None:
    """Forget all marks."""
    for module in model.modules():
        module.__dict__.pop(MARK, None)


def own_entries(model: nn.Module) -> set[str]:
    """Return the state-dict keys of the adapters and of everything else that training changes.

    These are all parameters and buffers of adapters, what is marked as trained in full, any other parameter that
    requires a gradient now, and the buffers that the model keeps on itself.
    """
    ours: set[str] = set()
    adapter_parts = {id(part) for module in model.modules() if isinstance(module, Adapter) for part in module.modules()}
    for prefix, module in model.named_modules(remove_duplicate=False):
        in_adapter = id(module) in adapter_parts
        full = marked(module)
        for name, parameter in module._parameters.items():
            if parameter is not None and (in_adapter or parameter.requires_grad or name in full):
                ours.add(join(prefix, name))
        ours.update(join(prefix, name) for name in _buffers(module) if in_adapter or name in full or module is model)
    return ours


def trained_in_full(model: nn.Module) -> set[str]:
    """Return the clean names of our entries that are no adapter's."""
    return {clean(name) for name in own_entries(model) if "adapters" not in name.split(".")}


def base_entries(model: nn.Module) -> set[str]:
    """Return the state-dict keys of the frozen base."""
    entries: set[str] = set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        own = [name for name, parameter in module._parameters.items() if parameter is not None]
        entries.update(join(prefix, name) for name in (*own, *_buffers(module)))
    return entries - own_entries(model)


def _buffers(module: nn.Module) -> list[str]:
    """Return the names of a module's own persistent buffers."""
    transient = module._non_persistent_buffers_set
    return [name for name, buffer in module._buffers.items() if buffer is not None and name not in transient]
