"""Which entries of a model's state dict are ours: the adapters, and what is trained in full beside them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lightning_lora.sites import added_modules, clean, join

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

    These are all parameters and buffers of adapters but for shared ones that are drawn again, what is trained in full,
    the buffers that the model keeps on itself, and what modules add by ``get_extra_state``.
    """
    added = added_modules(model)
    adapters = {
        join(prefix, name)
        for prefix, module in model.named_modules(remove_duplicate=False)
        if id(module) in added and getattr(module, "stored", True)
        for name in (*module._parameters, *_buffers(module))
    }
    extra = {
        join(prefix, "_extra_state")
        for prefix, module in model.named_modules(remove_duplicate=False)
        if type(module).get_extra_state is not nn.Module.get_extra_state
    }
    return adapters | _trained_in_full(model) | set(_buffers(model)) | extra


def trained_in_full(model: nn.Module) -> set[str]:
    """Return the clean names of the base's entries that are trained in full.

    These are all that is marked so, and any other parameter of the base that requires a gradient now.
    """
    return {clean(name) for name in _trained_in_full(model)}


def _trained_in_full(model: nn.Module) -> set[str]:
    added = added_modules(model)
    found: set[str] = set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        if id(module) in added:
            continue
        full = marked(module)
        found.update(join(prefix, name) for name in _buffers(module) if name in full)
        for name, parameter in module._parameters.items():
            if parameter is not None and (parameter.requires_grad or name in full):
                found.add(join(prefix, name))
    return found


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
