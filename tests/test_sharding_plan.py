"""The formulas of benchmarks/sharding_plan.py against bytes counted in processes that train small models over gloo.

``python test_sharding_plan.py FOLDER`` is what the tests run: it counts and writes ``FOLDER/WORLD.json``.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
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
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRA, LoRACallback, inject
from lightning_lora.sharding import is_sharded, local
from lightning_lora.strategies import LoRAFSDP2Strategy
from lightning_lora.strategies.blocks import blocks_of

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import sharding_plan
from sharding_plan import Plan, Shapes

# Sizes that 2 and 4 do not divide, so that shards are padded.
SIZES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 12, "intermediate_size": 22, "num_hidden_layers": 2, "num_attention_heads": 2},
    "tied": {"hidden_size": 20, "intermediate_size": 35, "num_hidden_layers": 3, "num_attention_heads": 2},
}
RANKS = (1, 3)
RANDOM_STATES = 20_000  # bytes, at most, of one process
KINDS = ("lora_fsdp2", "adapters sharded too")  # in every size
MORE = ("not resharded", "bf16 base", "ddp")  # in one
CASES = {
    2: [(name, r, kind) for kind in KINDS for name in SIZES for r in RANKS] + [("tied", 3, kind) for kind in MORE],
    4: [(name, 1, kind) for kind in KINDS for name in SIZES],
}
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
    """Counts what comes out of all-gathers and goes into sums, by the name of the operation.

    Attributes:
        most: The most that was there at once of what all-gathers gave: their messages, and divided weights made whole.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.model = model
        self.bytes: dict[str, int] = {}
        self.messages: list[tuple[StorageWeakRef, int]] = []
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in function.namespace:
            first = args[1] if "reduce_scatter" in function._opname else args[0]  # args[0] is the output there
            self.bytes[function._opname] = self.bytes.get(function._opname, 0) + sum(map(nbytes, tree_leaves(first)))
            if "allgather" in function._opname and isinstance(first, Tensor):
                self.messages.append((StorageWeakRef(first.untyped_storage()), nbytes(first)))
                self.look()
        return function(*args, **kwargs or {})

    def look(self, *args: Any) -> None:
        """Count what is there."""
        if self.model is not None:
            time.sleep(0.002)  # gloo's thread may hold a message for an instant after it came
            whole = held(p for p in self.model.parameters() if not p.requires_grad and not is_sharded(p))
            messages = sum(size for message, size in self.messages if not message.expired())
            self.most = max(self.most, whole + messages)


class Lit(L.LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.net = llama(name)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters())


class Counts(L.Callback):
    """Counts each step's messages, and what they give."""

    def __init__(self) -> None:
        self.steps: list[Collectives] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        for block in blocks_of(module):
            block.input_layernorm.register_forward_hook(lambda *args: self.steps[-1].look())

    def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        self.steps.append(Collectives(module))
        self.steps[-1].__enter__()

    def on_train_batch_end(self, *args: Any) -> None:
        self.steps[-1].__exit__(None, None, None)


def of_adapters(trained: list[nn.Parameter], optimizer: Any) -> Found:
    """Count what is held of adapters, and of these with gradients and Adam's moments."""
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return {"adapters": held(trained), "state": sum(map(held, (trained, [p.grad for p in trained], moments)))}


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
    return {
        "base": held(p for p in module.parameters() if not p.requires_grad),
        **of_adapters(trained, trainer.optimizers[0]),
        "steps": [step.bytes for step in counts.steps],
        "most": min(step.most for step in counts.steps),
        "file": path.stat().st_size,
        "stored": sum(nbytes(leaf) for leaf in tree_leaves(_without_random_states(path)) if isinstance(leaf, Tensor)),
        "tensors": len(trained),
        "saving": saving.bytes,
    }


def _without_random_states(path: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path)
    del checkpoint["lightning_lora.random_states"]
    return checkpoint


