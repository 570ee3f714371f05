"""Derived groups: parameters that need another learning rate or weight decay than the rest of their optimizer group.

`split` takes an optimizer that the user built, whatever its groups, and moves such parameters into groups of their own
behind the user's. A derived group follows its parent: its learning rate is set from the parent's before every step, and
schedulers do not see it, so LoRA+'s ratio (Hayou et al., 2024, arXiv:2402.12354) holds under every schedule.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.adapter import Adapter, Role
from lightning_lora.method import Method
from lightning_lora.sites import clean, sites

PARENT = "lora_parent"
ROLE = "lora_role"
RATIO = "lora_ratio"
INDEX = "lora_index"  # where the parameters stood in the parent, so that a split can be undone
_PLAN = "lora_plan"
NAMES = "lora_names"  # in a saved state: the names of the parameters of each group
PARTIAL = "lora_partial"  # in a saved state: it need not be of the same parameters
_SCALED = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
_OWN = ("params", "param_names", "name", PARENT, ROLE, RATIO, INDEX, *_SCALED)
LR_EMBEDDING = 1e-6  # of LoRA+'s released code


class _Plan(NamedTuple):
    """How the derived groups of an optimizer differ from their parents, and the model that has the parameters."""

    weight_decay: Mapping[str, float]
    model: nn.Module


def roles(model: nn.Module) -> dict[Tensor, Role]:
    """Return the role of every adapter parameter of a model."""
    found: dict[Tensor, Role] = {}
    for module in model.modules():
        if isinstance(module, Adapter):
            for name, parameter in module.named_parameters(recurse=False):
                found[parameter] = type(module).roles[name]
    return found


def official_roles(model: nn.Module) -> dict[Tensor, str]:
    """Return the group that LoRA+'s released code gives a parameter, where that is not the one at the base rate.

    ``embedding`` are both factors where rows are looked up. ``B`` is what has the ratio: every B and every vector, such
    as biases of a head and magnitudes; of these, biases and layer norms have no weight decay (``B_no_decay``).

    Args:
        model: The adapted model.
    """
    norms = {p for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    looked_up = {p for s in sites(model) if s.slot.layout.looked_up for p in s.slot.parameters()}
    role_of = roles(model)
    found: dict[Tensor, str] = {}
    for name, parameter in model.named_parameters():
        if parameter in looked_up:
            found[parameter] = "embedding"
        elif role_of.get(parameter) == "B" or parameter.dim() == 1:
            found[parameter] = "B_no_decay" if "bias" in name or parameter in norms else "B"
    return found


def weight_decays(role_weight_decay: Mapping[Role, float] | None, official_grouping: bool) -> dict[str, float]:
    """Return the weight decay of each group that has its own.

    Args:
        role_weight_decay: By role.
        official_grouping: Whether groups are those of LoRA+'s released code.
    """
    decay = {"B_no_decay": 0.0} if official_grouping else {}
    return decay | {str(role): value for role, value in (role_weight_decay or {}).items()}


def group_name(role: str) -> str:
    """Return a role's name in a group, as learning-rate monitors show it."""
    return f"lora_{role}" if role in ("A", "B", "B_no_decay") else role


def check_ratio(lr_ratio: float, methods: Iterable[Method] = ()) -> None:
    """Check a ratio of the learning rates of B and A.

    Args:
        lr_ratio: The ratio.
        methods: What it is to work on.

    Raises:
        ValueError: If it is no finite number above 0, or a method has no use for it.
    """
    if not (isinstance(lr_ratio, int | float) and 0 < lr_ratio < float("inf")):
        raise ValueError(f"lr_ratio={lr_ratio!r}: must be a finite number above 0; 1 is plain LoRA, LoRA+ suggests 16")
    for method in methods if lr_ratio != 1 else ():
        reason = method.why_no_ratio()
        if reason is not None:
            raise ValueError(f"lr_ratio={lr_ratio:g}: {reason}")


def split(
    model: nn.Module,
    optimizer: Optimizer,
    lr_ratio: float = 1.0,
    role_weight_decay: Mapping[Role, float] | None = None,
    *,
    official_grouping: bool = False,
    lr_embedding: float = LR_EMBEDDING,
) -> None:
    """Move parameters whose role has its own learning rate or weight decay into derived groups, in place.

    An optimizer that was split before is split anew. Its state loads from a run with any other ratio.

    Args:
        model: The adapted model.
        optimizer: Any optimizer with param groups.
        lr_ratio: Learning rate of B divided by that of its group.
        role_weight_decay: Weight decay by role.
        official_grouping: Group as LoRA+'s released code does (``official_roles``).
        lr_embedding: Learning rate of embeddings' adapters there, beside the rate that a group has now.

    Raises:
        ValueError: If the optimizer cannot have several groups.
    """
    check_ratio(lr_ratio)
    plan = _Plan(weight_decays(role_weight_decay, official_grouping), model)
    special = {*plan.weight_decay, *(("B",) if lr_ratio != 1 else ()), *(("embedding",) if official_grouping else ())}
    has_hooks = hasattr(optimizer, "register_step_pre_hook")
    one_group = isinstance(optimizer, torch.optim.LBFGS) or type(optimizer).__name__ == "ZeroRedundancyOptimizer"
    if special and (one_group or not has_hooks):
        raise ValueError(
            f"{type(optimizer).__name__} {'keeps all parameters in one group' if one_group else 'has no step hooks'}: "
            f"use lr_ratio=1 and no weight_decay by role with it (lr_ratio={lr_ratio:g}, "
            f"weight_decay={plan.weight_decay})"
        )
    join_groups(optimizer.param_groups)
    role_of: Mapping[Tensor, str] = official_roles(model) if official_grouping else roles(model)
    layout: list[dict[str, Any]] = []
    for parent, group in enumerate(optimizer.param_groups):
        by_role: dict[str, list[int]] = {}
        for i, parameter in enumerate(group["params"]):
            role = role_of.get(parameter)
            if role is not None and role in special:
                by_role.setdefault(role, []).append(i)
        for role, index in by_role.items():
            name = f"{group.get('name', f'pg{parent + 1}')}.{group_name(role)}"
            ratio = lr_ratio if role in ("B", "B_no_decay") else 1.0
            if role == "embedding":
                ratio = lr_embedding / float(group.get("initial_lr", group["lr"]))
            layout.append({"name": name, PARENT: parent, ROLE: role, RATIO: ratio, INDEX: index})
    _divide(optimizer.param_groups, layout)
    if has_hooks and not hasattr(optimizer, _PLAN):
        optimizer.register_step_pre_hook(_follow)
        optimizer.register_state_dict_post_hook(_name)
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
    every = list(optimizer.param_groups)
    optimizer.param_groups[:] = [group for group in every if PARENT not in group]
    try:
        yield
    finally:
        optimizer.param_groups[:] = every  # in their order: a group that was added in mid-run stays the last one


