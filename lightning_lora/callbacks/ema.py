"""`AdapterEMA`: a moving average of what is trained; it is validated, saved, and left in the model after a fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_lora.callbacks.averaging import averaging_callbacks
from lightning_lora.callbacks.guards import check_strategy
from lightning_lora.moving_average import MovingAverage

_CURRENT = "current_model_state"  # Lightning's averaging callbacks call it so too
_WIDE = "averaging_state"


class AdapterEMA(Callback):
    """Average every parameter that requires a gradient, adapters and what is trained in full, while it is trained.

    The frozen base is neither averaged nor copied. The average starts as the values after the first step that counts.
    It is in the model during the validation of a fit, and when the fit has ended; training goes on from the current
    values. Checkpoints hold it as their ``state_dict``, and the current values for resuming beside it. Buffers, such
    as running statistics, are not averaged: the current ones are used and saved.

    Args:
        decay: Share of the average that each update keeps, from 0 to below 1.
        update_every_n_steps: Update after the optimizer steps whose index, counted from 0, is a multiple of this.
        update_starting_at_step: Index of the first optimizer step that counts; before it there is no average.

    Raises:
        ValueError: If a value is out of its range.
    """

    def __init__(self, decay: float = 0.999, update_every_n_steps: int = 1, update_starting_at_step: int = 0) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay!r}: must be at least 0 and below 1, for example AdapterEMA(decay=0.999)")
        if update_every_n_steps < 1:
            raise ValueError(f"update_every_n_steps={update_every_n_steps!r}: must be at least 1, which is every step")
        if update_starting_at_step < 0:
            raise ValueError(f"update_starting_at_step={update_starting_at_step!r}: must be at least 0, the first step")
        self.decay = decay
        self.update_every_n_steps = update_every_n_steps
        self.update_starting_at_step = update_starting_at_step
        self._average = MovingAverage(decay)
        self._steps = 0
        self._loss_scale = 1.0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start without an average; that of a fit that ended stays until the next, for checkpoints saved after it."""
        for other in averaging_callbacks(trainer):
            raise ValueError(
                f"{type(other).__name__} and AdapterEMA would both put averages into the model: leave one of them out"
            )
        if stage == "fit" or not self._average.set_aside:
            self._average = MovingAverage(self.decay)
        if stage == "fit":
            check_strategy(trainer.strategy)
            present: Any = trainer.strategy.lightning_module_state_dict
            gather = present.gather if isinstance(present, _AveragedStateDict) else present
            trainer.strategy.lightning_module_state_dict = _AveragedStateDict(gather, self, trainer)  # type: ignore[method-assign]

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go where the strategy has moved the module."""
        self._average.follow(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count steps from here."""
        self._steps = trainer.global_step
        self._loss_scale = _loss_scale(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average if an optimizer took a step that counts."""
        before, self._steps = self._steps, trainer.global_step
        if self._steps == before:
            return
        scale_before, self._loss_scale = self._loss_scale, _loss_scale(trainer)
        overflowed = self._loss_scale < scale_before  # so the gradient scaler left the step out
        if not overflowed and any(self._counts(step) for step in range(before, self._steps)):
            self._average.update(pl_module)

    def _counts(self, step: int) -> bool:
        return step >= self.update_starting_at_step and step % self.update_every_n_steps == 0

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the average, where the validation is part of a fit."""
        if _fitting(trainer):
            self._average.put_in(pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Train on from the current values."""
        if _fitting(trainer):
            self._average.take_out(pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the model."""
        self._average.put_in(pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the model also where a resumed run had nothing left to train."""
        self._average.follow(pl_module)
        self._average.put_in(pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the current values back if it was the validation that stopped."""
        if _fitting(trainer) and not trainer.training:
            self._average.take_out(pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Say how it averages; a stateful callback is also one that Lightning refuses to have twice."""
        return {"decay": self.decay}

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what resuming needs beside the average."""
        if self._average.set_aside and not self._average.is_in(pl_module):
            return  # the model was given other values after the fit
        current, wide = self._average.other_state(pl_module)
        if current:
            checkpoint.update({_CURRENT: current, _WIDE: wide})

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Train on from the current values; what Lightning has loaded into the model is the average."""
        if _fitting(trainer) and _CURRENT in checkpoint:
            self._average.restore(pl_module, checkpoint[_CURRENT], checkpoint[_WIDE])


class _AveragedStateDict:
    """Takes the place of a strategy's ``lightning_module_state_dict``, which weights-only saves pass too."""

    def __init__(self, gather: Callable[[], dict[str, Any]], callback: AdapterEMA, trainer: Trainer) -> None:
        self.gather = gather
        self.callback = callback
        self.trainer = trainer

    def __call__(self) -> dict[str, Any]:
        return self.callback._average.averaged_state(self.trainer.lightning_module, self.gather())


def _fitting(trainer: Trainer) -> bool:
    return trainer.state.fn == "fit"


def _loss_scale(trainer: Trainer) -> float:
    """Return the gradient scaler's scale, which falls when gradients overflow; 1 without a scaler."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())
