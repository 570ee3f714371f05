"""The loop that the experiments share: a model, a method of the library, its schedule, and what is measured."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_lora import Method, param_groups, sites


def fit(
    model: nn.Module, method: Method, loss_of: Callable[[int], Tensor], *, steps: int, lr: float, lr_ratio: float = 1.0
) -> list[float]:
    """Train what ``inject`` left trainable with AdamW, without weight decay, and with the method's schedules.

    Args:
        model: The adapted model.
        method: What it was adapted with.
        loss_of: The loss of a step, by its number.
        steps: How many steps.
        lr: Learning rate, the same at every step.
        lr_ratio: Learning rate of B divided by ``lr`` (LoRA+).

    Returns:
        The loss of each step, before its update.
    """
    optimizer = torch.optim.AdamW(param_groups(model, lr, lr_ratio=lr_ratio))
    schedules = method.schedules(sites(model), "default", steps)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(step)
        loss.backward()
        for schedule in schedules:
            schedule.before_step(optimizer)
        optimizer.step()
        for schedule in schedules:
            schedule.after_step(optimizer)
        losses.append(loss.item())
    return losses
