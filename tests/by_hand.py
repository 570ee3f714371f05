"""Training without a Trainer, and runs of one step per epoch: what the tests of methods with schedules share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
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


DDP = """
import os, sys
sys.path.insert(0, "{tests}")
import lightning.pytorch as L, torch, torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from conftest import Lit, loader
from lightning_lora import *

torch.manual_seed(int(os.environ.get("LOCAL_RANK", 0)))  # ranks differ, adapters must not
module = Lit()
L.Trainer(
    strategy=DDPStrategy(process_group_backend="gloo"), max_epochs=2, accelerator="cpu", devices=2, logger=False,
    enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    callbacks=[LoRACallback({method})],
).fit(module, loader(8))
own = torch.cat([p.detach().flatten() for p in module.parameters()])
both = [torch.empty_like(own) for _ in range(2)]
dist.all_gather(both, own)
assert torch.equal(*both), "replicas differ"
adapters = [site.adapter("default") for site in sites(module)]
assert all({ready} for one in adapters)
losses = [None, None]
dist.all_gather_object(losses, module.losses)
assert losses[0] != losses[1], "each rank has data of its own"
print("DONE")
"""


def train_two_processes(folder: Path, method: str, ready: str) -> None:
    """Train 8 steps in two processes, and check that their parameters are equal in the end.

    Args:
        folder: For the script.
        method: As written in Python.
        ready: What is to hold of each adapter, ``one``, in the end.
    """
    script = folder / "train.py"
    script.write_text(DDP.format(tests=Path(__file__).parent, method=method, ready=ready))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PL_", "PYTEST", "LOCAL_RANK"))}
    here = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**kept, "PYTHONPATH": here, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("DONE") == 2
