"""Optimizer groups by what a parameter is: A at the learning rate, B at ``lr_ratio`` times it (LoRA+), and so on.

LoRA+ (Hayou et al., 2024, arXiv:2402.12354). `split` takes an optimizer that the user built, whatever its groups, and
moves the parameters that need another learning rate or weight decay into derived groups behind the user's own. A
derived group follows its parent: its learning rate is set from the parent's before every step, and schedulers do not
see it, so the ratio holds under every schedule.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.adapter import Adapter, Role
from lightning_lora.sites import clean, sites

PARENT = "lora_parent"
ROLE = "lora_role"
_SCALED = ("lr", "initial_lr", "max_lr", "min_lr")
_OWN = ("params", "param_names", "name", "weight_decay", PARENT, ROLE, *_SCALED)


def roles(model: nn.Module) -> dict[Tensor, Role]:
    """Return the role of every adapter parameter of a model."""
    found: dict[Tensor, Role] = {}
    for module in model.modules():
        if isinstance(module, Adapter):
            for name, parameter in module.named_parameters(recurse=False):
                found[parameter] = type(module).roles[name]
    return found


def param_groups(
    model: nn.Module,
    lr: float,
    *,
    lr_ratio: float = 1.0,
    weight_decay: float = 0.0,
    role_weight_decay: Mapping[Role, float] | None = None,
) -> list[dict[str, Any]]:
    """Return groups for an optimizer built by hand: one per role, and one for what is trained in full.

    Args:
        model: The adapted model.
        lr: Learning rate of all but B.
        lr_ratio: Learning rate of B divided by ``lr``.
        weight_decay: Weight decay where ``role_weight_decay`` says nothing.
        role_weight_decay: Weight decay by role, such as ``{"B": 0.0}``.

    Raises:
        ValueError: If nothing is trainable.
    """
    check_ratio(lr_ratio)
    role_of = roles(model)
    members: dict[str, list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            members.setdefault(role_of.get(parameter, "trained_in_full"), []).append(parameter)
    if not members:
        raise ValueError("no parameter requires a gradient: call inject(model, ...) before param_groups(model, ...)")
    decay = role_weight_decay or {}
    return [
        {
            "params": parameters,
            "name": group_name(role),
            "lr": lr * lr_ratio if role == "B" else lr,
            "weight_decay": decay.get(role, weight_decay),  # type: ignore[call-overload]
        }
        for role, parameters in members.items()
    ]


def group_name(role: str) -> str:
    """Return a role's name in a group, as learning-rate monitors show it."""
    return f"lora_{role}" if role in ("A", "B") else role


def check_ratio(lr_ratio: float) -> None:
    """Raise ``ValueError`` unless the ratio is a finite number above 0."""
    if not (isinstance(lr_ratio, int | float) and 0 < lr_ratio < float("inf")):
        raise ValueError(f"lr_ratio={lr_ratio!r}: must be a finite number above 0; 1 is plain LoRA, LoRA+ suggests 16")


def place(model: nn.Module, optimizers: list[Optimizer]) -> str | None:
    """Put adapter parameters that no optimizer holds where they belong; drop frozen parameters everywhere.

    An optimizer that was built before injection holds the base's weights: each adapter parameter joins the group of
    the weight that it adapts, and other trained parameters a lone group. This is the case of LightningCLI's
    ``optimizer:`` and of parameters captured in ``__init__``.

    Args:
        model: The adapted model.
        optimizers: All optimizers that ``configure_optimizers`` returned; their groups are changed in place.

    Returns:
        A sentence for the user where the place had to be guessed, else None.

    Raises:
        ValueError: If a parameter has no place, or is in two groups.
    """
    names = {parameter: clean(name) for name, parameter in model.named_parameters()}
    held: dict[Tensor, dict[str, Any]] = {}
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        for parameter in group["params"]:
            if parameter in held and parameter in names and parameter.requires_grad:
                raise ValueError(
                    f"{names[parameter]} is in two optimizer groups: configure_optimizers must give it once"
                )
            held[parameter] = group
    missing = [p for p in names if p.requires_grad and p not in held]
    home = {p: held.get(getattr(s.module, s.parameter)) for s in sites(model) for p in s.slot.parameters()}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    guessed: list[str] = []
    for parameter in missing:
        place_of_weight = home.get(parameter)
        if place_of_weight is None:
            if len(groups) != 1:
                raise ValueError(
                    f"{names[parameter]} is in no optimizer and there are {len(groups)} parameter groups to choose "
                    "from: add `[p for p in self.parameters() if p.requires_grad]` to one in configure_optimizers"
                )
            guessed.append(names[parameter])
        _add(place_of_weight or groups[0], parameter, names[parameter])
    for group in groups:
        _keep(group, [i for i, p in enumerate(group["params"]) if p.requires_grad or p not in names])
    if guessed:
        return (
            f"{len(guessed)} trained parameters (first: {guessed[0]}) were in no optimizer, because "
            "configure_optimizers chose others: they were added to its only group. Pass self.parameters() to say so."
        )
    return None


