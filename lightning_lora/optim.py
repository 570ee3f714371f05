"""Optimizer groups by what a parameter is: A at the learning rate, B at ``lr_ratio`` times it (LoRA+), and so on.

LoRA+ (Hayou et al., 2024, arXiv:2402.12354). `split` takes an optimizer that the user built, whatever its groups, and
moves the parameters that need another learning rate or weight decay into derived groups behind the user's own. A
derived group follows its parent: its learning rate is set from the parent's before every step, and schedulers do not
see it, so the ratio holds under every schedule.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.adapter import Adapter, Role
from lightning_lora.sites import clean, sites

PARENT = "lora_parent"
ROLE = "lora_role"
INDEX = "lora_index"  # where the parameters stood in the parent, so that a split can be undone
_PLAN = "lora_plan"
_SCALED = ("lr", "initial_lr", "max_lr", "min_lr")
_OWN = ("params", "param_names", "name", PARENT, ROLE, INDEX, *_SCALED)


class _Plan(NamedTuple):
    """How the derived groups of an optimizer differ from their parents."""

    lr_ratio: float
    weight_decay: Mapping[Role, float]


class _Home(NamedTuple):
    """A group and the optimizer that it is in."""

    optimizer: Optimizer
    group: dict[str, Any]


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
    ``optimizer:`` and of parameters captured in ``__init__``. What an earlier run split is joined again first.

    Args:
        model: The adapted model.
        optimizers: All optimizers that ``configure_optimizers`` returned; their groups are changed in place.

    Returns:
        A sentence for the user where the place had to be guessed, else None.

    Raises:
        ValueError: If a parameter has no place, or is in two groups.
    """
    for optimizer in optimizers:
        _join(optimizer.param_groups)
    names: dict[Tensor, str] = {parameter: clean(name) for name, parameter in model.named_parameters()}
    every_home = [_Home(optimizer, group) for optimizer in optimizers for group in optimizer.param_groups]
    homes: dict[Tensor, list[_Home]] = {}
    for home in every_home:
        for parameter in home.group["params"]:
            homes.setdefault(parameter, []).append(home)
    weight_of: dict[Tensor, Tensor] = {
        parameter: getattr(site.module, site.parameter) for site in sites(model) for parameter in site.slot.parameters()
    }
    guessed: list[str] = []
    for parameter, name in names.items():
        if not parameter.requires_grad:
            continue
        found = homes.get(parameter) or homes.get(weight_of.get(parameter, parameter), [])
        if len(found) > 1:
            raise ValueError(f"{name} belongs in two optimizer groups: configure_optimizers must give it to one")
        if parameter in homes:
            continue
        if not found:
            if len(every_home) != 1:
                raise ValueError(
                    f"{name} is in no optimizer and there are {len(every_home)} parameter groups to choose "
                    "from: add `[p for p in self.parameters() if p.requires_grad]` to one in configure_optimizers"
                )
            found = every_home
            guessed.append(name)
        _add(*found[0], parameter, name)
    frozen = {parameter: name for parameter, name in names.items() if not parameter.requires_grad}
    dropped = [frozen[p] for p in homes if p in frozen]
    for optimizer, group in every_home:
        for parameter in frozen.keys() & set(group["params"]):
            optimizer.state.pop(parameter, None)
        _keep(group, [i for i, p in enumerate(group["params"]) if p not in frozen])
    if not guessed:
        return None
    sentence = (
        f"{len(guessed)} trained parameters (first: {guessed[0]}) were in no optimizer, because configure_optimizers "
        "chose others: they were added to its only group. Pass self.parameters() to say so."
    )
    if dropped:
        sentence += f" What it chose is frozen (first: {dropped[0]}); to train that too, list it in modules_to_save."
    return sentence


def split(
    model: nn.Module, optimizer: Optimizer, lr_ratio: float = 1.0, role_weight_decay: Mapping[Role, float] | None = None
) -> None:
    """Move parameters whose role has its own learning rate or weight decay into derived groups, in place.

    An optimizer that was split before is split anew. Its state loads from a run with any other ratio.

    Args:
        model: The adapted model.
        optimizer: Any optimizer with param groups.
        lr_ratio: Learning rate of B divided by that of its group.
        role_weight_decay: Weight decay by role.

    Raises:
        ValueError: If the optimizer cannot have several groups.
    """
    check_ratio(lr_ratio)
    plan = _Plan(lr_ratio, dict(role_weight_decay or {}))
    special = set(plan.weight_decay) | ({"B"} if lr_ratio != 1 else set())
    has_hooks = hasattr(optimizer, "register_step_pre_hook")
    one_group = isinstance(optimizer, torch.optim.LBFGS) or type(optimizer).__name__ == "ZeroRedundancyOptimizer"
    if special and (one_group or not has_hooks):
        raise ValueError(
            f"{type(optimizer).__name__} {'keeps all parameters in one group' if one_group else 'has no step hooks'}: "
            f"use lr_ratio=1 and no weight_decay by role with it (lr_ratio={lr_ratio:g}, "
            f"weight_decay={plan.weight_decay})"
        )
    _join(optimizer.param_groups)
    role_of = roles(model)
    layout: list[dict[str, Any]] = []
    for parent, group in enumerate(optimizer.param_groups):
        by_role: dict[Role, list[int]] = {}
        for i, parameter in enumerate(group["params"]):
            role = role_of.get(parameter)
            if role is not None and role in special:
                by_role.setdefault(role, []).append(i)
        for role, index in by_role.items():
            name = f"{group.get('name', f'pg{parent + 1}')}.{group_name(role)}"
            layout.append({"name": name, PARENT: parent, ROLE: role, INDEX: index})
    _divide(optimizer.param_groups, layout)
    if has_hooks and not hasattr(optimizer, _PLAN):
        optimizer.register_step_pre_hook(_follow)
        optimizer.register_load_state_dict_pre_hook(_relayout)
        optimizer.register_load_state_dict_post_hook(_follow)
    setattr(optimizer, _PLAN, plan)
    _follow(optimizer)


