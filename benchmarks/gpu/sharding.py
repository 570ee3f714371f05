"""``lora_fsdp``, ``lora_fsdp2`` and ``lora_ddp`` on the GPUs of this machine: ``python benchmarks/gpu/sharding.py``.

Trains LoRA over Llamas with random weights in bf16, eager, and measures tokens per second, memory, and how long a
checkpoint takes. Each run is a ``torchrun`` of its own, on one GPU and then on all, so that one which runs out of
memory ends alone. Writes ``benchmarks/results/gpu_sharding.json`` and ``.md``.

``--toy`` does the same with a tiny model in two processes on CPUs, over gloo, in less than a minute; it prints the page
and keeps nothing. That much was tried; nothing here was run on a GPU yet.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRA, LoRACallback, inject

sys.path.append(str(Path(__file__).parents[1]))
from sharding_plan import SIZES, How, Plan, Shapes, gb, table

RESULTS = Path(__file__).parents[1] / "results"
LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
TOY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON = {"use_cache": False, "vocab_size": 128_256, "num_key_value_heads": 8}
MODELS: dict[str, dict[str, Any]] = {
    "1B": COMMON | LLAMA_1B | {"tie_word_embeddings": True},
    "8B": COMMON | SIZES["8B"] | {"tie_word_embeddings": False},
    "toy": COMMON | TOY | {"vocab_size": 256, "num_key_value_heads": 2},
}
STRATEGIES = ("lora_ddp", "lora_fsdp", "lora_fsdp2")
PLANNED: dict[str, How] = {"lora_ddp": "ddp", "lora_fsdp2": "lora_fsdp2"}
ROWS = {"1B": 4, "8B": 2, "toy": 2}  # of one process in a step
LENGTH = {"1B": 2048, "8B": 2048, "toy": 32}
METHOD = LoRA(r=16, alpha=32)
WARMUP, STEPS = 5, 20
Run = dict[str, Any]


class Llama(L.LightningModule):
    """A Llama with random weights, the same on every process, made where they stay."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def configure_model(self) -> None:
        torch.manual_seed(0)
        with self.trainer.strategy.root_device:
            self.net = LlamaForCausalLM(LlamaConfig(**MODELS[self.name]))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=True)


class Measure(L.Callback):
    """Times the steps after the first ones, then a checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "it.ckpt"
        self.run: Run = {}

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 1 and torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # of what building the model left
        if trainer.global_step == WARMUP:
            if torch.cuda.is_initialized():
                torch.cuda.reset_peak_memory_stats()
            self.start = now()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.run["step_seconds"] = (now() - self.start) / STEPS
        if torch.cuda.is_initialized():
            self.run["kept_bytes"] = everyone(torch.cuda.memory_allocated())
            self.run["peak_bytes"] = everyone(torch.cuda.max_memory_allocated())
            self.run["reserved_bytes"] = everyone(torch.cuda.max_memory_reserved())
        else:
            self.run["peak_bytes"] = everyone(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        start = now()
        trainer.save_checkpoint(self.path)
        saved = now()
        checkpoint = trainer.strategy.load_checkpoint(self.path)
        trainer.strategy.load_model_state_dict(checkpoint)
        trainer.strategy.load_optimizer_state_dict(checkpoint)
        self.run |= {"save_seconds": saved - start, "load_seconds": now() - saved}
        self.run["checkpoint_bytes"] = self.path.stat().st_size


def now() -> float:
    """Return the time at which all processes have done what they were told."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter()


def everyone(value: int) -> list[int]:
    found = [0] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def one(name: str, strategy: str, processes: int, folder: Path) -> None:
    """Measure one strategy in this process and the others that torchrun started."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if name == "toy":
        torch.set_num_threads(1)
    measure, vocabulary = Measure(folder), MODELS[name]["vocab_size"]
    trainer = L.Trainer(
        accelerator="cpu" if name == "toy" else "cuda",
        devices=processes,
        strategy=strategy,
        precision="bf16-true",
        max_steps=WARMUP + STEPS,
        callbacks=[LoRACallback(METHOD), measure],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        use_distributed_sampler=False,
    )
    tokens = torch.randint(vocabulary, (ROWS[name] * (WARMUP + STEPS), LENGTH[name]))
    trainer.fit(Llama(name), DataLoader(tokens, batch_size=ROWS[name]))
    if trainer.is_global_zero:
        per_second = processes * ROWS[name] * LENGTH[name] / measure.run["step_seconds"]
        planned = plan(name, strategy, processes) if strategy in PLANNED else {}
        (folder / f"{strategy}.json").write_text(
            json.dumps({**measure.run, **planned, "tokens_per_second": per_second})
        )


def plan(name: str, strategy: str, processes: int) -> Run:
    """Return what sharding_plan.py says."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**MODELS[name])).to(torch.bfloat16)
    inject(model, METHOD)
    planned = Plan(Shapes.of(model), processes, PLANNED[strategy])
    copies = planned.message_buffer if PLANNED[strategy] == "ddp" else 0  # DDP's buckets stay
    return {"planned_kept_bytes": planned.base + planned.state + copies, "planned_needed_bytes": planned.needed}


