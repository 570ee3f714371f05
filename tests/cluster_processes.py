"""Ranks under DDP, for test_clusters.py: ``python cluster_processes.py FOLDER`` writes ``FOLDER/found.json``."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from conftest import Lit, loader
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from ranks import start, trainer, wait, wait_for
from torch import Tensor, nn
from torch.multiprocessing import get_context
from torch.utils.data import DataLoader, DistributedSampler

from lightning_lora import LoRA, LoRACallback, sites
from lightning_lora.files import read_tensors
from lightning_lora.strategies.ddp import LoRADDPStrategy, checksum

METHOD = LoRA(r=2, alpha=4)


def quiet() -> None:
    logging.disable()
    warnings.simplefilter("ignore")


def lora_ddp(**options: Any) -> LoRADDPStrategy:
    return LoRADDPStrategy(process_group_backend="gloo", **options)


def gathered(value: Any) -> list[Any]:
    """Return what each rank has."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def message(run: Callable[[], Any]) -> str:
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def adapters(module: nn.Module) -> dict[str, list[Any]]:
    return {name: one.tolist() for name, one in module.state_dict().items() if "lora_" in name}


# ---- one run by 1, 2, 4 and 1 processes in turn


def epoch(rank: int, folder: Path, number: int, world: int, strategy: Any) -> None:
    """Train one epoch of four steps, each of four examples however many processes there are."""
    quiet()
    module = Lit()
    run = trainer(callbacks=[LoRACallback(METHOD)], max_epochs=number, strategy=strategy, enable_checkpointing=False)
    examples = loader(4).dataset
    share = DistributedSampler(examples, world, rank, shuffle=False)  # one of Lightning's own would shuffle
    data = DataLoader(examples, batch_size=4 // world, sampler=share)
    run.fit(module, data, ckpt_path=folder / f"{number - 1}.ckpt" if number > 1 else None)
    run.save_checkpoint(folder / f"{number}.ckpt")


def worlds(folder: Path) -> dict[str, Any]:
    turns = [
        (1, "auto"),
        (2, DDPStrategy(process_group_backend="gloo")),
        (4, lora_ddp(broadcast_base=False)),
        (1, "auto"),
    ]
    found = {}
    for name, those in {"turns": turns, "one": [(1, "auto")] * 4}.items():
        (folder / name).mkdir()
        for number, (world, strategy) in enumerate(those, start=1):
            codes = wait(start(world, epoch, folder / name, number, world, strategy), 60)
            assert codes == [0] * world, codes
        content = torch.load(folder / name / "4.ckpt")
        [optimizer] = content["optimizer_states"]
        found[name] = {
            "step": content["global_step"],
            "adapters": {key: one.tolist() for key, one in content["state_dict"].items() if "lora_" in key},
            "moments": [one["exp_avg_sq"].tolist() for one in optimizer["state"].values()],
        }
    return found


# ---- what DDP sends, and what it says


class Wide(Lit):
    """A base of 17,160 bytes; LoRA of rank 4 on its blocks has 4,096."""

    def build(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            blocks = [nn.Linear(32, 32) for _ in range(4)]
            return nn.Sequential(*blocks, nn.Linear(32, 2))

    def loss(self, batch: Any) -> Tensor:
        return self(batch[0].repeat(1, 8)).square().mean()


def sent(strategy: Any) -> dict[str, Any]:
    """Return how many bytes a fit sent before its first step, and its losses."""
    count = 0
    send = dist._broadcast_coalesced

    def counting(group: Any, tensors: list[Tensor], *rest: Any) -> None:
        nonlocal count
        count += sum(tensor.nbytes for tensor in tensors)
        send(group, tensors, *rest)

    module = Wide()
    dist._broadcast_coalesced = counting
    try:
        callback = LoRACallback(LoRA(r=4), exclude_modules=["net.4"])
        run = trainer(callbacks=[callback], max_epochs=1, strategy=strategy, enable_checkpointing=False)
        run.fit(module, loader())
    finally:
        dist._broadcast_coalesced = send
    return {"bytes": count, "losses": module.losses}


class OwnBase(Lit):
    """Draws one of its layers from a seed of the rank's own."""

    def build(self) -> nn.Module:
        net = super().build()
        torch.manual_seed(dist.get_rank())
        nn.init.normal_(net.second.weight)
        return net


class Normed(Lit):
    """Has statistics of the rank's own, and a buffer that is not stored."""

    def build(self) -> nn.Module:
        net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        net[1].running_mean += dist.get_rank()
        net.register_buffer("frequencies", torch.ones(2), persistent=False)
        return net


class Counts(Lit):
    """Keeps a count that its forward changes."""

    def build(self) -> nn.Module:
        net = super().build()
        net.register_buffer("count", torch.zeros(()))
        return net


class Notes(L.Callback):
    """Notes how DDP was set up."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.sends_buffers = trainer.strategy.model.broadcast_buffers


def buffers(module: Lit, **options: Any) -> bool:
    notes = Notes()
    lora = LoRACallback(METHOD, **options.pop("lora", {}))
    run = trainer(
        callbacks=[lora, notes], max_epochs=1, strategy=lora_ddp(**options), enable_checkpointing=False, max_steps=2
    )
    run.fit(module, loader())
    return notes.sends_buffers


class Alternates(Lit):
    """Uses its second layer in every other batch only."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.net.first(batch[0])
        return hidden.square().mean() if batch_idx % 2 == 0 else self.net.second(hidden).square().mean()


def fit(module: Lit, strategy: Any, **lora: Any) -> L.Trainer:
    callback = LoRACallback(METHOD, **lora)
    run = trainer(callbacks=[callback], max_epochs=1, strategy=strategy, enable_checkpointing=False)
    run.fit(module, loader(8))
    return run


def strategies(rank: int, folder: Path) -> None:
    quiet()
    by_name = trainer(strategy="lora_ddp", max_epochs=1, callbacks=[LoRACallback(METHOD)], enable_checkpointing=False)
    named = Lit()
    by_name.fit(named, loader())
    ddp = DDPStrategy(process_group_backend="gloo")
    found: dict[str, Any] = {
        "by_name": [type(by_name.strategy).__name__, gathered(adapters(named))],
        "sent": {
            "ddp": sent(ddp),
            "lora_ddp": sent(lora_ddp()),
            "broadcast_base=False": sent(lora_ddp(broadcast_base=False)),
        },
        "different": message(lambda: fit(OwnBase(), lora_ddp(broadcast_base=False))),
    }
    module = OwnBase()
    fit(module, lora_ddp())
    found["made_alike"] = gathered([checksum(name, one).item() for name, one in module.named_parameters()])
    normed = Normed()
    found["buffers"] = {
        "none": buffers(Lit()),
        "frozen": buffers(normed),
        "trained": buffers(Normed(), lora={"modules_to_save": ["net.1"]}),
        "unknown": buffers(Counts()),
        "asked for": buffers(Normed(), broadcast_buffers=True),
    }
    found["statistics"] = gathered(normed.net[1].running_mean.tolist())
    found["unused"] = {
        "audit": message(lambda: fit(Alternates(), lora_ddp())),
        "lora_ddp": message(lambda: fit(Alternates(), lora_ddp(), audit=False)),
        "ddp": message(lambda: fit(Alternates(), DDPStrategy(process_group_backend="gloo"), audit=False)),
        "left out": message(lambda: fit(Alternates(), lora_ddp(), exclude_modules=["second"])),
        "lora_ddp found": message(lambda: fit(Alternates(), lora_ddp(find_unused_parameters=True), audit=False)),
        "ddp found": message(lambda: fit(Alternates(), "ddp_find_unused_parameters_true", audit=False)),
    }
    (folder / f"strategies-{rank}.json").write_text(json.dumps(found))


# ---- a rank that dies, and two jobs in one folder


class Steps(L.Callback):
    """Says that training is under way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        time.sleep(0.002)
        if trainer.global_step == 10:
            self.path.touch()


def long(rank: int, folder: Path, epochs: int) -> None:
    quiet()
    saver = ModelCheckpoint(folder, filename="newest", every_n_train_steps=1, enable_version_counter=False)
    callbacks = [LoRACallback(METHOD), saver, Steps(folder / f"under-way-{rank}")]
    run = trainer(callbacks=callbacks, max_epochs=epochs)
    newest = folder / "newest.ckpt"
    run.fit(Lit(), loader(40), ckpt_path=newest if newest.exists() else None)


def death(folder: Path, victim: int) -> dict[str, Any]:
    folder.mkdir()
    ranks = start(2, long, folder, 1000)
    wait_for([folder / f"under-way-{rank}" for rank in range(2)])
    os.kill(ranks[victim].pid or 0, signal.SIGKILL)
    codes = wait(ranks, 60)
    saved = torch.load(folder / "newest.ckpt")
    again = wait(start(2, long, folder, saved["epoch"] + 1), 60)
    return {"codes": codes, "step": saved["global_step"], "resumed": again}


def writes(number: int, folder: Path) -> None:
    """Write one checkpoint over and over, in which every value of an adapter is this job's number."""
    quiet()
    module = Lit()
    method = LoRA(r=2 + number)
    run = trainer(callbacks=[LoRACallback(method)], devices=1, strategy="auto", max_steps=1, enable_checkpointing=False)
    run.fit(module, loader(1))
    for site in sites(module):
        for parameter in site.adapter("default").parameters():
            nn.init.constant_(parameter, number + 1)
    while not (folder / "stop").exists():
        run.save_checkpoint(folder / "last.ckpt")


def values_of(tensors: Mapping[str, Tensor]) -> float:
    """Return the one number that all values of a job's adapter are."""
    [value] = {value for name, one in tensors.items() if "lora_" in name for value in one.flatten().tolist()}
    return value


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor]]:
    return (torch.load(path)["state_dict"],)


