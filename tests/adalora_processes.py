"""AdaLoRA in two processes and in one, on the same examples.

Run by test_adalora.py as ``python adalora_processes.py FOLDER``, because processes are best forked where nothing was
computed yet. It writes what it found to ``FOLDER/found.json``.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from conftest import Lit, loader
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.multiprocessing import start_processes
from torch.utils.data import DataLoader, Subset

from lightning_lora import AdaLoRA, LoRACallback


def fit(data: DataLoader[Any], **options: Any) -> tuple[Lit, Tensor]:
    """Train for 24 steps, and return the module and which triplets were kept."""
    callback = LoRACallback(AdaLoRA(r=4, target_r=2, initial_steps=4, final_steps=6))
    module = Lit()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"accelerator": "cpu", "enable_checkpointing": False, "max_epochs": 3, "devices": 1}
    L.Trainer(**quiet | options, callbacks=[callback]).fit(module, data)
    [schedule] = callback._schedules
    return module, torch.cat([kept.flatten() for kept in schedule.kept.values()])


def main(rank: int, folder: Path) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # not used: the group is made here
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    data = loader(8, 8).dataset
    share = DataLoader(Subset(data, range(rank, 64, 2)), batch_size=4)
    strategy = DDPStrategy(process_group_backend="gloo")
    module, kept = fit(share, strategy=strategy, devices=2, use_distributed_sampler=False)
    own = torch.cat([kept.float(), *[p.detach().flatten() for p in module.parameters()]])
    both = [torch.empty_like(own) for _ in range(2)]
    dist.all_gather(both, own)
    dist.destroy_process_group()
    if rank == 0:
        for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
        _, alone = fit(loader(8, 8))
        found = {"alike": torch.equal(*both), "masks": kept.tolist(), "masks_of_one_process": alone.tolist()}
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    logging.disable()
    start_processes(main, (Path(sys.argv[1]),), nprocs=2, start_method="fork")
