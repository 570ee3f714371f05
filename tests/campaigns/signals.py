"""Signals at random moments to both ranks, to rank 0, to rank 1: does the job save, and is every rank gone in time?

``python tests/campaigns/signals.py --signals 20`` prints the figures; ``--stock`` leaves ``PreemptionCheckpoint`` out,
which shows what Lightning's own handler does. A moment lies in the first second and a half after the job's set-up
began, so some signals come before the first step.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import lightning.pytorch as L
import torch
from conftest import Lit, loader
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import start, trainer, wait, wait_for

from lightning_lora import LoRA, LoRACallback, PreemptionCheckpoint

TARGETS = {"both": (0, 1), "rank 0": (0,), "rank 1": (1,)}
GRACE = 30.0


@dataclass(frozen=True)
class Outcome:
    """What became of one job.

    Args:
        target: Which ranks got the signal.
        codes: Exit codes by rank, None of one that was not gone in time.
        steps: The step at which each rank left.
        saved: The step of the checkpoint, None without a readable one.
        seconds: From the signal to the last rank's end.
    """

    target: str
    codes: list[int | None]
    steps: list[int | None]
    saved: int | None
    seconds: float

    @property
    def hung(self) -> bool:
        return None in self.codes

    @property
    def good(self) -> bool:
        return self.saved is not None and self.steps == [self.saved] * 2 and self.codes == [128 + signal.SIGTERM] * 2


class Slow(Lit):
    def training_step(self, batch, batch_idx):
        time.sleep(0.003)
        return super().training_step(batch, batch_idx)


class Announces(L.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.path.touch()


def job(rank: int, folder: Path, stock: bool) -> None:
    """Train until told to go."""
    logging.disable()
    warnings.simplefilter("ignore")
    ours = [] if stock else [PreemptionCheckpoint(folder), ModelCheckpoint(folder / "others", every_n_epochs=1000)]
    run = trainer(
        callbacks=[LoRACallback(LoRA(r=2)), *ours, Announces(folder / f"set-up-{rank}")],
        enable_checkpointing=not stock,
        max_epochs=-1,
    )
    try:
        run.fit(Slow(), loader(40), loader(8))
    finally:
        (folder / f"left-{rank}").write_text(str(run.global_step))


def trial(target: str, stock: bool, moment: float) -> Outcome:
    """Run one job and signal it."""
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        ranks = start(2, job, folder, stock)
        wait_for([folder / f"set-up-{rank}" for rank in range(2)])
        time.sleep(moment)
        began = time.monotonic()
        for rank in TARGETS[target]:
            os.kill(ranks[rank].pid or 0, signal.SIGTERM)
        codes = wait(ranks, GRACE)
        seconds = time.monotonic() - began
        left = [folder / f"left-{rank}" for rank in range(2)]
        steps = [int(one.read_text()) if one.exists() else None for one in left]
        file = folder / "preempted.ckpt"
        saved = torch.load(file)["global_step"] if file.exists() else None
        return Outcome(target, codes, steps, saved, seconds)


def campaign(signals: int, stock: bool = False, seed: int = 0) -> list[Outcome]:
    """Run the jobs one after the other."""
    moments = random.Random(seed)
    return [trial(target, stock, moments.uniform(0, 1.5)) for target in TARGETS for _ in range(signals)]


def table(outcomes: Sequence[Outcome]) -> str:
    lines = ["| target | signals | saved, and both ranks left at that step with 143 | hung | nothing saved | seconds |"]
    lines += ["|---|---|---|---|---|---|"]
    for target in TARGETS:
        some = [one for one in outcomes if one.target == target]
        seconds = f"{min(one.seconds for one in some):.1f} to {max(one.seconds for one in some):.1f}"
        counts = (len(some), sum(o.good for o in some), sum(o.hung for o in some), sum(o.saved is None for o in some))
        lines.append(f"| {target} | {' | '.join(map(str, counts))} | {seconds} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--signals", type=int, default=20, help="to each target")
    parser.add_argument("--stock", action="store_true", help="Lightning's own handler")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write every outcome")
    chosen = parser.parse_args()
    outcomes = campaign(chosen.signals, chosen.stock, chosen.seed)
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(one) for one in outcomes]))
    print(table(outcomes))
