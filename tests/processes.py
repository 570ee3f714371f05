"""What happens in processes that train: each trap is sprung without its guard, and met with it.

Run by test_traps.py as ``python processes.py FOLDER``, because processes are best forked where nothing was
computed yet. It writes what it found to ``FOLDER/*.json``.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as L
import torch
import torch.distributed as dist
from conftest import Lit, Net, loader
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset

from lightning_lora import LoRA, LoRACallback, inject, sites

METHOD = LoRA(r=2, alpha=4)
GUARDS = "lightning_lora.callbacks.injection"


def trainer(**options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"accelerator": "cpu", "enable_checkpointing": False, "max_epochs": 1, "devices": 1}
    return L.Trainer(**quiet | options)


def share(rank: int) -> DataLoader[Any]:
    """Return the batches of one rank: every second example."""
    data = loader(8).dataset
    return DataLoader(Subset(data, range(rank, 32, 2)), batch_size=4)


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def alike(tensors: list[Tensor]) -> bool:
    """Tell whether both ranks hold the same values."""
    own = torch.cat([whole(tensor).flatten() for tensor in tensors])
    both = [torch.empty_like(own) for _ in range(2)]
    dist.all_gather(both, own)
    return torch.equal(*both)


def adapters(module: nn.Module) -> list[Tensor]:
    return [parameter for name, parameter in module.named_parameters() if "lora_" in name]


def message(run: Callable[[], Any]) -> str:
    try:
        run()
    except BaseException as error:  # torch's CheckpointException is none of Exception
        return f"{type(error).__name__}: {error}"
    return "no error"


# ---- trap 2: the user's configure_model shards or wraps the network before the adapters are there


def shard(net: Net) -> Net:
    for module in (net.first, net.second, net):
        fully_shard(module)
    return net


class Wraps(Lit):
    """Gives each rank a share of its network in ``configure_model``.

    Args:
        wrap: What returns the network in its wrapper.
    """

    def __init__(self, wrap: Callable[[Any], nn.Module]) -> None:
        super().__init__()
        self.wrap = wrap

    def configure_model(self) -> None:
        self.net = self.wrap(self.net)


WRAPPERS: dict[str, Callable[[Any], nn.Module]] = {
    "fully_shard": shard,
    "FullyShardedDataParallel": lambda net: FullyShardedDataParallel(
        net, device_id=torch.device("cpu"), use_orig_params=True
    ),
    "DistributedDataParallel": DistributedDataParallel,
}


def wrapped_before_injection(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, wrap in WRAPPERS.items():
        module = Wraps(wrap)
        with (
            patch.object(sys.modules["lightning_lora.inject"], "check_shards"),
            patch(f"{GUARDS}.check_unwrapped"),
        ):
            trainer(callbacks=[LoRACallback(METHOD)]).fit(module, share(rank))
        found[name] = {"alike": alike(adapters(module)), "sites": len(sites(module))}
        guarded = Wraps(wrap)
        run = trainer(callbacks=[LoRACallback(METHOD)])
        found[name]["message"] = message(lambda run=run, guarded=guarded: run.fit(guarded, share(rank)))
    return found


def sharded_after_injection(rank: int) -> dict[str, Any]:
    def adapt_and_shard(net: Net) -> Net:
        inject(net, METHOD, seed=0)
        return shard(net)

    module = Wraps(adapt_and_shard)
    trainer(callbacks=[LoRACallback(METHOD)]).fit(module, share(rank))
    one = Lit()
    inject(one.net, METHOD, seed=0)
    pairs = DataLoader(Subset(loader(8).dataset, [i + r for i in range(0, 32, 8) for r in range(8)]), batch_size=8)
    trainer(callbacks=[LoRACallback(METHOD)]).fit(one, pairs)
    return {
        "kinds": sorted({type(parameter).__name__ for parameter in adapters(module)}),
        "like_one_process": all(
            torch.allclose(whole(ours), theirs, atol=1e-5)
            for ours, theirs in zip(adapters(module), adapters(one), strict=True)
        ),
    }


# ---- trap 16: checkpoints of the adapters alone in the format of sharded strategies


class Sharded(Lit):
    """Does by hand what a user would: injects, shards, and takes the base out of the checkpoint."""

    def configure_model(self) -> None:
        inject(self, METHOD, seed=0)
        shard(self.net)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: tensor for name, tensor in state.items() if "lora_" in name}


def sharded_checkpoint(rank: int, folder: Path) -> dict[str, Any]:
    def run(**options: Any) -> L.Trainer:
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        return trainer(strategy=strategy, devices=2, use_distributed_sampler=False, **options)

    first = run()
    first.fit(Sharded(), share(rank))
    first.save_checkpoint(folder / "sharded.ckpt")
    again, refused = run(max_epochs=2), run(callbacks=[LoRACallback(METHOD)])
    return {
        "written": sorted(path.suffix for path in (folder / "sharded.ckpt").iterdir()),
        "message": message(lambda: again.fit(Sharded(), share(rank), ckpt_path=folder / "sharded.ckpt")),
        "refused": message(lambda: refused.fit(Lit(), share(rank))),
    }


# ---- trap 25: a base that differs between ranks, under DDP


class OwnBase(Lit):
    """Draws its base from a seed of its own on every rank, as a forgotten seed or a partial download would."""

    def build(self) -> nn.Module:
        torch.manual_seed(100 + dist.get_rank())
        return Net()


class IgnoresTheBase(OwnBase):
    """Saves DDP the work of sending frozen weights."""

    def configure_model(self) -> None:
        inject(self, METHOD, seed=0)
        self._ddp_params_and_buffers_to_ignore = [name for name, p in self.named_parameters() if not p.requires_grad]


def different_bases(rank: int) -> dict[str, Any]:
    def fit(module: Lit, callbacks: list[L.Callback]) -> dict[str, bool]:
        frozen = [parameter for name, parameter in module.named_parameters() if "lora_" not in name]
        before = alike(frozen)
        strategy = DDPStrategy(process_group_backend="gloo")
        run = trainer(strategy=strategy, devices=2, callbacks=callbacks, use_distributed_sampler=False)
        run.fit(module, share(rank))
        return {"before": before, "after": alike(frozen), "adapters": alike(adapters(module))}

    return {"ignored": fit(IgnoresTheBase(), []), "ours": fit(OwnBase(), [LoRACallback(METHOD)])}


# ---- trap 11: training in processes that the Trainer starts and forgets


def forked() -> dict[str, Any]:
    module = Lit()
    with patch(f"{GUARDS}.check_launcher"):
        trainer(strategy="ddp_fork", callbacks=[LoRACallback(METHOD)]).fit(module, loader())
    run = trainer(strategy="ddp_fork", callbacks=[LoRACallback(METHOD)])
    before = Lit()
    inject(before, METHOD, seed=0)
    fresh = [one.clone() for one in adapters(before)]
    trainer(strategy="ddp_fork", callbacks=[LoRACallback(METHOD)]).fit(before, loader())
    came_back = [not torch.equal(*pair) for pair in zip(adapters(before), fresh, strict=True)]
    return {
        "sites": len(sites(module)),
        "came_back": came_back,
        "message": message(lambda: run.fit(Lit(), loader())),
    }


def main(rank: int, folder: Path) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # not used: the group is made here
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    found = {
        "wrapped_before_injection": wrapped_before_injection(rank),
        "sharded_after_injection": sharded_after_injection(rank),
        "sharded_checkpoint": sharded_checkpoint(rank, folder),
        "different_bases": different_bases(rank),
    }
    if rank == 0:
        (folder / "ranks.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    logging.disable()
    (Path(sys.argv[1]) / "forked.json").write_text(json.dumps(forked()))
    start_processes(main, (Path(sys.argv[1]),), nprocs=2, start_method="fork")
