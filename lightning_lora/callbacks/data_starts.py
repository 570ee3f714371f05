"""Give adapters their start from the run's own training data, before a strategy wraps the module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_lora.callbacks.silent_batches import silent_losses
from lightning_lora.data_starts import looks_at_data, start_from_losses
from lightning_lora.method import Method
from lightning_lora.methods.lora import LoRA
from lightning_lora.report import rank_table
from lightning_lora.sites import sites


def start_when_restored(trainer: Trainer, pl_module: LightningModule, method: Method, now: bool) -> Callable[[], None]:
    """Have the factors set by batches of training data once it is known that no checkpoint sets them.

    That is between the restoring of a checkpoint and the wrapping of the module, where Lightning has no hook: the
    strategy's ``setup`` is replaced on this one object, until it has run.

    Args:
        trainer: The Trainer, in ``fit``.
        pl_module: Its module, with adapters that nothing has trained.
        method: Theirs; one whose start looks at no data changes nothing.
        now: Do it at once, because something copies the module before that.

    Returns:
        What takes the replacement back.
    """
    strategy: Any = trainer.strategy
    if looks_at_data(method) and now:
        _start(trainer, pl_module, method)
    elif looks_at_data(method):

        def setup(*args: Any, **kwargs: Any) -> None:
            undo()
            if not trainer._checkpoint_connector._loaded_checkpoint:
                _start(trainer, pl_module, method)
            strategy.setup(*args, **kwargs)

        strategy.__dict__["setup"] = setup

    def undo() -> None:
        if looks_at_data(method):
            strategy.__dict__.pop("setup", None)

    return undo


def _start(trainer: Trainer, pl_module: LightningModule, method: LoRA) -> None:
    pl_module.to(trainer.strategy.root_device)  # now, so that what is put back afterwards is there already
    unseen = start_from_losses(pl_module, silent_losses(trainer, pl_module, method.init_batches))
    if unseen:
        rank_zero_warn(
            f"{len(unseen)} matrices keep LoRA's own start (first: {unseen[0]}), because the batches did not reach "
            f"them, or init={method.init!r} cannot see what goes into them"
        )
    if method.restructures:
        rank_zero_info(rank_table({site.name: site.adapter("default").method.r for site in sites(pl_module)}))