def launch(name: str, strategies: Sequence[str], processes: int) -> list[Run]:
    """Measure strategies under one torchrun; a run that failed has an ``error``."""
    with tempfile.TemporaryDirectory() as folder:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [*torchrun, __file__, "--worker", name, ",".join(strategies), str(processes), folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        files = {strategy: Path(folder) / f"{strategy}.json" for strategy in strategies}
        found = {strategy: json.loads(file.read_text()) for strategy, file in files.items() if file.exists()}
    errors = [one for one in re.findall(r"([\w.]*Error): ", done.stderr) if not one.endswith("ChildFailedError")]
    failed = {"error": errors[-1] if errors else f"exit status {done.returncode}", "log": done.stderr[-5000:]}
    return [
        {"model": name, "strategy": strategy, "processes": processes, **found.get(strategy, failed)}
        for strategy in strategies
    ]


def page(record: Run) -> str:
    """Return the page of what was measured."""
    rows = []
    for run in record["runs"]:
        where = [run["model"], run["processes"], run["strategy"]]
        if "error" in run:
            rows.append([*where, run["error"], *[""] * 8])
            continue
        sizes = [run.get("kept_bytes"), run.get("planned_kept_bytes"), run["peak_bytes"], run.get("reserved_bytes")]
        largest = [max(size) if isinstance(size, list) else size for size in sizes]
        memory = ["" if size is None else gb(size) for size in largest]
        seconds = [f"{run[f'{what}_seconds']:.3f}" for what in ("save", "load")]
        speed = [f"{run['tokens_per_second']:,.0f}", f"{1000 * run['step_seconds']:.1f}"]
        rows.append([*where, *speed, *memory, *seconds, f"{run['checkpoint_bytes'] / 10**6:,.1f}"])
    head = ["model", "processes", "strategy", "tokens/s", "ms a step", "kept GB", "planned", "peak GB", "reserved GB"]
    models = dict.fromkeys(run["model"] for run in record["runs"])
    batches = "; ".join(f"{name}: {ROWS[name]} x {LENGTH[name]} tokens" for name in models)
    return f"""# Sharded strategies on GPUs

Measured with {record["environment"]}. LoRA with r={METHOD.r} on all linear layers of the blocks, in fp32 over a base of
random weights in bf16, eager, AdamW. Batches of one process: {batches}. Times are means of {STEPS} steps after {WARMUP}
others; memory is that of the process with most. Kept is what is allocated between steps, beside it what
[the plan](sharding_plan.md) says; peak is the most that was allocated in a step (on CPUs: the largest resident size of
the process so far). A checkpoint is written to a local disk and read again from the system's cache of it.
`python benchmarks/gpu/sharding.py` writes this page.

{table([*head, "save s", "load s", "checkpoint MB"], rows)}"""


def environment(toy: bool) -> str:
    device = "CPUs over gloo" if toy else f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()} over NCCL"
    return f"torch {torch.__version__}, lightning {L.__version__}, {device}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--toy", action="store_true", help="a tiny model on CPUs; nothing is kept")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)  # what torchrun starts
    options = parser.parse_args()
    if options.worker:
        name, strategies, processes, folder = options.worker
        for strategy in strategies.split(","):
            one(name, strategy, int(processes), Path(folder))
        return
    if not options.toy and not torch.cuda.is_available():
        sys.exit("no GPU is here: give --toy to try the benchmark on CPUs")
    models = ["toy"] if options.toy else ["1B", "8B"]
    worlds = [2] if options.toy else sorted({1, torch.cuda.device_count()})
    record: Run = {"environment": environment(options.toy), "runs": []}
    together = [STRATEGIES] if options.toy else [(strategy,) for strategy in STRATEGIES]
    for name, processes, strategies in product(models, worlds, together):
        record["runs"] += launch(name, strategies, processes)
        print(record["runs"][-1], flush=True)
        if not options.toy:
            (RESULTS / "gpu_sharding.json").write_text(json.dumps(record, indent=1) + "\n")
            (RESULTS / "gpu_sharding.md").write_text(page(record))
    print(page(record))


if __name__ == "__main__":
    main()
