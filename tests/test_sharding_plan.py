"""The formulas of benchmarks/sharding_plan.py against bytes counted in processes that train small models over gloo.

``python test_sharding_plan.py FOLDER`` is what the tests run: it counts and writes ``FOLDER/WORLD.json``.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import start_processes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRA, LoRACallback, inject
from lightning_lora.sharding import is_sharded, local
from lightning_lora.strategies import LoRAFSDP2Strategy
from lightning_lora.strategies.blocks import blocks_of

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from sharding_plan import Plan, Shapes

# Sizes that 2 and 4 do not divide, so that shards are padded.
SIZES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 12, "intermediate_size": 22, "num_hidden_layers": 2, "num_attention_heads": 2},
    "tied": {"hidden_size": 20, "intermediate_size": 35, "num_hidden_layers": 3, "num_attention_heads": 2},
}
RANKS, WORLDS = (1, 3), (2, 4)
KINDS = ("lora_fsdp2", "not resharded", "bf16 base", "ddp", "adapters sharded too")
CASES = [(name, r, kind) for name in SIZES for r in RANKS for kind in KINDS]
Found = dict[str, Any]


def llama(name: str) -> nn.Module:
    options = SIZES[name] | {"num_key_value_heads": 1, "vocab_size": 33, "tie_word_embeddings": name == "tied"}
    return LlamaForCausalLM(LlamaConfig(**options))


def plan(name: str, r: int, kind: str, world: int) -> Plan:
    with torch.device("meta"):
        model = llama(name).to(torch.bfloat16 if kind == "bf16 base" else torch.float32)
    inject(model, LoRA(r=r, alpha=2))
    how = kind if kind in ("ddp", "adapters sharded too") else "lora_fsdp2"
    return Plan(Shapes.of(model), world, how, reshard=kind != "not resharded")


# ---- in the processes


def held(tensors: Any) -> int:
    """Return the bytes of the memory under tensors, what pads it too."""
    storages = {id(s): s for s in (local(tensor).untyped_storage() for tensor in tensors)}
    return sum(storage.nbytes() for storage in storages.values())


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class Collectives(TorchDispatchMode):
    """Counts what comes out of all-gathers and goes into sums, by the name of the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in function.namespace:
            first = args[1] if "reduce_scatter" in function._opname else args[0]  # args[0] is the output there
            tensors = [first] if isinstance(first, Tensor) else first
            self.bytes[function._opname] = self.bytes.get(function._opname, 0) + sum(map(nbytes, tensors))
        return function(*args, **kwargs or {})


class Lit(L.LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.net = llama(name)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters())


class Counts(L.Callback):
    """Counts each step's messages, and what is whole in the forward of each block."""

    def __init__(self) -> None:
        self.steps: list[dict[str, int]] = []
        self.whole: list[int] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        def look(*args: Any) -> None:
            divided = [p for p in module.parameters() if not p.requires_grad and not is_sharded(p)]
            self.whole.append(sum(map(nbytes, divided)))

        for block in blocks_of(module):
            block.mlp.register_forward_hook(look)

    def on_train_batch_start(self, *args: Any) -> None:
        self.collectives = Collectives()
        self.collectives.__enter__()

    def on_train_batch_end(self, *args: Any) -> None:
        self.collectives.__exit__(None, None, None)
        self.steps.append(self.collectives.bytes)


def trained_by_lightning(name: str, r: int, kind: str, folder: Path) -> Found:
    module, counts, world = Lit(name), Counts(), dist.get_world_size()
    strategy = {"ddp": "ddp", "not resharded": LoRAFSDP2Strategy(reshard_after_forward=False)}.get(kind, "lora_fsdp2")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(
        **quiet,
        strategy=strategy,
        devices=world,
        max_epochs=1,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        precision="bf16-true" if kind == "bf16 base" else "32-true",
        default_root_dir=folder,
        callbacks=[LoRACallback(LoRA(r=r, alpha=2)), counts],
    )
    trainer.fit(module, DataLoader(torch.arange(12).view(2, 6) + dist.get_rank(), batch_size=1))
    path = folder / "it.ckpt"
    with Collectives() as saving:
        trainer.save_checkpoint(path)
    trained = [p for p in module.parameters() if p.requires_grad]
    states = trainer.optimizers[0].state.values()
    return {
        "base": held(p for p in module.parameters() if not p.requires_grad),
        "adapters": held(trained),
        "state": held(trained) + held(p.grad for p in trained) + held(s[key] for s in states for key in s if key != "step"),
        "steps": counts.steps,
        "whole": max(counts.whole),
        "file": path.stat().st_size,
        "tensors": len(trained),
        "saving": saving.bytes,
    }


def all_divided(name: str, r: int) -> Found:
    """One step of a model whose adapters ``fully_shard`` divides like the base."""
    model = llama(name)
    inject(model, LoRA(r=r, alpha=2), seed=0)
    for block in blocks_of(model):
        fully_shard(block)
    fully_shard(model, reshard_after_forward=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    batch = torch.arange(6).view(1, 6)
    with Collectives() as messages:
        model(input_ids=batch, labels=batch).loss.backward()
    base = held(p for p in model.parameters() if not p.requires_grad)
    return {"base": base, "adapters": held(trained), "steps": [messages.bytes]}


def main(rank: int, folder: Path, world: int) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # not used: the group is made here
    dist.init_process_group("gloo", init_method=f"file://{folder}/group{world}", rank=rank, world_size=world)
    found = [
        all_divided(name, r) if kind == "adapters sharded too" else trained_by_lightning(name, r, kind, folder)
        for name, r, kind in CASES
    ]
    if rank == 0:
        (folder / f"{world}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    logging.disable()
    for world in WORLDS:
        start_processes(main, (Path(sys.argv[1]), world), nprocs=world, start_method="fork")