def split(
    model: nn.Module, optimizer: Optimizer, lr_ratio: float = 1.0, role_weight_decay: Mapping[Role, float] | None = None
) -> None:
    """Move parameters whose role has its own learning rate or weight decay into derived groups, in place.

    Args:
        model: The adapted model.
        optimizer: Any optimizer with param groups.
        lr_ratio: Learning rate of B divided by that of its group.
        role_weight_decay: Weight decay by role.

    Raises:
        ValueError: If the optimizer cannot have several groups.
    """
    check_ratio(lr_ratio)
    decay = dict(role_weight_decay or {})
    special = set(decay) | ({"B"} if lr_ratio != 1 else set())
    if not special:
        return
    if isinstance(optimizer, torch.optim.LBFGS) or type(optimizer).__name__ == "ZeroRedundancyOptimizer":
        raise ValueError(
            f"{type(optimizer).__name__} keeps all parameters in one group of its own: use lr_ratio=1 and no "
            f"weight_decay by role with it (lr_ratio={lr_ratio:g}, weight_decay={decay})"
        )
    role_of = roles(model)
    parents = [group for group in optimizer.param_groups if PARENT not in group]
    for index, parent in enumerate(parents):
        by_role: dict[Role, list[int]] = {}
        for i, parameter in enumerate(parent["params"]):
            role = role_of.get(parameter)
            if role is not None and role in special:
                by_role.setdefault(role, []).append(i)
        for role, chosen in by_role.items():
            name = f"{parent.get('name', f'pg{index + 1}')}.{group_name(role)}"
            derived = {key: value for key, value in parent.items() if key not in ("params", "param_names")}
            derived |= {"name": name, PARENT: index, ROLE: role, "params": [parent["params"][i] for i in chosen]}
            if "param_names" in parent:
                derived["param_names"] = [parent["param_names"][i] for i in chosen]
            if role in decay:
                derived["weight_decay"] = decay[role]
            optimizer.param_groups.append(derived)
        moved = {i for chosen in by_role.values() for i in chosen}
        _keep(parent, [i for i in range(len(parent["params"])) if i not in moved])

    def follow(optimizer: Optimizer, *_: Any) -> None:
        _follow(optimizer, lr_ratio, decay)

    _follow(optimizer, lr_ratio, decay)
    optimizer.register_step_pre_hook(follow)


def link(
    scheduler: Any,
    optimizers: Iterable[Optimizer],
    lr_ratio: float = 1.0,
    role_weight_decay: Mapping[Role, float] | None = None,
) -> None:
    """Hide derived groups from a scheduler while it steps, so that it sees the groups that it was built for.

    Args:
        scheduler: Anything with a ``step`` method; its class is swapped for a subclass of the same name, because an
            attribute of the instance would end in its state dict.
        optimizers: The optimizers whose derived groups are hidden, and follow once it has stepped.
        lr_ratio: As given to ``split``.
        role_weight_decay: As given to ``split``.
    """
    optimizers = list(optimizers)
    cls = type(scheduler)

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for optimizer in optimizers:
                stack.enter_context(_hidden(optimizer))
            result = cls.step(self, *args, **kwargs)
        for optimizer in optimizers:
            _follow(optimizer, lr_ratio, role_weight_decay or {})
        return result

    scheduler.__class__ = type(cls.__name__, (cls,), {"step": step, "__module__": cls.__module__})


@contextmanager
def _hidden(optimizer: Optimizer) -> Iterator[None]:
    derived = [group for group in optimizer.param_groups if PARENT in group]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if PARENT not in group]
    try:
        yield
    finally:
        optimizer.param_groups.extend(derived)


def _follow(optimizer: Optimizer, lr_ratio: float, decay: Mapping[Role, float]) -> None:
    """Set every derived group from its parent; B's learning rates are ``lr_ratio`` times the parent's."""
    for group in optimizer.param_groups:
        if PARENT not in group:
            continue
        parent = optimizer.param_groups[group[PARENT]]
        ratio = lr_ratio if group[ROLE] == "B" else 1.0
        for key, value in parent.items():
            if key in _SCALED:
                group[key] = value * ratio if isinstance(value, int | float | Tensor) else value
            elif key not in _OWN or (key == "weight_decay" and group[ROLE] not in decay):
                group[key] = value


def _add(group: dict[str, Any], parameter: Tensor, name: str) -> None:
    group["params"].append(parameter)
    if "param_names" in group:
        group["param_names"].append(name)


def _keep(group: dict[str, Any], indices: list[int]) -> None:
    group["params"][:] = [group["params"][i] for i in indices]  # in place: some optimizers hold this very list
    if "param_names" in group:
        group["param_names"] = [group["param_names"][i] for i in indices]
