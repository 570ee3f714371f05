"""Jobs of two ranks that are told to go, for test_preempted_ranks.py: ``python preemption_processes.py FOLDER``.

What was found is written to ``FOLDER/found.json``; the folder holds a ``scontrol`` that is on the PATH.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "campaigns"))

import lightning.pytorch as L
from conftest import Lit, loader
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import Resumable, slurm, start, torchrun, trainer, wait
from signals import campaign

from lightning_lora import LoRA, LoRACallback, PreemptionCheckpoint
from lightning_lora.sites import clean


class Told(L.Callback):
    """Sends a signal to this rank only."""

    def __init__(self, step: int, batch: int | None, signum: int) -> None:
        self.step = step
        self.batch = batch  # of a validation
        self.signum = signum

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self.batch is None and trainer.global_step == self.step:
            os.kill(os.getpid(), self.signum)

    def on_validation_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        if self.batch == batch_idx and trainer.global_step == self.step:
            os.kill(os.getpid(), self.signum)


def job(
    rank: int, folder: Path, report: str, told: Told | None, validation: Callable[[int], int], **options: Any
) -> None:
    """Train two epochs of four steps, each rank on batches of its own."""
    logging.disable()
    warnings.simplefilter("ignore")
    module = Lit()
    callbacks = [LoRACallback(LoRA(r=2)), PreemptionCheckpoint(folder), ModelCheckpoint(folder / "others")]
    if told is not None and rank == 1:
        callbacks.append(told)
    run = trainer(callbacks=callbacks, max_epochs=2, num_sanity_val_steps=0, use_distributed_sampler=False, **options)
    share = list(range(rank * 16, rank * 16 + 16))
    batches = Resumable([loader(8).dataset[number] for number in share], batch_size=4)
    try:
        run.fit(module, batches, loader(validation(rank)), ckpt_path="last")
    finally:
        adapters = {clean(name): one.tolist() for name, one in module.named_parameters() if "lora_" in name}
        content = {"losses": module.losses, "adapters": adapters, "step": run.global_step}
        (folder / f"{report}-{rank}.json").write_text(json.dumps(content))


def reports(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(2)]


def both_runs(
    folder: Path, told: Told, variables: Any = torchrun, validation: Any = lambda rank: 2, **options: Any
) -> dict[str, Any]:
    """Run a job that is told to go, and the one after it."""
    folder.mkdir()
    run = partial(job, **options)
    codes = wait(start(2, run, folder, "first", told, validation, variables=variables), 60)
    then = wait(start(2, run, folder, "second", None, validation, variables=variables), 60)
    assert then == [0, 0], then
    first, second = reports(folder, "first"), reports(folder, "second")
    return {"codes": codes, "steps": [one["step"] for one in first], "first": first, "second": second}


def requeueing(folder: Path) -> dict[str, Any]:
    found = {}
    for signum in (signal.SIGUSR1, signal.SIGTERM):
        log = folder / "scontrol.log"
        log.unlink(missing_ok=True)
        found[signum.name] = both_runs(folder / signum.name, Told(2, None, signum), variables=slurm)
        found[signum.name]["requeued"] = log.read_text().splitlines() if log.exists() else []
    return found


def main(folder: Path) -> None:
    (folder / "whole").mkdir()
    assert wait(start(2, job, folder / "whole", "whole", None, lambda rank: 2), 60) == [0, 0]
    term = signal.SIGTERM
    found = {
        "whole": reports(folder / "whole", "whole"),
        "training": both_runs(folder / "training", Told(5, None, term)),
        "validation": both_runs(folder / "validation", Told(4, 0, term)),
        "lora_fsdp": both_runs(folder / "lora_fsdp", Told(5, None, term), strategy="lora_fsdp"),
        "lora_fsdp2": both_runs(folder / "lora_fsdp2", Told(5, None, term), strategy="lora_fsdp2"),
        "uneven": both_runs(folder / "uneven", Told(4, 2, term), validation=lambda rank: 2 + rank),
        "slurm": requeueing(folder),
        "campaign": [asdict(one) for one in campaign(1)],
    }
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
