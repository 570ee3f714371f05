"""Which entries of a model's state dict are ours: the adapters, and what is trained in full beside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from lightning_lora.adapter import Shared
from lightning_lora.sites import clean, join, named_base_modules, slots_of

MARK = "trained_in_full"
_EXTRA = "_extra_state"


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


def mark_whole(module: nn.Module) -> None:
    """Note that everything in a module is trained in full, its persistent buffers too."""
    for inner in module.modules():
        mark_trained_in_full(inner, [*inner._parameters, *_buffers(inner)])


def mark_biases(modules: Iterable[nn.Module]) -> None:
    """Note that the biases that these modules themselves have are trained in full."""
    for module in modules:
        own = [name for name, parameter in module._parameters.items() if "bias" in name and parameter is not None]
        mark_trained_in_full(module, own)


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
    return {name for name, _, _ in _own(model)}


def own_state_dict(model: nn.Module) -> dict[str, Any]:
    """Return our entries of a model's state dict as they lie in memory, without a state dict of the base."""
    return {name: _value(module, entry) for name, module, entry in _own(model)}


def _own(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield the key, the owner, and the owner's name of each of our entries."""
    for entry in _buffers(model):
        yield entry, model, entry
    for prefix, module in named_base_modules(model, remove_duplicate=False):
        for entry in _full_entries(module):
            yield join(prefix, entry), module, entry
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            yield join(prefix, _EXTRA), module, _EXTRA
        for part_prefix, part in _parts(prefix, module) if "adapters" in module._modules else ():
            for entry in (*part._parameters, *_buffers(part)):
                yield f"{part_prefix}.{entry}", part, entry


def _parts(prefix: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules that the adapters of a module consist of, with those that files leave out left out."""
    pending: list[tuple[str, nn.Module]] = [
        (join(prefix, "adapters", key), slot) for key, slot in slots_of(module).items()
    ]
    for name, part in pending:
        pending += [(f"{name}.{key}", child) for key, child in part._modules.items() if child is not None]
    return [(name, part) for name, part in pending if not isinstance(part, Shared) or part.stored]


def _value(module: nn.Module, entry: str) -> Any:
    if entry == _EXTRA:
        return module.get_extra_state()
    tensor = module._parameters.get(entry)
    return (module._buffers[entry] if tensor is None else tensor).detach()  # type: ignore[union-attr]


def trained_in_full(model: nn.Module) -> set[str]:
    """Return the clean names of the base's entries that are trained in full.

    These are all that is marked so, and any other parameter of the base that requires a gradient now.
    """
    return {clean(name) for name in _trained_in_full(model)}


def _trained_in_full(model: nn.Module) -> set[str]:
    return {
        join(prefix, name)
        for prefix, module in named_base_modules(model, remove_duplicate=False)
        for name in _full_entries(module)
    }


def _full_entries(module: nn.Module) -> list[str]:
    """Return the names of a module's own entries that are trained in full."""
    full = marked(module)
    own = [name for name, p in module._parameters.items() if p is not None and (p.requires_grad or name in full)]
    return own + [name for name in _buffers(module) if name in full] if full else own


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
