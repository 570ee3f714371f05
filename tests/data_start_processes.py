"""Starts from data in two processes over gloo; test_initialisations.py runs it with a folder to write to."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from conftest import Net
from torch import Tensor, nn
from torch.multiprocessing import start_processes

from lightning_lora import LoRA, inject, sites, start_from_data


def started(init: Any, batches: list[Tensor]) -> dict[str, Tensor]:
    """The adapters' state after a start from these batches."""
    torch.manual_seed(7)
    model = Net().double()
    spread = 2.0 if init == "eva" else 1.0
    inject(model, LoRA(r=1, init=init, init_similarity=1.0, rank_spread=spread), seed=1)
    start_from_data(model, batches, lambda batch: model(batch).square().mean())
    return {f"{s.name}.{k}": v for s in sites(model) for k, v in s.adapter("default").state_dict().items()}


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    scale = torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    return [torch.randn(6, 4, generator=generator, dtype=torch.float64) * scale for _ in range(4)]


def streams() -> list[list[Tensor]]:
    """What two processes read: one batch again and again, which ends early, and batches that take a while to settle."""
    generator = torch.Generator().manual_seed(5)
    scale = torch.tensor([3.0, 2.3, 1.6, 1.0], dtype=torch.float64)
    moving = [torch.randn(8, 4, generator=generator, dtype=torch.float64) * scale for _ in range(30)]
    return [moving[:1] * 3, moving]


def settled(batches: list[Tensor]) -> tuple[int, Tensor]:
    """How many batches EVA reads, and the start that they give."""
    model, read = nn.Sequential(nn.Linear(4, 3, dtype=torch.float64)), []
    [site] = inject(model, LoRA(r=2, init="eva", init_batches=30), ["0"], seed=1)
    assert start_from_data(model, batches, lambda batch: read.append(model(batch))) == []
    return len(read), site.adapter("default").lora_A.detach()


def process(rank: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for init in ("eva", "lora_ga"):
        torch.save(started(init, data()[rank::2]), f"{folder}/{init}-{rank}.pt")
    torch.save(settled(streams()[rank]), f"{folder}/settled-{rank}.pt")
    torch.save(settled(streams()[1][rank::2]), f"{folder}/moving-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    start_processes(process, (sys.argv[1],), nprocs=2, start_method="fork")
    assert Path(sys.argv[1], "eva-1.pt").exists()
