"""The schedules of one run: made when its optimizers are, called around their steps, saved and resumed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_lora.callbacks.guards import check_scaled
from lightning_lora.checkpoints import TASK
from lightning_lora.method import Method
from lightning_lora.optim import the_optimizer
from lightning_lora.report import rank_table
from lightning_lora.schedule import Schedule
from lightning_lora.sites import sites


class Schedules(Sequence[Schedule]):
    """What a method does around the steps of the optimizer that trains its adapters; empty for most methods."""

    def __init__(self) -> None:
        self._schedules: list[Schedule] = []
        self._states: Sequence[dict[str, Any]] = ()
        self._optimizer: Optimizer | None = None
        self._hook: RemovableHandle | None = None

    def __getitem__(self, index: Any) -> Any:
        """Return one of them."""
        return self._schedules[index]

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._schedules)

    def start(self, trainer: Trainer, pl_module: LightningModule, method: Method, optimizers: list[Optimizer]) -> None:
        """Make them, with the state of the run that is resumed, and have them called after each real step.

        Args:
            trainer: The Trainer.
            pl_module: The adapted module.
            method: Its method.
            optimizers: All there are.

        Raises:
            ValueError: If several optimizers train adapters, or the run's length is needed and not known.
        """
        batches = trainer.estimated_stepping_batches if method.needs_total_steps else -1
        total = int(batches) if 0 <= batches < float("inf") else None  # -1 or inf: a run without an end
        self._schedules = method.schedules(sites(pl_module, TASK), TASK, total)
        if not self._schedules:
            return
        self._optimizer = the_optimizer(pl_module, optimizers, type(method).__name__)
        check_scaled(trainer, self._optimizer, type(method).__name__)
        self.load_state_dict(self._states)
        self._states = ()
        self._hook = self._optimizer.register_step_post_hook(lambda optimizer, *_: self._after_step(optimizer))

    def before_step(self, optimizer: Optimizer) -> None:
        """Let them see the gradients, if they are those of the optimizer that trains the adapters."""
        if optimizer is self._optimizer:
            for schedule in self._schedules:
                schedule.before_step(optimizer)

    def _after_step(self, optimizer: Optimizer) -> None:
        for schedule in self._schedules:
            schedule.after_step(optimizer)

    def log(self, pl_module: LightningModule) -> None:
        """Log what they have to say of a batch."""
        for schedule in self._schedules:
            pl_module.log_dict(schedule.metrics())

    def show_ranks(self) -> None:
        """Show the ranks that training came to, where it changed them."""
        for schedule in self._schedules:
            if schedule.ranks():
                rank_zero_info(rank_table(schedule.ranks()))

    def stop(self) -> None:
        """Leave nothing of the run in the adapters or on the optimizer; the state can still be saved."""
        for schedule in self._schedules:
            schedule.end()
        if self._hook is not None:
            self._hook.remove()
        self._optimizer = self._hook = None

    def state_dicts(self) -> list[dict[str, Any]]:
        """Return the state of each."""
        return [schedule.state_dict() for schedule in self._schedules]

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Take the states that were saved; before a run's optimizers are there they are kept until then."""
        if self._optimizer is None:
            self._states = states
            return
        for schedule, state in zip(self._schedules, states, strict=False):
            schedule.load_state_dict(state)  # also what finds learning rates and batch sizes goes back to the start
