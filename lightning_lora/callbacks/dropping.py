"""LoRA-drop in a run: at the end of its sample, measure, leave adapters to those that matter, and train on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer

from lightning_lora.callbacks.silent_batches import check_looks, silent_losses
from lightning_lora.checkpoints import TASK
from lightning_lora.importance import Importance, alike, check_measurable, select
from lightning_lora.method import Method
from lightning_lora.methods.lora_drop import LoRADrop, Sample
from lightning_lora.optim import release
from lightning_lora.report import importance_table, totals
from lightning_lora.schedule import Schedule
from lightning_lora.sharing import share, shares
from lightning_lora.sites import sites


def check_droppable(pl_module: LightningModule, method: Method) -> None:
    """Check, before a run, what would stop it at the end of the sample.

    Args:
        pl_module: The adapted module.
        method: Its method; others than LoRA-drop pass.

    Raises:
        ValueError: If importances cannot be measured.
    """
    if isinstance(method, LoRADrop):
        check_looks(pl_module)
        check_measurable(pl_module, TASK)


def keep_selection(
    pl_module: LightningModule, schedules: Sequence[Schedule], targets: Callable[[], Sequence[object]]
) -> None:
    """Sample no second time where an earlier run dropped adapters: what it selected stays, and trains on.

    Args:
        pl_module: The adapted module, as this run finds it or as a checkpoint left it.
        schedules: Those of the run.
        targets: Returns the matrices that a first run adapts.
    """
    for sample in schedules:
        if not isinstance(sample, Sample):
            continue
        found = sites(pl_module, TASK)
        here = len(targets()) if sample.method.rest == "none" else len(found)
        sample.was_before = here > len(found) or bool(shares(pl_module, TASK))
        if sample.was_before and not sample.importances:
            rank_zero_info(
                "LoRA-drop selected in an earlier run: its selection stays and no sample is taken. For a new one call "
                "remove(module) before the fit"
            )


def drop_if_due(
    trainer: Trainer,
    pl_module: LightningModule,
    schedules: Sequence[Schedule],
    split: Callable[[Optimizer], None],
) -> bool:
    """End the sample if its last step is done: what was trained until now decides which adapters there are.

    Args:
        trainer: The Trainer, between two batches.
        pl_module: The adapted module.
        schedules: Those of the run.
        split: Divides the groups of an optimizer by role, as they were.

    Returns:
        Whether the adapters are others now.
    """
    sample = next((one for one in schedules if isinstance(one, Sample) and one.ends_now), None)
    if sample is None:
        return False
    method = sample.method
    found = Importance(pl_module, TASK).to(pl_module.device)
    with found.watching(), torch.no_grad():
        for _ in silent_losses(trainer, pl_module, sample.steps * trainer.accumulate_grad_batches):
            pass
    sample.importances = found.compute()
    kept = select(sample.importances, alike(pl_module, TASK), threshold=method.threshold, top_n=method.top_n)
    before = [p for site in sites(pl_module, TASK) for p in site.adapter(TASK).parameters()]
    share(pl_module, kept, TASK)
    adapters = {site.name: site.adapter(TASK) for site in sites(pl_module, TASK)}
    here = {p for adapter in adapters.values() for p in adapter.parameters() if p.requires_grad}
    fresh = {p for name, adapter in adapters.items() if method.reinit or name not in kept for p in adapter.parameters()}
    for optimizer in trainer.strategy.optimizers:
        release(optimizer, [p for p in before if p not in here], fresh & here)
        split(optimizer)
    for parameter in before:
        parameter.grad = None
    _wrap_again(trainer, pl_module)
    rank_zero_info(f"{importance_table(sample.importances, kept, shares(pl_module, TASK))}\n{totals(pl_module)}")
    return True


def _wrap_again(trainer: Trainer, pl_module: LightningModule) -> None:
    """Have DDP reduce the gradients of the parameters that there are now; it looked at them when it was built."""
    strategy = trainer.strategy
    if hasattr(strategy, "configure_ddp") and strategy.model is not pl_module:
        strategy.model = pl_module
        strategy.configure_ddp()
