"""The moment of injection: what is looked at before, and what is said after."""

from __future__ import annotations

from collections.abc import Callable

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_lora.callbacks.guards import (
    check_launcher,
    check_unwrapped,
    plain_linear,
    tied_to_frozen,
    without_dropout,
)
from lightning_lora.checkpoints import TASK
from lightning_lora.inject import restructures
from lightning_lora.method import Method
from lightning_lora.report import table, totals
from lightning_lora.sites import Site, sites
from lightning_lora.strategies.fsdp import is_wrapped


@plain_linear()
def adapt(
    trainer: Trainer,
    pl_module: LightningModule,
    method: Method,
    inject: Callable[[], list[Site]],
    *,
    adapted_before: bool,
    lr_ratio: float,
) -> tuple[list[Site], bool]:
    """Inject adapters into a module that is whole, unless an earlier run did, and show what is trained.

    Args:
        trainer: The Trainer.
        pl_module: Its module, after ``configure_model``.
        method: What is injected.
        inject: Injects it and returns the sites; where it did so before, it returns those.
        adapted_before: Whether the module had adapters before it was configured.
        lr_ratio: Learning rate of B divided by that of A.

    Returns:
        The sites, and whether some are new.
    """
    trainer.precision_plugin.convert_module(pl_module)  # plugins that replace layers would replace adapted ones
    wrapped = is_wrapped(pl_module)  # by an earlier run; weights have other shapes now
    if not wrapped:
        check_unwrapped(pl_module)
    known = len(sites(pl_module))
    if adapted_before and not known:
        rank_zero_warn(
            f"{type(pl_module).__name__} built its layers anew, so what was trained in it is gone and its adapters "
            "are fresh: pass ckpt_path, or let it build only what is not there yet"
        )
    restructured = restructures(pl_module, method, TASK)  # an earlier run chose ranks and places
    found = sites(pl_module, TASK) if restructured or wrapped else inject()
    if len(found) == known:
        return found, False
    check_launcher(trainer.strategy)
    tied = tied_to_frozen(pl_module)
    if tied is not None:
        rank_zero_warn(tied)
    rank_zero_info(f"{table(found)}\n{totals(pl_module)}")
    for doubt in method.doubts(lr_ratio):
        rank_zero_warn(doubt)
    vain = without_dropout(pl_module, found)
    if vain:
        rank_zero_warn(
            f"the adapters' dropout has no effect at {len(vain)} matrices (first: {vain[0]}): the forward of "
            "their layer reads them, or looks rows up, instead of multiplying an input by them"
        )
    return found, True