def all_divided(name: str, r: int) -> Found:
    """One step of a model whose adapters ``fully_shard`` divides like the base."""
    model = llama(name)
    inject(model, LoRA(r=r, alpha=2), seed=0)
    for block in blocks_of(model):
        fully_shard(block)
    fully_shard(model, reshard_after_forward=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    batch = torch.arange(6).view(1, 6)
    optimizer = torch.optim.Adam(trained)
    with Collectives() as messages:
        model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    base = held(p for p in model.parameters() if not p.requires_grad)
    return {"base": base, **of_adapters(trained, optimizer), "steps": [messages.bytes]}


def main(rank: int, folder: Path, world: int) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # not used: the group is made here
    dist.init_process_group("gloo", init_method=f"file://{folder}/group{world}", rank=rank, world_size=world)
    found = [
        all_divided(name, r) if kind == "adapters sharded too" else trained_by_lightning(name, r, kind, folder)
        for name, r, kind in CASES[world]
    ]
    if rank == 0:
        (folder / f"{world}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


# ---- the tests

pytestmark = pytest.mark.xdist_group("test_sharding_plan")  # so that one worker runs the processes, once


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Any, ...], Found]:
    """What processes counted, by case and number of processes."""
    folder = tmp_path_factory.mktemp("plan")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PL_", "PYTEST", "LOCAL_RANK"))}
    here = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, __file__, folder],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**kept, "PYTHONPATH": os.pathsep.join(here), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counted = {world: json.loads((folder / f"{world}.json").read_text()) for world in CASES}
    return {(*case, world): one for world in CASES for case, one in zip(CASES[world], counted[world], strict=True)}


def cases(*kinds: str) -> pytest.MarkDecorator:
    chosen = [(*case, world) for world in CASES for case in CASES[world] if not kinds or case[2] in kinds]
    return pytest.mark.parametrize("case", chosen, ids=lambda case: "-".join(map(str, case)))


WITH_LIGHTNING = cases("lora_fsdp2", *MORE)


@cases()
def test_a_process_holds_the_planned_bytes_of_the_base_and_the_adapters_padding_with_them(
    case: Any, found: Any
) -> None:
    assert (found[case]["base"], found[case]["adapters"]) == (plan(*case).base, plan(*case).adapters)


@cases()
def test_a_process_holds_the_planned_adapters_gradients_and_moments(case: Any, found: Any) -> None:
    assert found[case]["state"] == plan(*case).state


@cases()
def test_a_step_gathers_and_averages_the_planned_bytes(case: Any, found: Any) -> None:
    for step in found[case]["steps"]:
        assert step.get("_allgather_base_", 0) == plan(*case).gathered
        summed = {kind: size for kind, size in step.items() if kind not in ("_allgather_base_", "broadcast_")}
        kind = "_reduce_scatter_base_" if case[2] == "adapters sharded too" else "allreduce_"
        assert summed == {kind: plan(*case).averaged}


@cases("lora_fsdp2", "not resharded", "bf16 base")
def test_the_planned_bytes_are_whole_at_once(case: Any, found: Any) -> None:
    assert found[case]["most"] == plan(*case).gathered_at_once


@WITH_LIGHTNING
def test_a_checkpoint_holds_the_planned_bytes_and_what_pickling_adds_to_each_tensor(case: Any, found: Any) -> None:
    assert found[case]["stored"] == plan(*case).checkpoint
    beside = 1500 * found[case]["tensors"] + RANDOM_STATES * case[-1]
    assert 0 < found[case]["file"] - plan(*case).checkpoint < beside


@cases("lora_fsdp2", "not resharded", "bf16 base")
def test_a_checkpoint_sends_its_name_and_random_states_only(case: Any, found: Any) -> None:
    assert plan(*case).checkpoint_received == 0
    saving = found[case]["saving"]
    assert set(saving) <= {"broadcast_", "barrier", "allgather_", "gather_"}
    assert saving["broadcast_"] < 1000
    assert saving["allgather_"] + saving["gather_"] < RANDOM_STATES * case[-1]


@pytest.fixture(scope="module")
def planned() -> dict[tuple[str, int], Shapes]:
    """The models of the page."""
    return {(name, r): sharding_plan.shapes(name, r) for name in sharding_plan.SIZES for r in sharding_plan.RANKS}


@pytest.mark.parametrize(("name", "base"), [("8B", 8_030_261_248), ("70B", 70_553_706_496), ("405B", 405_853_388_800)])
def test_planned_models_have_the_sizes_of_the_published_ones_and_a_rank_four_times_as_high(
    name: str, base: int, planned: Any
) -> None:
    low, high = (planned[name, r] for r in (16, 64))
    assert sum(tensor.numel() for tensor in low.all_frozen) == base
    assert {tensor.dtype for tensor in low.all_frozen} == {torch.bfloat16}
    assert {tensor.dtype for tensor in low.all_trained} == {torch.float32}
    assert 4 * sum(t.numel() for t in low.all_trained) == sum(t.numel() for t in high.all_trained)


def test_the_page_says_what_the_formulas_give(planned: Any) -> None:
    written = sharding_plan.PAGE.read_text()
    assert written == sharding_plan.page(planned), "run python benchmarks/sharding_plan.py"


if __name__ == "__main__":
    logging.disable()
    for world in CASES:
        start_processes(main, (Path(sys.argv[1]), world), nprocs=world, start_method="fork")
