"""Training without a Trainer, and runs of one step per epoch: what the tests of methods with schedules share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from conftest import Lit, Net, loader
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lightning_lora import LoRACallback, Method, inject, sites

Build = Callable[[list[nn.Parameter]], Optimizer]


def net(dtype: torch.dtype = torch.float64) -> Net:
    """Return the same network at every call."""
    torch.manual_seed(7)
    return Net().to(dtype)


def batches(steps: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    """Return the same batches at every call."""
    generator = torch.Generator().manual_seed(11)
    return [
        (torch.randn(6, 4, generator=generator, dtype=dtype), torch.randn(6, 3, generator=generator, dtype=dtype))
        for _ in range(steps)
    ]


def adamw(parameters: list[nn.Parameter]) -> Optimizer:
    return AdamW(parameters, lr=0.02, weight_decay=0.1)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(
    model: nn.Module, method: Method, steps: int, build: Build = adamw, dtype: torch.dtype = torch.float64
) -> Optimizer:
    """Adapt a network and train it by hand; the start is the same for every method of one rank."""
    inject(model, method, seed=1, dtype=dtype)
    optimizer = build(trainable(model))
    schedules = method.schedules(sites(model), "default")
    for x, y in batches(steps, dtype):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        for schedule in schedules:
            schedule.before_step(optimizer)
        optimizer.step()
        for schedule in schedules:
            schedule.after_step(optimizer)
    return optimizer


def weights(model: nn.Module) -> list[Tensor]:
    """Return the weights that the model computes with."""
    return [one.adapter("default").adapted(one.module.weight).detach() for one in sites(model)]


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of what is trained."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def run(trainer: Any, module: Lit, steps: int, method: Method, ckpt_path: Any = None, **options: Any) -> Any:
    """Train for epochs of one step each, so that a checkpoint after any step is one at an epoch's end."""
    made = trainer(callbacks=[LoRACallback(method)], max_epochs=steps, **options)
    made.fit(module, loader(1), ckpt_path=ckpt_path)
    return made