def link(scheduler: Any, optimizers: Iterable[Optimizer]) -> None:
    """Hide derived groups from a scheduler while it steps, so that it sees the groups that it was built for.

    Args:
        scheduler: Anything with a ``step`` method; its class is swapped for a subclass of the same name, because an
            attribute of the instance would end in its state dict.
        optimizers: The optimizers whose derived groups are hidden, and follow once it has stepped.
    """
    optimizers = list(optimizers)
    cls = type(scheduler)
    if hasattr(cls, _PLAN):
        return

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for optimizer in optimizers:
                stack.enter_context(_hidden(optimizer))
            result = cls.step(self, *args, **kwargs)
        for optimizer in optimizers:
            _follow(optimizer)
        return result

    scheduler.__class__ = type(cls.__name__, (cls,), {"step": step, "__module__": cls.__module__, _PLAN: True})


@contextmanager
def _hidden(optimizer: Optimizer) -> Iterator[None]:
    derived = [group for group in optimizer.param_groups if PARENT in group]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if PARENT not in group]
    try:
        yield
    finally:
        optimizer.param_groups.extend(derived)


def _follow(optimizer: Optimizer, *_: Any) -> None:
    """Set every derived group from its parent; B's learning rates are ``lr_ratio`` times the parent's."""
    plan: _Plan = getattr(optimizer, _PLAN)
    for group in optimizer.param_groups:
        if PARENT not in group:
            continue
        role = group[ROLE]
        ratio = plan.lr_ratio if role == "B" else 1.0
        for key, value in optimizer.param_groups[group[PARENT]].items():
            if key in _SCALED:
                group[key] = value * ratio if isinstance(value, int | float | Tensor) else value
            elif key not in _OWN:
                group[key] = value
        if role in plan.weight_decay:
            group["weight_decay"] = plan.weight_decay[role]


def _divide(groups: list[dict[str, Any]], layout: Iterable[dict[str, Any]]) -> None:
    """Append the derived groups that a layout describes, and take their parameters out of the parents."""
    moved: dict[int, set[int]] = {}
    for own in layout:
        parent = groups[own[PARENT]]
        derived = {**parent, **own, "params": [parent["params"][i] for i in own[INDEX]]}
        if "param_names" in parent:
            derived["param_names"] = [parent["param_names"][i] for i in own[INDEX]]
        groups.append(derived)
        moved.setdefault(own[PARENT], set()).update(own[INDEX])
    for index, taken in moved.items():
        _keep(groups[index], [i for i in range(len(groups[index]["params"])) if i not in taken])


def _join(groups: list[dict[str, Any]]) -> None:
    """Undo ``_divide``."""
    derived = [group for group in groups if PARENT in group]
    groups[:] = [group for group in groups if PARENT not in group]
    back = [(group[PARENT], i, place, group) for group in derived for place, i in enumerate(group[INDEX])]
    for parent, i, place, group in sorted(back, key=lambda one: one[:2]):
        groups[parent]["params"].insert(i, group["params"][place])
        if "param_names" in group:
            groups[parent]["param_names"].insert(i, group["param_names"][place])


def _relayout(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
    """Give a saved state the groups of this optimizer: it may have been split by another ratio, or not at all."""
    groups = [dict(group, params=list(group["params"])) for group in state["param_groups"]]
    _join(groups)
    layout = [group for group in optimizer.param_groups if PARENT in group]
    sizes = [len(group["params"]) for group in optimizer.param_groups if PARENT not in group]
    for group in layout:
        sizes[group[PARENT]] += len(group["params"])
    if sizes != [len(group["params"]) for group in groups]:
        return None  # other groups altogether: torch says so
    _divide(groups, [{key: group[key] for key in ("name", PARENT, ROLE, INDEX)} for group in layout])
    return {**state, "param_groups": groups}


def _add(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor, name: str) -> None:
    """Add a parameter to a group of an optimizer that exists already."""
    if optimizer.state:  # Adagrad, for one, makes its state when it is built
        try:
            fresh = type(optimizer)([{**group, "params": [parameter]}], **optimizer.defaults)
        except TypeError:
            raise ValueError(
                f"{type(optimizer).__name__} holds state for the parameters that it was built with, so {name} cannot "
                "join it: build it in configure_optimizers, from self.parameters()"
            ) from None
        if parameter in fresh.state:
            optimizer.state[parameter] = fresh.state[parameter]
    group["params"].append(parameter)
    if "param_names" in group:
        group["param_names"].append(name)


def _keep(group: dict[str, Any], indices: list[int]) -> None:
    group["params"][:] = [group["params"][i] for i in indices]  # in place: some optimizers hold this very list
    if "param_names" in group:
        group["param_names"] = [group["param_names"][i] for i in indices]
