"""Where adapters sit: a `Slot` for each adapted parameter, and the names by which these `Site`s are known."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.adapter import Adapter
from lightning_lora.layout import Layout

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")  # a layer's number in a name

_WRAPPER = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?:\.|$)")


class BaseWeight(NamedTuple):
    """What files say of an adapted weight.

    Attributes:
        digest: Of its values; None where there are none that stay.
        size: Its size.
    """

    digest: str | None
    size: tuple[int, ...]


class Slot(nn.ModuleDict):
    """The adapters of one parameter, or of some of its rows, by task.

    Args:
        parameter: The parameter's name in its module.
        layout: How the parameter lies as the matrix that the adapters change.

    Attributes:
        active: The tasks in use, in the order in which their changes are added.
        merged: Whether the parameter holds its merged value, so that nothing is to be added.
        shadowed: Whether a reader has put the adapted weight in place for the length of its forward.
        per_example: What changes an output of a layer, by layer, slot, output and input, where each example of the
            batch has a task of its own.
        base_weight: What is known of the parameter, where it was noted because it cannot be looked at any time.
        written_by: The task whose training writes to the parameter meanwhile; None where it holds the base's values.
        before: The matrix that was there before that.
    """

    active: tuple[str, ...] = ()
    merged: bool = False
    shadowed: bool = False
    per_example: Callable[[nn.Module, Slot, Tensor, Tensor], Tensor] | None = None
    base_weight: BaseWeight | None = None
    written_by: str | None = None
    before: Tensor | None = None

    def __init__(self, parameter: str, layout: Layout) -> None:
        super().__init__()
        self.parameter = parameter
        self.layout = layout

    @torch.no_grad()
    def write(self, weight: Tensor, change: Tensor, task: str) -> None:
        """Write the base's matrix plus a change to the parameter, in place, and keep the base's beside it.

        Args:
            weight: The parameter.
            change: What is added to the base's matrix; changes written before are not.
            task: Whose training does this.
        """
        if self.before is None:
            self.written_by, self.before = task, self.layout.matrix(weight).detach().clone()
        weight.copy_(self.layout.put(weight, self.before.to(weight.device) + change))

    def unwritten(self, weight: Tensor) -> Tensor:
        """Return the parameter with the base's values where a task has written others."""
        return weight if self.before is None else self.layout.put(weight, self.before.to(weight.device))

    @torch.no_grad()
    def restore(self, weight: Tensor) -> None:
        """Give the parameter the base's values back, bit for bit."""
        if self.before is not None:
            weight.copy_(self.unwritten(weight))
            self.written_by = self.before = None

    def use(self, tasks: tuple[str, ...]) -> None:
        """Have these tasks in use; past ``nn.Module``'s own way to set attributes, which takes most of a switch."""
        self.__dict__["active"] = tasks

    def in_use(self) -> list[Adapter]:
        """Return the adapters whose change is still to be added.

        Raises:
            RuntimeError: If the model trains while its adapters are merged, or each example has a task of its own.
        """
        if self.per_example is not None:
            raise RuntimeError(
                "inside per_example(model, ...) the adapters in use differ by example, so there are none for the whole "
                f"model: leave the block, then choose with use(model, {self.active[0]!r})"
            )
        if self.shadowed:
            return []
        if self.merged:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError(
                    "training while the adapters are merged would not reach them: leave `merged(model)` first, "
                    "or call model.eval() if this is inference"
                )
            return []
        return [self[task] for task in self.active if task in self]  # type: ignore[misc]


class Site(NamedTuple):
    """One adapted matrix: ``name`` is its key in the base's state dict, with the part in brackets where it is one."""

    name: str
    module: nn.Module
    parameter: str

    @property
    def weight(self) -> nn.Parameter | None:
        """The parameter; None where a parametrization computes it, because each look at spectral norm changes it."""
        return self.module._parameters.get(self.parameter)

    @property
    def slot(self) -> Slot:
        """The adapters that sit here."""
        slot = slots_of(self.module).get(self.name.rpartition(".")[2])
        if slot is None:
            raise ValueError(f"{self.name} is not adapted, or not any more: sites(model) returns those that are")
        return slot

    def adapter(self, task: str) -> Adapter:
        """Return the adapter of one task.

        Raises:
            KeyError: If there is none.
        """
        return self.slot[task]  # type: ignore[return-value]


def slots_of(module: nn.Module) -> dict[str, Slot]:
    """Return all slots of a module, by the last part of their sites' names; none where nothing on it is adapted."""
    adapters = module._modules.get("adapters")
    if adapters is None or not isinstance(adapters, nn.ModuleDict):
        return {}
    return {key: slot for key, slot in adapters._modules.items() if isinstance(slot, Slot)}


def slots_at(module: nn.Module, parameter: str) -> list[Slot]:
    """Return the slots of one parameter of a module: several where parts of it are adapted."""
    return [slot for slot in slots_of(module).values() if slot.parameter == parameter]


