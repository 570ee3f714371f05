"""Runs to be resumed, for test_exact_resume.py; ``python exact_resumes.py FOLDER`` runs those of two processes.

What these found is written to ``FOLDER/found.json``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from conftest import Lit, loader
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import start, trainer, wait
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_lora import LoRA, LoRACallback
from lightning_lora.method import Method

BATCHES = 4
EPOCHS = 4


class Placed(DataLoader[Any]):
    """Goes on where it was, in the order that it had: both are in its state.

    Args:
        dataset: The examples.
        shuffle: Whether each epoch draws an order of its own, from PyTorch's global generator.
    """

    def __init__(self, dataset: Any, shuffle: bool) -> None:
        super().__init__(dataset, batch_size=4)
        self.shuffle = shuffle
        self.order: list[int] = []
        self.given = 0
        self.loaded = False

    def __iter__(self) -> Any:
        if not self.loaded:
            number = len(self.dataset)
            self.order = torch.randperm(number).tolist() if self.shuffle else list(range(number))
            self.given = 0
        self.loaded = False
        return map(self.take, range(self.given, len(self)))

    def take(self, number: int) -> Any:
        self.given = number + 1
        return self.collate_fn([self.dataset[index] for index in self.order[4 * number : 4 * number + 4]])

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.given, self.loaded = state["order"], state["given"], True


class Noisy(Dataset[Any]):
    """Examples with noise from all three global generators, drawn when they are fetched."""

    def __init__(self) -> None:
        self.examples: Any = loader(BATCHES).dataset

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.examples[index]
        return x + torch.randn(4) + random.random() + np.random.standard_normal(), y


def seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def train(
    folder: Path,
    batches: Any,
    resumed: str | None = None,
    method: Method | None = None,
    callbacks: tuple[L.Callback, ...] = (),
    seed_by: int = 0,
    module: Lit | None = None,
    validation: Any = None,
    again: bool = False,
    **options: Any,
) -> Lit:
    """Train a new module for some epochs of four steps; resumed runs start from other random numbers.

    Args:
        folder: Where a checkpoint is written after each epoch and after every third step.
        batches: The training loader.
        resumed: The checkpoint in that folder to go on from.
        method: Of the adapters.
        callbacks: More of them.
        seed_by: Added to the seed.
        module: Another one than the usual.
        validation: The validation loader.
        again: Whether a resumed run writes checkpoints too.
        options: Of the Trainer.

    Returns:
        The module, with ``drawn``: the next number of each global generator when training had ended.
    """
    seed(seed_by + (1000 if resumed else 0))
    module = module or Lit()
    kept = -1 if again or not resumed else 0
    savers = (
        ModelCheckpoint(folder, "{epoch}", save_top_k=kept),
        ModelCheckpoint(folder, "{step}", save_top_k=kept, every_n_train_steps=3),
    )
    callbacks = (LoRACallback(method or LoRA(r=2)), *callbacks, *savers)
    run = trainer(callbacks=list(callbacks), **{"max_epochs": EPOCHS} | options)
    with contextlib.suppress(SystemExit):  # a run that is told to go
        run.fit(module, batches, validation, ckpt_path=folder / resumed if resumed else None)
    module.drawn = [torch.rand(1).item(), random.random(), np.random.random()]
    return module


def same(resumed: Lit, whole: Lit) -> dict[str, bool]:
    """Compare a run with the last steps of the whole one."""
    weights = zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True)
    return {
        "losses": 0 < len(resumed.losses) < len(whole.losses)
        and resumed.losses == whole.losses[-len(resumed.losses) :],
        "weights": all(torch.equal(*pair) for pair in weights),
        "drawn": resumed.drawn == whole.drawn,
    }


# ---- two processes


def sampled(rank: int, shuffle: bool) -> Any:
    """Spread over all processes by Lightning's sampler, which shuffles by the global seed."""
    return DataLoader(loader(2 * BATCHES).dataset, batch_size=4, shuffle=shuffle)


def placed(rank: int, shuffle: bool) -> Any:
    """A share for each process, which shuffles it by itself."""
    return Placed(Subset(loader(2 * BATCHES).dataset, range(rank, 32, 2)), shuffle)


LOADERS = {"sampled": (sampled, ["epoch=0.ckpt"]), "placed": (placed, ["step=3.ckpt", "step=6.ckpt"])}
RUNS = {
    f"{name}-{dropout}-{shuffle}-{precision}": (name, dropout, shuffle, precision)
    for name in LOADERS
    for dropout in (0.0, 0.5)
    for shuffle in (False, True)
    for precision in ("32-true", "bf16-mixed")
}


def job(rank: int, folder: Path) -> None:
    """Train to the end, then resume in new objects, with another global seed."""
    logging.disable()
    warnings.simplefilter("error", UserWarning)
    warnings.filterwarnings("ignore", message=".*does not have many workers|Checkpoint directory")
    warnings.filterwarnings("ignore", message=".*have no `val_dataloader`|.*treespec, LeafSpec")
    found: dict[str, Any] = {}
    for run, (name, dropout, shuffle, precision) in RUNS.items():
        batches, checkpoints = LOADERS[name]
        options = {"use_distributed_sampler": batches is sampled, "method": LoRA(r=2, dropout=dropout)}
        options |= {"seed_by": rank, "precision": precision, "max_epochs": 2}
        os.environ |= {"PL_GLOBAL_SEED": "3"} if batches is sampled else {}
        whole = train(folder / run, batches(rank, shuffle), **options)
        os.environ |= {"PL_GLOBAL_SEED": "4"} if batches is sampled else {}
        found[run] = {"own numbers": whole.drawn}
        for one in checkpoints:
            resumed = train(folder / run, batches(rank, shuffle), one, **options)
            found[run][one] = same(resumed, whole)
        os.environ.pop("PL_GLOBAL_SEED", None)  # by which Lightning gives all processes the same numbers
    (folder / f"{rank}.json").write_text(json.dumps(found))


def alone(rank: int, folder: Path) -> None:
    """Go on alone from what two processes wrote."""
    logging.disable()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        written = folder / "sampled-0.5-True-32-true"
        train(written, sampled(0, shuffle=True), "epoch=0.ckpt", method=LoRA(r=2, dropout=0.5), max_epochs=2)
    (folder / "alone.json").write_text(json.dumps([str(one.message) for one in said]))


def main(folder: Path) -> None:
    assert wait(start(2, job, folder), 120) == [0, 0]
    assert wait(start(1, alone, folder), 60) == [0]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