def _follow(optimizer: Optimizer, *_: Any) -> None:
    """Set every derived group from its parent; its learning rates are the parent's times its ratio."""
    plan: _Plan = getattr(optimizer, _PLAN)
    for group in optimizer.param_groups:
        if PARENT not in group:
            continue
        role, ratio = group[ROLE], group[RATIO]
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
        keep(groups[index], [i for i in range(len(groups[index]["params"])) if i not in taken])


def join_groups(groups: list[dict[str, Any]]) -> None:
    """Undo what ``split`` did to a list of groups, in place."""
    derived = [group for group in groups if PARENT in group]
    groups[:] = [group for group in groups if PARENT not in group]
    back = [(group[PARENT], i, place, group) for group in derived for place, i in enumerate(group[INDEX])]
    for parent, i, place, group in sorted(back, key=lambda one: one[:2]):
        groups[parent]["params"].insert(i, group["params"][place])
        if "param_names" in group:
            groups[parent]["param_names"].insert(i, group["param_names"][place])


def _names(optimizer: Optimizer, groups: Iterable[Mapping[str, Any]]) -> list[list[str]] | None:
    """Return the clean names of the parameters of each group; None if the model does not have them all."""
    plan: _Plan = getattr(optimizer, _PLAN)
    name_of = {parameter: clean(name) for name, parameter in plan.model.named_parameters()}
    names = [[name_of.get(parameter) for parameter in group["params"]] for group in groups]
    return None if any(name is None for group in names for name in group) else names  # type: ignore[return-value]


def _name(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Write into a state whose it is: the order of parameters may be another one where it is loaded."""
    names = _names(optimizer, optimizer.param_groups)
    if names is not None:
        state[NAMES] = names


def _relayout(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Give a saved state the groups of this optimizer, which may have been split by another ratio, or not at all.

    Parameters are found by their names; in a state without names they are taken in order.

    Raises:
        ValueError: If they are other groups altogether; torch itself would compare the split groups, which may be as
            many and as large by chance, and give moments to the wrong parameters.
    """
    groups = [dict(group, params=list(group["params"])) for group in state["param_groups"]]
    numbers = [number for group in groups for number in group["params"]]
    name_of = dict(zip(numbers, (name for names in state.get(NAMES, []) for name in names), strict=False))
    join_groups(groups)
    own = [dict(group, params=list(group["params"])) for group in optimizer.param_groups]
    join_groups(own)
    sizes, saved = [len(group["params"]) for group in own], [len(group["params"]) for group in groups]
    if len(sizes) != len(saved) or (sizes != saved and PARTIAL not in state):
        raise ValueError(
            f"the saved state of {type(optimizer).__name__} has groups of {saved} parameters, but this run's "
            f"configure_optimizers made groups of {sizes}: build the groups that the checkpoint was written with"
        )
    names = _names(optimizer, own)
    if names is not None and name_of:
        number_of = {name: number for number, name in name_of.items()}
        if PARTIAL not in state:
            _check_names(optimizer, names, [[name_of[number] for number in group["params"]] for group in groups])
        fresh = count(max(numbers, default=-1) + 1)
        for group, wanted in zip(groups, names, strict=True):
            group["params"] = [number_of[name] if name in number_of else next(fresh) for name in wanted]
            group.pop("param_names", None)
    layout = [group for group in optimizer.param_groups if PARENT in group]
    _divide(groups, [{key: group[key] for key in ("name", PARENT, ROLE, RATIO, INDEX)} for group in layout])
    return {**state, "param_groups": groups}


def _check_names(optimizer: Optimizer, ours: list[list[str]], theirs: list[list[str]]) -> None:
    """Raise ``ValueError`` unless each group has the parameters that it was saved with, in whatever order."""
    for own, saved in zip(ours, theirs, strict=True):
        if set(own) != set(saved):
            missing, extra = (sorted(set(one) - set(other))[0] for one, other in ((own, saved), (saved, own)))
            raise ValueError(
                f"the saved state of {type(optimizer).__name__} holds {extra} in a group where this run's "
                f"configure_optimizers has {missing}: build the groups that the checkpoint was written with"
            )


def keep(group: dict[str, Any], indices: list[int]) -> None:
    """Keep only these parameters of a group, by position, in place."""
    group["params"][:] = [group["params"][i] for i in indices]  # in place: some optimizers hold this very list
    if "param_names" in group:
        group["param_names"] = [group["param_names"][i] for i in indices]