def named_base_modules(model: nn.Module, remove_duplicate: bool = True) -> list[tuple[str, nn.Module]]:
    """Return what ``model.named_modules`` does, in its order, without the modules that adapters consist of.

    What it costs does not grow with the number of adapters that a model has.

    Args:
        model: Any module.
        remove_duplicate: Whether a module is named once, however many names it has.
    """
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    pending: list[tuple[str, nn.Module]] = [("", model)]
    while pending:
        name, module = pending.pop()
        if id(module) in seen:
            continue
        if remove_duplicate:
            seen.add(id(module))
        found.append((name, module))
        own = module._modules
        if own:
            inside = f"{name}." if name else ""
            ours = own["adapters"] if "adapters" in own and slots_of(module) else None
            pending += [
                (inside + key, child) for key, child in reversed(own.items()) if child is not None and child is not ours
            ]
    return found


def slots(model: nn.Module) -> list[Slot]:
    """Return all slots of a model, each once: a shorter walk than that for names, because switching is little else."""
    found: dict[int, Slot] = {}
    seen = {id(model)}
    pending = [model]
    for module in pending:
        own = module._modules
        ours = slots_of(module) if "adapters" in own else {}
        found |= {id(slot): slot for slot in ours.values()}
        for name, child in own.items():
            if child is not None and child._modules and id(child) not in seen and not (ours and name == "adapters"):
                seen.add(id(child))
                pending.append(child)
    return list(found.values())


def added_modules(model: nn.Module) -> set[int]:
    """Return the ids of the modules that adapters consist of: everything in the model that is not the base's own."""
    holders = [module._modules["adapters"] for _, module in named_base_modules(model) if slots_of(module)]
    return {id(part) for holder in holders for part in holder.modules()}  # type: ignore[union-attr]


def clean(name: str) -> str:
    """Return a module or parameter name without the parts that wrappers (compile, FSDP, checkpointing) put in it."""
    return _WRAPPER.sub("", name).removesuffix(".") if _WRAPPER.search(name) else name


def join(*parts: str) -> str:
    """Join name parts with dots, leaving empty ones out."""
    return ".".join(part for part in parts if part)


def relative(name: str, root: str) -> str:
    """Return a name inside ``root`` as it is called there."""
    return name[len(root) + 1 :] if root else name


def named_submodules(model: nn.Module) -> dict[str, nn.Module]:
    """Return every module by each of its clean names; the model itself is ``""``."""
    return {clean(name): module for name, module in model.named_modules(remove_duplicate=False)}


def sites(model: nn.Module, task: str | None = None) -> list[Site]:
    """Return the adapted matrices of a model, in module order.

    Args:
        model: Any module.
        task: Only those that hold an adapter of this task; None means any.
    """
    found: list[Site] = []
    seen: set[int] = set()  # tied weights share one slot
    for prefix, module in named_base_modules(model):
        if "adapters" not in module._modules:
            continue
        for key, slot in slots_of(module).items():
            if id(slot) not in seen and (task is None or task in slot):
                seen.add(id(slot))
                found.append(Site(clean(f"{prefix}.{key}" if prefix else key), module, slot.parameter))
    return found


def pattern(name: str) -> str:
    """Return a site's name with a star for each number, which is the same for like layers."""
    return NUMBER.sub("*", name)


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """Return, by site name, the further names under which a tied weight shares the site's adapters.

    Args:
        model: The adapted model.
    """
    first: dict[int, str] = {}
    found: dict[str, list[str]] = {}
    for prefix, module in named_base_modules(model):
        for key, slot in slots_of(module).items():
            name = clean(join(prefix, key))
            if first.setdefault(id(slot), name) == name:
                found[name] = []
            else:
                found[first[id(slot)]].append(name)
    return found


@contextmanager
def hidden(model: nn.Module) -> Iterator[None]:
    """Take all adapters out of sight for the length of a ``with`` block: the model has its plain parameters only.

    Args:
        model: The adapted model.
    """
    adapted = [module for _, module in named_base_modules(model) if slots_of(module)]
    owners = [(module, module._modules.pop("adapters")) for module in adapted]
    try:
        yield
    finally:
        for module, adapters in owners:
            module._modules["adapters"] = adapters


def check_known(found: Collection[Slot], tasks: Collection[str]) -> None:
    """Raise ``ValueError`` if a model has no adapter of one of these tasks.

    Args:
        found: The model's slots.
        tasks: Their names.
    """
    known = sorted({task for slot in found for task in slot})
    for task in tasks:
        if task not in known:
            raise ValueError(f"task={task!r}: the model has no adapter of that name; it has {known}")


def check_not_written(model: nn.Module, tasks: Collection[str]) -> None:
    """Raise ``RuntimeError`` if the base holds what a task wrote to it, and that task is not to be in use.

    Args:
        model: The adapted model.
        tasks: Those that are to be in use.
    """
    for site in sites(model):
        if site.slot.written_by not in (None, *tasks):
            raise RuntimeError(
                f"cannot use {' and '.join(tasks) or 'the bare base'} now: training writes what {site.slot.written_by} "
                f"adds to the base to {site.name} itself: wait for the end of the run, or train with in_place=False"
            )
