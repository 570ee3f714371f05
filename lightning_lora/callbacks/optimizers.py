"""What a module's ``configure_optimizers`` returned, with the adapters in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from weakref import ref

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_lora.optim import place
from lightning_lora.sites import clean, hidden


class Replacements:
    """The parameters that a module has before a strategy divides it, for optimizers that were built from these.

    They are held weakly: what no optimizer holds is let go of when its shards take its place.

    Args:
        module: The module as it is before.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.before = {
            clean(name): ref(parameter)
            for name, parameter in module.named_parameters()
            if type(parameter) is nn.Parameter  # PyTorch cannot move subclasses that are referred to weakly
        }

    def put_in(self, optimizers: Iterable[Optimizer]) -> None:
        """Put the parameters that the module has now where optimizers hold those of the same names.

        Args:
            optimizers: Changed in place.
        """
        now = {clean(name): parameter for name, parameter in self.module.named_parameters()}
        new = {before(): now[name] for name, before in self.before.items() if name in now and before() is not None}
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["params"][:] = [new.get(parameter, parameter) for parameter in group["params"]]


def built_optimizers(
    pl_module: LightningModule, build: Callable[[], Any], replacements: Replacements
) -> tuple[Any, list[Optimizer], list[Any]]:
    """Run a module's ``configure_optimizers`` and put adapter parameters where they belong in its optimizers.

    Args:
        pl_module: The adapted module.
        build: Its own ``configure_optimizers``.
        replacements: What it may have built optimizers from.

    Returns:
        What that returned, and the optimizers and the schedulers in it.

    Raises:
        ValueError: If it chose nothing that is trained, or an adapter has no place.
    """
    try:
        returned = build()
    except (AssertionError, KeyError):  # it counts or looks up parameters by names and classes that it knows
        with hidden(pl_module):
            returned = build()
    except ValueError as error:
        if "empty parameter list" not in str(error):
            raise
        raise ValueError(
            "configure_optimizers gave its optimizer no parameter: it filters by requires_grad and what it chose "
            "is frozen now; list that module in LoRACallback(modules_to_save=[...])"
        ) from error
    optimizers, schedulers = _collect(returned)
    if not optimizers:
        raise ValueError(
            "configure_optimizers returned no optimizer, so the adapters would not be trained: return one over "
            "self.parameters()"
        )
    replacements.put_in(optimizers)
    doubt = place(pl_module, optimizers)
    if doubt is not None:
        rank_zero_warn(doubt)
    return returned, optimizers, schedulers


def _collect(returned: Any) -> tuple[list[Optimizer], list[Any]]:
    """Return the optimizers and schedulers in whatever nesting ``configure_optimizers`` returned them."""
    if hasattr(returned, "param_groups"):  # Lightning accepts optimizers without torch's base class
        return [returned], []
    if isinstance(returned, dict):
        returned = list(returned.values())
    if isinstance(returned, list | tuple):
        found = [_collect(item) for item in returned]
        return [o for optimizers, _ in found for o in optimizers], [s for _, schedulers in found for s in schedulers]
    return ([], [returned]) if hasattr(returned, "step") else ([], [])
