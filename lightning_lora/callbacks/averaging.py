"""Callbacks that average weights: they copy the whole module in their ``setup``, and average frozen weights too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_lora.callbacks.guards import frozen_norms
from lightning_lora.derived_groups import PARENT
from lightning_lora.method import Method
from lightning_lora.methods.delta_lora import DeltaLoRA
from lightning_lora.strategies.replication import ReplicatesAdapters

_NAMES = {"WeightAveraging", "StochasticWeightAveraging"}  # names, as pytorch_lightning has classes of its own


def averaging_callbacks(trainer: Trainer) -> list[Callback]:
    """Return the callbacks of a Trainer that average weights."""
    return [one for one in trainer.callbacks if _NAMES & {cls.__name__ for cls in type(one).__mro__}]  # type: ignore[attr-defined]


def check_order(trainer: Trainer, ours: Callback) -> None:
    """Raise ``ValueError`` if a callback copies the module before the adapters are in it.

    Args:
        trainer: The Trainer.
        ours: The callback that injects.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for one in averaging_callbacks(trainer):
        if callbacks.index(one) < callbacks.index(ours):
            raise ValueError(
                f"{type(one).__name__} copies the module before the adapters are in it: put {type(ours).__name__} "
                "before it in Trainer(callbacks=[...]); or use AdapterEMA, which averages only what is trained and may "
                "stand anywhere in the list"
            )


def check_averageable(trainer: Trainer, method: Method) -> None:
    """Raise ``ValueError`` if a callback would average tensors that a method replaces along the run.

    Args:
        trainer: The Trainer.
        method: What the run trains.
    """
    found = [] if method.averageable == "all" else averaging_callbacks(trainer)
    instead = "use AdapterEMA, which averages only what is trained"
    if method.averageable == "nothing":
        found += [one for one in trainer.callbacks if type(one).__name__ == "AdapterEMA"]  # type: ignore[attr-defined]
        instead = "leave it out"
    if found:
        raise ValueError(
            f"{type(found[0]).__name__} would average what {type(method).__name__} replaces along the run with what it "
            f"was before, which means nothing: {instead}"
        )


def check_divided(trainer: Trainer, method: Method) -> None:
    """Check that nothing of a run needs the base whole where the strategy divides it.

    Args:
        trainer: The Trainer.
        method: What the run trains.

    Raises:
        ValueError: If a callback copies the module, or the method writes to the base.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, ReplicatesAdapters):
        return
    for one in averaging_callbacks(trainer):
        raise ValueError(
            f"{type(one).__name__} copies the whole module, and {type(strategy).__name__} divides its base: use "
            "AdapterEMA, which averages only what is trained"
        )
    if isinstance(method, DeltaLoRA) and method.in_place:
        raise ValueError(
            f"in_place=True writes to the base, and {type(strategy).__name__} divides it: use in_place=False, which "
            "computes the same"
        )


def check_norms(trainer: Trainer, module: LightningModule) -> None:
    """Raise ``ValueError`` if running statistics that are held still would be reset and not be measured again."""
    for one in averaging_callbacks(trainer):
        if type(one).__name__ == "StochasticWeightAveraging" and frozen_norms(module):
            raise ValueError(
                f"{type(one).__name__} resets the running statistics of all BatchNorm layers, and the frozen ones are "
                "not measured again: use EMAWeightAveraging, or list these layers in modules_to_save"
            )


def extend_rates(trainer: Trainer) -> None:
    """Let SWA take one rate for each of the user's groups although there are derived groups, which follow these."""
    groups = trainer.optimizers[0].param_groups
    derived = [group for group in groups if PARENT in group]
    for one in averaging_callbacks(trainer):
        rates: Any = getattr(one, "_swa_lrs", None)
        if isinstance(rates, list) and len(rates) == len(groups) - len(derived):
            one._swa_lrs = [*rates, *(rates[group[PARENT]] for group in derived)]  # type: ignore[attr-defined]


def leave_frozen_weights(trainer: Trainer) -> None:
    """Keep the average of equal values that very value: rounding would let the frozen base drift."""
    for one in averaging_callbacks(trainer):
        for holder, name in ((getattr(one, "_average_model", None), "avg_fn"), (one, "_avg_fn")):  # EMA's and SWA's
            average = getattr(holder, name, None)
            if average is not None and not isinstance(average, _Exact):
                setattr(holder, name, _Exact(average))


class _Exact:
    """An averaging function that leaves equal values alone.

    Args:
        average: The function.
    """

    def __init__(self, average: Callable[[Tensor, Tensor, Any], Tensor]) -> None:
        self.average = average

    def __call__(self, averaged: Tensor, current: Tensor, count: Any) -> Tensor:
        """Average two tensors, the first of which is already an average of ``count``."""
        return torch.where(averaged == current, averaged, self.average(averaged, current, count))
