"""A user's script, for test_launchers.py: ``launched_job.py FOLDER NODES DEVICES``; four examples make a step."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from conftest import Lit, loader
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import Resumable
from torch.utils.data import DistributedSampler

from lightning_lora import LoRA, LoRACallback, PreemptionCheckpoint

EPOCHS = 10


class Unhurried(L.Callback):
    """Says when three steps are done, and takes its time from there on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step >= 3:
            (self.folder / f"under-way-{trainer.global_rank}").touch()
            time.sleep(0.2)


def job(folder: Path, nodes: int, devices: int, *callbacks: L.Callback) -> Lit:
    world, rank = nodes * devices, int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0)))
    examples = loader(4).dataset
    share = DistributedSampler(examples, world, rank, shuffle=False)
    leave = PreemptionCheckpoint(folder)
    run = L.Trainer(
        accelerator="cpu",
        devices=devices,
        num_nodes=nodes,
        strategy="lora_ddp" if world > 1 else "auto",
        max_epochs=EPOCHS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[LoRACallback(LoRA(r=2, alpha=4)), leave, ModelCheckpoint(folder / "epochs"), *callbacks],
    )
    module = Lit()
    run.fit(module, Resumable(examples, batch_size=4 // world, sampler=share), ckpt_path="last")
    return module


if __name__ == "__main__":
    torch.set_num_threads(1)
    path = Path(sys.argv[1])
    try:
        job(path, int(sys.argv[2]), int(sys.argv[3]), Unhurried(path))
    except SystemExit as end:
        (path / f"left-{os.environ.get('RANK', os.environ.get('LOCAL_RANK'))}").write_text(str(end.code))
        raise
