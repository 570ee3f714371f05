"""`Schedule`: what a method does around the steps of an optimizer, with the state that a resumed run needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer


class Schedule:
    """What a method does around each optimizer step of one run; children override what they need.

    By hand: ``loss.backward(); schedule.before_step(optimizer); optimizer.step(); schedule.after_step(optimizer)``, and
    ``schedule.end()`` behind the last step.
    With gradient accumulation these surround real steps only; a step that a GradScaler skips is none.

    Attributes:
        step: Number of optimizer steps that are done.
    """

    def __init__(self) -> None:
        self.step = 0

    def before_step(self, optimizer: Optimizer) -> None:
        """Look at or change gradients: they are whole and not scaled, and not clipped yet.

        Args:
            optimizer: The one that trains the adapters.
        """

    def after_step(self, optimizer: Optimizer) -> None:
        """Look at or change parameters after an update, and count it: children call this one last.

        Args:
            optimizer: The one that trains the adapters; gradients are still there, and clipped.
        """
        self.step += 1

    def metrics(self) -> dict[str, float]:
        """Return what to log at every batch, by name; it must cost nothing."""
        return {}

    def ranks(self) -> dict[str, int]:
        """Return the rank that each site has now, by the site's name, where training changes ranks."""
        return {}

    def end(self) -> None:
        """Leave nothing of the run in the adapters: no step comes any more."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as tensors and plain types, so that checkpoints load with weights only."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state of the run that is resumed; the adapters have their values already."""
        self.step = state["step"]
