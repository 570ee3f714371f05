"""Training over several processes that divide the base, run by test_sharded.py.

``python sharded_processes.py FOLDER WORLD`` runs every `PARTS` function whose number of processes is WORLD and writes
what it returns on rank zero to ``FOLDER/WORLD.json``. Checkpoints stay in FOLDER, so that later worlds can go on from
those of earlier ones.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import start_processes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_lora import (
    AdaLoRA,
    AdapterEMA,
    AdapterError,
    DeltaLoRA,
    DoRA,
    DyLoRA,
    HiRA,
    LoRA,
    LoRACallback,
    LoRADrop,
    LoRAFA,
    Method,
    ReLoRA,
    VeRA,
    merge_,
)
from lightning_lora.files import SECTION
from lightning_lora.sharding import local, whole
from lightning_lora.sites import clean
from lightning_lora.strategies import LoRAFSDP2Strategy, parameters_on_meta

HEAD_TOO: dict[str, Any] = {"modules_to_save": ["head"], "gradient_clip_val": 0.05}
SHARDED = ("lora_fsdp", "lora_fsdp2")
LORA = LoRA(r=2, alpha=4)
STEPS, BATCH = 6, 4
METHODS: dict[str, Method] = {
    "LoRA": LORA,
    "DoRA": DoRA(r=2, alpha=4),
    "VeRA": VeRA(r=3),
    "DVoRA": VeRA(r=3, magnitude=True),
    "LoRAFA": LoRAFA(r=2, alpha=4),
    "AdaLoRA": AdaLoRA(r=3, alpha=6, target_r=1, initial_steps=1, final_steps=1),
    "DeltaLoRA": DeltaLoRA(r=2, alpha=4, start_step=1),
    "ReLoRA": ReLoRA(r=2, alpha=4, restart_every=2, restarts=2, warmup=1),
    "DyLoRA": DyLoRA(r=3, alpha=6),
    "HiRA": HiRA(r=2, alpha=4),
    "PiSSA": LoRA(r=2, alpha=4, init="pissa"),
    "EVA": LoRA(r=2, alpha=4, init="eva", init_batches=2),
    "LoRA-GA": LoRA(r=2, alpha=4, init="lora_ga", init_batches=2),
    "LoRA-Pro": LoRA(r=2, alpha=4, gradient="lora_pro"),
    "LoRA-drop": LoRADrop(r=2, alpha=4, sample_steps=3, top_n=2),
}


class Block(nn.Module):
    """A residual block of two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Repeated blocks between an entry and a head."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.entry, self.head = nn.Linear(4, 8), nn.Linear(8, 5)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Lit(L.LightningModule):
    """Trains `Net`; the mean loss of each step over all processes is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.net = self.build()

    def build(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return Net()

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs["loss"].detach().clone()
        self.losses.append(self.trainer.strategy.reduce(loss, reduce_op="mean").item())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8), "interval": "step"}
        ]


def data(steps: int = STEPS // 2) -> DataLoader[Any]:
    """Return this process's part of each batch: the batches of all processes together are the same in any number."""
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(32, 4, generator=generator), torch.randint(0, 5, (32,), generator=generator)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = [row for start in range(0, steps * BATCH, BATCH) for row in range(start + rank, start + BATCH, world)]
    return DataLoader(Subset(TensorDataset(x, y), mine), batch_size=BATCH // world)


def trainer(strategy: Any, folder: Path, callbacks: list[L.Callback], **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet |= {"max_epochs": 2, "use_distributed_sampler": False, "default_root_dir": folder}
    quiet |= {"enable_checkpointing": any(isinstance(one, ModelCheckpoint) for one in callbacks)}
    devices = dist.get_world_size() if dist.is_initialized() else 1
    return L.Trainer(**quiet | options, strategy=strategy, devices=devices, callbacks=callbacks)


def trained(module: nn.Module) -> dict[str, list[float]]:
    """Return the values of everything that is trained, put together from all processes."""
    parameters = {clean(name): p for name, p in module.named_parameters() if p.requires_grad}
    return {name: whole(parameter.detach()).flatten().tolist() for name, parameter in parameters.items()}


def alike(module: nn.Module) -> bool:
    """Tell whether all processes hold the same values."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, trained(module))
    return all(one == everyone[0] for one in everyone)


def fit(
    strategy: Any,
    folder: Path,
    method: Method = LORA,
    module: Lit | None = None,
    path: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train and return the losses and what was trained."""
    module = Lit() if module is None else module
    chosen = {name: options.pop(name) for name in ("modules_to_save", "bias", "lr_ratio") if name in options}
    ratio = {} if method.why_no_ratio() else {"lr_ratio": 8.0}
    callback = LoRACallback(method, **ratio | chosen)
    run = trainer(strategy, folder, [callback, *options.pop("callbacks", [])], **options)
    run.fit(module, data(), ckpt_path=path)
    return {"losses": module.losses, "trained": trained(module), "run": run, "module": module}


def message(run: Callable[[], Any]) -> str:
    try:
        run()
    except (AdapterError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def plain(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name not in ("run", "module")}


def methods(strategy: str, folder: Path) -> dict[str, Any]:
    """Train with every method, test on the same module, and train on from the checkpoint of the first epoch."""
    found = {}
    for name, method in METHODS.items():
        file = f"{strategy}-{name}"
        half = ModelCheckpoint(folder, filename=f"{file}-{{epoch}}", save_top_k=-1, save_on_train_epoch_end=True)
        first = fit(strategy, folder, method, callbacks=[half])
        tested = first["run"].test(first["module"], data(), verbose=False)[0]["test_loss"]
        again = fit(strategy, folder, method, path=folder / f"{file}-epoch=0.ckpt")
        found[name] = plain(first) | {
            "tested": tested,
            "alike": not dist.is_initialized() or alike(first["module"]),
            "resumed": again["losses"] == first["losses"][STEPS // 2 :] and again["trained"] == first["trained"],
        }
    return found


def resumed_from(other: str, strategy: str, folder: Path) -> dict[str, Any]:
    """Go on from a checkpoint of LoRA that another strategy wrote, and leave one of our own."""
    return plain(fit(strategy, folder, path=folder / f"{other}-LoRA-epoch=0.ckpt"))


def handed_over(strategy: str, folder: Path) -> dict[str, Any]:
    """Train one epoch, with what the run before left, and leave it to the next."""
    path = folder / "handed_over.ckpt"
    epochs = torch.load(path)["epoch"] if path.exists() else 0
    found = fit(strategy, folder, path=path if path.exists() else None, max_epochs=epochs + 1)
    found["run"].save_checkpoint(path)
    return plain(found)


# ---- how the user divides the module


class Divides(Lit):
    """Calls ``fully_shard`` itself, in one of three ways; each process draws other random numbers."""

    def __init__(self, how: str) -> None:
        self.how = how
        super().__init__()

    def build(self) -> Any:
        torch.manual_seed(dist.get_rank())
        return super().build() if self.how == "in __init__" else None

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        net = self.net if self.how == "in __init__" else super().build()
        if self.how == "assigned first":
            self.net = net
        for block in net.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(net, mesh=mesh)
        self.net = net


class Messages(TorchDispatchMode):
    """Counts the bytes that collectives give, by the name of the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **kwargs or {})
        if "c10d" in function.namespace:
            leaves = [leaf for leaf in tree_leaves((args, output)) if isinstance(leaf, Tensor)]
            size = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
            self.bytes[function._opname] = self.bytes.get(function._opname, 0) + size
        return output


class Wide(Lit):
    """Has a base ten times as large beside the same adapters."""

    def build(self) -> nn.Module:
        net = super().build()
        net.blocks.extend(Block() for _ in range(18))
        return net


def messages_of_checkpoints(strategy: str, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for cls in (Lit, Wide):
        path = folder / f"{strategy}-{cls.__name__}.ckpt"
        callback = LoRACallback(LORA, target_modules=["net.blocks.0.*", "net.blocks.1.*"])
        module = cls()
        run = trainer(strategy, folder, [callback])
        run.fit(module, data())
        with Messages() as saving:
            run.save_checkpoint(path)
        with Messages() as loading:
            run.strategy.load_model_state_dict(run.strategy.load_checkpoint(path))
            run.strategy.load_optimizer_state_dict(torch.load(path))
        base = [p for name, p in module.named_parameters() if not p.requires_grad and "adapters" not in name]
        found[cls.__name__] = {
            "saving": saving.bytes,
            "loading": loading.bytes,
            "file": path.stat().st_size,
            "held": sum(local(p).numel() for p in base),
            "base": sum(p.numel() for name, p in cls().named_parameters()),
            "gradients": sum(p.grad.numel() for p in module.parameters() if p.grad is not None),
            "trained": sum(p.numel() for p in module.parameters() if p.requires_grad),
        }
    return found


# ---- everything else


class Reduced(L.Callback):
    """Counts the bytes that each training step averages."""

    def __init__(self) -> None:
        self.reduced: list[int] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.messages = Messages()
        self.messages.__enter__()

    def on_train_batch_end(self, *args: Any) -> None:
        self.messages.__exit__(None, None, None)
        self.reduced.append(self.messages.bytes.get("allreduce_", 0))


class Checkpointed(Lit):
    """Computes its blocks again in backward."""

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        x = self.net.entry(x)
        for block in self.net.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return nn.functional.cross_entropy(self.net.head(x), y)


class Manual(Lit):
    """Steps its optimizer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer, loss = self.optimizers(), self.loss(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
        optimizer.step()
        return {"loss": loss.detach()}


class TakesTurns(Lit):
    """Uses its second block on some processes only, and the last one nowhere."""

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        x = self.net.blocks[0](self.net.entry(x))
        first = not dist.is_initialized() or dist.get_rank() == 0
        return nn.functional.cross_entropy(self.net.head(x) + (self.net.extra(x) if first else 0), y)

    def build(self) -> nn.Module:
        net = super().build()
        net.extra, net.unused = nn.Linear(8, 5), nn.Linear(8, 8)
        return net


class Llama(Lit):
    """A transformers model whose head is its embedding, adapted in its seven kinds of projections."""

    def build(self) -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(7)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=2, tie_word_embeddings=True, **sizes))

    def loss(self, batch: Any) -> Tensor:
        tokens = (batch[0] * 8).long() % 32
        return self.net(input_ids=tokens, labels=tokens).loss


class Captured(Lit):
    """Builds its optimizer, with a learning rate for each part, before there are adapters or shards."""

    def __init__(self) -> None:
        super().__init__()
        parts = [self.net.entry, self.net.blocks, self.net.head]
        groups = [{"params": list(part.parameters()), "lr": 0.01 * (i + 1)} for i, part in enumerate(parts)]
        self.optimizer = torch.optim.AdamW(groups)

    def configure_optimizers(self) -> Any:
        return self.optimizer


class Compiled(Lit):
    def build(self) -> nn.Module:
        return torch.compile(super().build(), backend="aot_eager")


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "llama": lambda: {"module": Llama()},
    "average": lambda: {"callbacks": [AdapterEMA(0.9)]},
    "captured": lambda: {"module": Captured()},
    "clip": lambda: {"gradient_clip_val": 0.05},
    "accumulate": lambda: {"accumulate_grad_batches": 3, "callbacks": [Reduced()]},
    "manual": lambda: {"module": Manual()},
    "checkpointing": lambda: {"module": Checkpointed()},
    "modules_to_save": lambda: {"modules_to_save": ["head"], "bias": "all", "gradient_clip_val": 0.05},
    "compile": lambda: {"module": Compiled()},
}


def cases(strategy: str, folder: Path) -> dict[str, Any]:
    found = {}
    for name, options in CASES.items():
        chosen = options()
        run = fit(strategy, folder, **chosen)
        optimizer = run["run"].optimizers[0]
        held = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        found[name] = plain(run) | {"held": held}
        for callback in chosen.get("callbacks", []):
            found[name]["reduced"] = getattr(callback, "reduced", [])
    return found


def low_precision(strategy: str, folder: Path) -> dict[str, Any]:
    """Train fp32 adapters over a base in bf16."""
    found = fit(strategy, folder, precision="bf16-true")
    kinds = {p.dtype for p in found["module"].parameters() if p.requires_grad}
    base = {p.dtype for p in found["module"].net.entry.parameters() if not p.requires_grad}
    return plain(found) | {"kinds": [str(kind) for kind in (*kinds, *base)]}


def divided_by_the_user(folder: Path) -> dict[str, Any]:
    found = {}
    for how in ("in __init__", "assigned first", "assigned last"):
        module = Divides(how)
        found[how] = plain(fit("lora_fsdp2", folder, module=module)) | {"alike": alike(module)}
        kinds = {type(p).__name__ for name, p in module.named_parameters() if not p.requires_grad}
        found[how]["base"] = sorted(kinds)
        path = folder / "divided.ckpt"
        half = fit("lora_fsdp2", folder, module=Divides(how), max_epochs=1, **HEAD_TOO)
        half["run"].save_checkpoint(path)
        found[how]["saved"] = plain(fit("lora_fsdp2", folder, module=Divides(how), path=path, **HEAD_TOO))
        found[how]["saved"]["losses"] = half["losses"] + found[how]["saved"]["losses"]
    return found


class OnMeta(Lit):
    """Has no memory for its base until the strategy reads it."""

    def build(self) -> nn.Module:
        with parameters_on_meta():
            return Net()


def from_files(folder: Path) -> dict[str, Any]:
    weights = folder / "weights"
    if dist.get_rank() == 0:
        weights.mkdir()
        tensors = Lit().net.state_dict()
        for index, names in enumerate((list(tensors)[:5], list(tensors)[5:])):
            save_file({name: tensors[name] for name in names}, weights / f"model-{index}.safetensors")
    dist.barrier()

    def run(method: Method = LORA, **options: Any) -> dict[str, Any]:
        strategy = LoRAFSDP2Strategy(base_weights={"net": str(weights)})
        return plain(fit(strategy, folder, method, module=OnMeta(), **options))

    resumed = run(path=folder / "ddp-LoRA-epoch=0.ckpt")
    other = torch.load(folder / "ddp-LoRA-epoch=0.ckpt")
    other[SECTION]["sites"]["net.entry.weight"]["base"] = "0" * 16
    torch.save(other, folder / f"other{dist.get_rank()}.ckpt")
    refused = message(lambda: run(path=folder / f"other{dist.get_rank()}.ckpt"))
    return {"other base": refused, "LoRA": run(), "DoRA": run(METHODS["DoRA"]), "resumed": resumed}


def hybrid(folder: Path) -> dict[str, Any]:
    found = fit(LoRAFSDP2Strategy(replicas=2, reshard_after_forward=False), folder)
    weight = found["module"].net.blocks[0].up.weight
    return plain(found) | {"held": local(weight).shape[0], "placements": [str(one) for one in weight.placements]}


def by_turns(strategy: str, folder: Path) -> dict[str, Any]:
    module = TakesTurns()
    callback = LoRACallback(LORA, audit=False)
    trainer(strategy, folder, [callback]).fit(module, data())
    moments = {name: p.grad is not None for name, p in module.named_parameters() if p.requires_grad}
    merging = message(lambda: merge_(module))
    return {"merging": merging, "alike": alike(module), "gradients": moments, "loss": module.losses[-1]}


Part = Callable[[Path], Any]
STAGES: dict[str, tuple[int, dict[str, Part]]] = {
    "one": (
        1,
        {
            "auto": partial(methods, "auto"),
            "cases": partial(cases, "auto"),
            "head trained too": lambda folder: plain(fit("auto", folder, **HEAD_TOO)),
            "four epochs": lambda folder: plain(fit("auto", folder, max_epochs=4)),
            "handed over": partial(handed_over, "auto"),
        },
    ),
    "two": (
        2,
        {name: partial(methods, name) for name in ("ddp", *SHARDED)}
        | {f"{name} cases": partial(cases, name) for name in SHARDED}
        | {f"{name} messages": partial(messages_of_checkpoints, name) for name in SHARDED}
        | {f"{name} low precision": partial(low_precision, name) for name in ("ddp", *SHARDED)}
        | {f"{name} by turns": partial(by_turns, name) for name in SHARDED}
        | {
            "ddp from one": partial(resumed_from, "auto", "ddp"),
            "lora_fsdp from one": partial(resumed_from, "auto", "lora_fsdp"),
            "lora_fsdp2 from one": partial(resumed_from, "auto", "lora_fsdp2"),
            "ddp from lora_fsdp2": partial(resumed_from, "lora_fsdp2", "ddp"),
            "divided by the user": divided_by_the_user,
            "from files": from_files,
            "handed over": partial(handed_over, "lora_fsdp2"),
        },
    ),
    "four": (4, {"handed over": partial(handed_over, "lora_fsdp"), "hybrid": hybrid}),
    "one again": (1, {"handed over": partial(handed_over, "auto")}),
}


def main(rank: int, folder: Path, stage: str) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(rank)  # whatever a process draws, adapters and their schedules are alike
    world, parts = STAGES[stage]
    if world > 1:
        os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # not used: the group is made here
        dist.init_process_group("gloo", init_method=f"file://{folder}/group{world}", rank=rank, world_size=world)
    found = {name: part(folder) for name, part in parts.items()}
    if rank == 0:
        (folder / f"{stage}.json").write_text(json.dumps(found))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    logging.disable()
    for stage in sys.argv[2:] or STAGES:
        start_processes(main, (Path(sys.argv[1]), stage), nprocs=STAGES[stage][0], start_method="fork")