def two_jobs(folder: Path) -> dict[str, Any]:
    """Read what two jobs write to one place, each file as a copy, so that what is read is one file's content."""
    folder.mkdir()
    jobs = []
    for number in range(2):
        jobs += [get_context("fork").Process(target=writes, args=(number, folder))]
        jobs[-1].start()
        wait_for([folder / "last.adapter"])
    end = time.monotonic() + 60
    seen: dict[str, list[float]] = {"last.ckpt": [], "last.adapter/adapter_model.safetensors": []}
    torn = []
    while time.monotonic() < end and (len(seen["last.ckpt"]) < 100 or min(len(set(one)) for one in seen.values()) < 2):
        for name, values in seen.items():
            try:
                (folder / "copy").write_bytes((folder / name).read_bytes())
            except FileNotFoundError:  # the folder was replaced between the look at it and the look into it
                continue
            try:
                whole = (
                    torch.load(folder / "copy")["state_dict"]
                    if name == "last.ckpt"
                    else read_tensors(folder / "copy")[0]
                )
                values.append(values_of(whole))
            except Exception as error:
                torn.append(f"{name}: {error!r}")
    (folder / "stop").touch()
    return {"codes": wait(jobs, 60), "seen": seen, "torn": torn}


def main(folder: Path) -> None:
    assert wait(start(2, strategies, folder), 120) == [0, 0]
    found = json.loads((folder / "strategies-0.json").read_text())
    (folder / "worlds").mkdir()
    found |= {
        "messages of rank 1": json.loads((folder / "strategies-1.json").read_text())["unused"],
        "worlds": worlds(folder / "worlds"),
        "deaths": [death(folder / f"death-{rank}", rank) for rank in range(2)],
        "two_jobs": two_jobs(folder / "two"),
    }
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
