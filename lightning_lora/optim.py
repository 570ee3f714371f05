"""Which optimizer group an adapter parameter belongs in: built by hand, or found in what the user built."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.adapter import Role
from lightning_lora.derived_groups import (
    LR_EMBEDDING,
    check_ratio,
    group_name,
    join_groups,
    keep,
    official_roles,
    roles,
    weight_decays,
)
from lightning_lora.sites import clean, sites


class _Home(NamedTuple):
    """A group and the optimizer that it is in."""

    optimizer: Optimizer
    group: dict[str, Any]


def param_groups(
    model: nn.Module,
    lr: float,
    *,
    lr_ratio: float = 1.0,
    weight_decay: float = 0.0,
    role_weight_decay: Mapping[Role, float] | None = None,
    official_grouping: bool = False,
    lr_embedding: float = LR_EMBEDDING,
) -> list[dict[str, Any]]:
    """Return groups for an optimizer built by hand: one per role, and one for what is trained in full.

    Args:
        model: The adapted model.
        lr: Learning rate of all but B.
        lr_ratio: Learning rate of B divided by ``lr``.
        weight_decay: Weight decay where ``role_weight_decay`` says nothing.
        role_weight_decay: Weight decay by role, such as ``{"B": 0.0}``.
        official_grouping: Group as LoRA+'s released code does: every vector has B's rate, biases and layer norms no
            weight decay, and embeddings' adapters ``lr_embedding``.
        lr_embedding: That rate.

    Raises:
        ValueError: If nothing is trainable, or the ratio does not go with the method.
    """
    check_ratio(lr_ratio, {adapter.method for site in sites(model) for adapter in site.slot.values()})  # type: ignore[misc]
    role_of: Mapping[Tensor, str] = official_roles(model) if official_grouping else roles(model)
    decay = weight_decays(role_weight_decay, official_grouping)
    members: dict[str, list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            members.setdefault(role_of.get(parameter, "trained_in_full"), []).append(parameter)
    if not members:
        raise ValueError("no parameter requires a gradient: call inject(model, ...) before param_groups(model, ...)")
    rates = {"B": lr * lr_ratio, "B_no_decay": lr * lr_ratio, "embedding": lr_embedding}
    return [
        {
            "params": parameters,
            "name": group_name(role),
            "lr": rates.get(role, lr),
            "weight_decay": decay.get(role, weight_decay),
        }
        for role, parameters in members.items()
    ]


def the_optimizer(model: nn.Module, optimizers: list[Optimizer], method: str) -> Optimizer:
    """Return the optimizer that trains the adapters, for a method that counts its steps.

    Args:
        model: The adapted model.
        optimizers: All there are.
        method: The method's name, for the message.

    Raises:
        ValueError: If it is not exactly one.
    """
    adapters = roles(model)
    found = [o for o in optimizers if any(p in adapters for group in o.param_groups for p in group["params"])]
    if len(found) != 1:
        raise ValueError(
            f"{method} counts the steps of the optimizer that trains its adapters, and {len(found)} optimizers do: "
            "give all of them to one in configure_optimizers, or adapt by target_modules what one of them trains"
        )
    return found[0]


def place(model: nn.Module, optimizers: list[Optimizer]) -> str | None:
    """Put adapter parameters that no optimizer holds where they belong; drop frozen parameters everywhere.

    An optimizer that was built before injection holds the base's weights: each adapter parameter joins the group of
    the weight that it adapts, and other trained parameters a lone group. This is the case of LightningCLI's
    ``optimizer:`` and of parameters captured in ``__init__``. What an earlier run split is joined again first.

    Args:
        model: The adapted model.
        optimizers: All optimizers that ``configure_optimizers`` returned; their groups are changed in place.

    Returns:
        A sentence for the user where the place had to be guessed or nothing that was chosen is trained, else None.

    Raises:
        ValueError: If a parameter has no place, is in two groups of one optimizer, or in one that cannot train it.
    """
    for optimizer in optimizers:
        join_groups(optimizer.param_groups)
    names: dict[Tensor, str] = {parameter: clean(name) for name, parameter in model.named_parameters()}
    every_home = [_Home(optimizer, group) for optimizer in optimizers for group in optimizer.param_groups]
    homes: dict[Tensor, list[_Home]] = {}
    for home in every_home:
        for parameter in home.group["params"]:
            homes.setdefault(parameter, []).append(home)
    weight_of: dict[Tensor, Tensor] = {
        parameter: site.weight
        for site in sites(model)
        if site.weight is not None
        for parameter in site.slot.parameters()
    }
    guessed: list[str] = []
    for parameter, name in names.items():
        if not parameter.requires_grad:
            continue
        found = homes.get(parameter) or homes.get(weight_of.get(parameter, parameter), [])
        if len({id(home.optimizer) for home in found}) < len(found):
            raise ValueError(f"{name} belongs in two groups of one optimizer: configure_optimizers must give it to one")
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
        for home in found:
            _add(*home, parameter, name)
    _check_dense(every_home, roles(model), names)
    frozen = {parameter: name for parameter, name in names.items() if not parameter.requires_grad}
    dropped = [frozen[p] for p in homes if p in frozen]
    idle: list[str] = []
    for optimizer, group in every_home:
        gone = [p for p in group["params"] if p in frozen]
        for parameter in gone:
            optimizer.state.pop(parameter, None)
        keep(group, [i for i, p in enumerate(group["params"]) if p not in frozen])
        if not group["params"]:
            idle += [frozen[p] for p in gone if p.dim() > 1][:1]  # not of norms and biases without weight decay
    if idle and not guessed and any(group["params"] for _, group in every_home):
        return (
            f"{len(idle)} of the groups that configure_optimizers made hold frozen parameters only (first: {idle[0]}), "
            "so they train nothing: list in modules_to_save what is to be trained in full, such as a new head"
        )
    if not guessed:
        return None
    sentence = (
        f"{len(guessed)} trained parameters (first: {guessed[0]}) were in no optimizer, because configure_optimizers "
        "chose others: they were added to its only group. Pass self.parameters() to say so."
    )
    if dropped:
        sentence += f" What it chose is frozen (first: {dropped[0]}); to train that too, list it in modules_to_save."
    return sentence


def release(optimizer: Optimizer, gone: Collection[Tensor], fresh: Collection[Tensor]) -> None:
    """Take parameters out of an optimizer, and forget what it noted of others that start anew.

    What was split is joined; ``split`` it again.

    Args:
        optimizer: Any with param groups, changed in place.
        gone: Parameters that leave it.
        fresh: Parameters whose state starts as it was when the optimizer was built.
    """
    join_groups(optimizer.param_groups)
    gone, fresh = set(gone), set(fresh)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in gone or parameter in fresh:
                optimizer.state.pop(parameter, None)
            if parameter in fresh:
                with suppress(TypeError, AttributeError):  # built from something else: then its steps start the state
                    _start_state(optimizer, group, parameter)
        keep(group, [i for i, parameter in enumerate(group["params"]) if parameter not in gone])


def _start_state(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> None:
    """Note of a parameter what the optimizer would if it were built with it: Adagrad, for one, has sums then."""
    known = inspect.signature(type(optimizer)).parameters  # AdamW has defaults that it does not take
    options = {name: value for name, value in optimizer.defaults.items() if name in known}
    state = type(optimizer)([{**group, "params": [parameter]}], **options).state
    if parameter in state:
        optimizer.state[parameter] = state[parameter]


def _check_dense(homes: list[_Home], adapters: Collection[Tensor], names: Mapping[Tensor, str]) -> None:
    """Raise ``ValueError`` if an adapter is in an optimizer for sparse gradients, as embeddings have them."""
    for optimizer, group in homes:
        if isinstance(optimizer, torch.optim.SparseAdam):
            for parameter in group["params"]:
                if parameter in adapters:
                    raise ValueError(
                        f"{names[parameter]} is in SparseAdam, which takes sparse gradients only, but those of "
                        "adapters are dense: give it to another optimizer in configure_optimizers, such as "
                        "torch.optim.Adam"
                    )


def _add(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor, name: str) -> None:
    """Add a parameter to a group of an optimizer that exists already."""
    if optimizer.state:  # some make it when they are built
        try:
            _start_state(optimizer, group, parameter)
        except (TypeError, AttributeError):
            raise ValueError(
                f"{type(optimizer).__name__} holds state for the parameters that it was built with, so {name} cannot "
                "join it: build it in configure_optimizers, from self.parameters()"
            ) from None
    group["params"].append(parameter)
    if "param_names" in group:
        group["param_names"].append(name)
