"""Run a model on batches without leaving a trace in it."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Loss = Callable[[Any], Any]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode for the length of a ``with`` block, and leave it as it was, also after an exception.

    Modes, ``requires_grad`` flags, gradients, buffers and random states (of PyTorch, NumPy and Python) come back bit
    for bit; what a module keeps in other attributes, as metrics do, does not.

    Args:
        model: Any module.
    """
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    devices = sorted({parameter.device.index or 0 for parameter, _, _ in parameters if parameter.is_cuda})
    with torch.random.fork_rng(devices):
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for parameter, flag, gradient in parameters:
                parameter.requires_grad_(flag)
                parameter.grad = gradient
            for module, name, buffer, values in buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, values):
                    with torch.no_grad():
                        buffer.copy_(values)
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)


@contextmanager
def loss_of(model: nn.Module, loss: Loss | None) -> Iterator[Loss]:
    """Give the function that turns a batch into a loss.

    Args:
        model: The model.
        loss: The function; None takes ``training_step`` of a LightningModule, on the module's device, while what it
            logs goes nowhere.

    Raises:
        ValueError: If there is neither.
    """
    if loss is not None:
        yield loss
        return
    step = getattr(model, "training_step", None)
    if step is None:
        raise ValueError(
            f"loss=None means the training_step of a LightningModule, and {type(model).__name__} has none: "
            "pass loss=lambda batch: ..., a function of a batch"
        )

    def of_step(batch: Any) -> Any:
        batch = model.transfer_batch_to_device(batch, next(model.parameters()).device, 0)  # type: ignore[operator]
        output = step(batch, 0)
        return output["loss"] if isinstance(output, dict) else output

    own: dict[str, Any] = {name: model.__dict__[name] for name in ("log", "log_dict") if name in model.__dict__}
    model.__dict__.update({"log": _log_nowhere, "log_dict": _log_nowhere})
    try:
        yield of_step
    finally:
        for name in ("log", "log_dict"):
            del model.__dict__[name]
        model.__dict__.update(own)


def _log_nowhere(*args: Any, **kwargs: Any) -> None:
    """Take the place of ``LightningModule.log``, which outside of a Trainer's loops warns or raises."""
