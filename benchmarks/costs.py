"""What adapters cost beside the step, next to PEFT: inject, save, load, switch, merge, and how a forward grows.

All contenders run by turns in one process. Times are this process's CPU time on one thread; the ratio is the median of
the rounds' own ratios. Peaks are what PyTorch had allocated at most, beyond what was there before.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from lightning_lora import DoRA, LoRA, Method, inject, load_adapter, merge_, merged, remove, save_adapter, use, using
from lightning_lora.state import own_state_dict
from measuring import footer, measured_with, options, peak_bytes, write

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS, SIDE = 32, 4096
LARGE_RANK = 128  # at a hidden size of 512 its adapters take 152 MiB
Run = Callable[[], object]
Prepare = Callable[[], Run]  # what is not timed, and returns what is
Row = dict[str, Any]


def llama(hidden: int, layers: int, device: str) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=8,
        use_cache=False,
    )
    with torch.device(device):
        return transformers.LlamaForCausalLM(config).requires_grad_(False)


def same_weights(model: nn.Module) -> nn.Module:
    """Return another model of the same tensors."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def lora_config(r: int, **options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=r, lora_alpha=r, target_modules=TARGETS, **options)


def by_turns(what: str, rounds: int, ours: Prepare, theirs: Prepare) -> Row:
    seconds: dict[str, list[float]] = {"ours": [], "peft": []}
    for _ in range(rounds + 1):
        for who, prepare in (("ours", ours), ("peft", theirs)):
            run = prepare()
            gc.collect()
            before = time.process_time()
            result = run()
            seconds[who].append(time.process_time() - before)
            del run, result
    row = {"what": what, "rounds": rounds, "seconds": {who: all_of[1:] for who, all_of in seconds.items()}}
    print(f"{what}: {', '.join(f'{who} {middle(row, who):.3g} ms' for who in seconds)}", flush=True)
    return row


def middle(row: Row, who: str) -> float:
    return 1e3 * statistics.median(row["seconds"][who])


def injected(device: str, hidden: int, rounds: int) -> Iterator[Row]:
    base = llama(hidden, LAYERS, device)
    methods: dict[str, tuple[Method, dict[str, Any]]] = {
        "LoRA": (LoRA(r=16), {}),
        "DoRA": (DoRA(r=16), {"use_dora": True}),
    }
    for name, (method, their_options) in methods.items():

        def ours(method: Method = method) -> Run:
            model = same_weights(base)
            return lambda: inject(model, method, TARGETS)

        def theirs(their_options: dict[str, Any] = their_options) -> Run:
            model = same_weights(base)
            return lambda: peft.get_peft_model(model, lora_config(16, **their_options))

        where = f"on {device}, hidden size {hidden:,}"
        yield by_turns(f"inject {name} into {LAYERS * len(TARGETS)} linear layers {where}", rounds, ours, theirs)


def loaded(rounds: int, folder: Path) -> Iterator[Row]:
    """Rows about one model with two large adapters."""
    base = llama(512, LAYERS, "cpu")
    mine, other = same_weights(base), peft.get_peft_model(same_weights(base), lora_config(LARGE_RANK))
    inject(mine, LoRA(r=LARGE_RANK), TARGETS)
    with torch.no_grad():
        for name, parameter in (*mine.named_parameters(), *other.named_parameters()):
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    size = sum(tensor.nbytes for tensor in own_state_dict(mine).values()) / 2**20
    yield by_turns(
        "adapter state dict, 448 tensors",
        rounds,
        lambda: lambda: own_state_dict(mine),
        lambda: lambda: peft.get_peft_model_state_dict(other),
    )
    yield by_turns(
        f"save {size:.0f} MiB, with checksum and sync here, without in PEFT",
        min(rounds, 3),
        lambda: lambda: save_adapter(mine, folder / "ours"),
        lambda: lambda: other.save_pretrained(folder / "peft"),
    )

    def load_mine() -> Run:
        if any(name.endswith("second") for name, _ in mine.named_modules()):
            remove(mine, "second")
        return lambda: load_adapter(mine, folder / "ours", "second")

    def load_other() -> Run:
        if "second" in other.peft_config:
            other.delete_adapter("second")
        return lambda: other.load_adapter(folder / "peft", "second")

    row = by_turns(f"load a second adapter of {size:.0f} MiB, from memory", min(rounds, 3), load_mine, load_other)
    content = (folder / "ours" / "adapter_model.safetensors").read_bytes()
    alone = by_turns("SHA-256 alone", 3, lambda: lambda: hashlib.sha256(content), lambda: lambda: None)
    yield row | {"note": f"{middle(alone, 'ours'):.0f} ms of ours are SHA-256 over the file, which PEFT does not check"}
    turn = iter(range(10**6))

    def switch(to: Callable[[str], object]) -> Run:
        task = ("default", "second")[next(turn) // 2 % 2]
        return lambda: to(task)

    yield by_turns(
        "switch the task in use",
        3 * rounds,
        lambda: switch(lambda task: use(mine, task)),
        lambda: switch(other.set_adapter),
    )
    yield by_turns(
        "enter and leave the bare base",
        3 * rounds,
        lambda: lambda: inside(using(mine)),
        lambda: lambda: inside(other.disable_adapter()),
    )


def inside(context: Any) -> None:
    with context:
        pass


def merges(dtype: torch.dtype, rounds: int) -> Iterator[Row]:
    weight = torch.randn(SIDE, SIDE).to(dtype)
    b = torch.randn(SIDE, 16) * 0.01

    def layer() -> nn.Module:
        model = nn.Sequential(nn.Linear(1, 1, bias=False))
        model[0].weight = nn.Parameter(weight.clone())
        model[0].in_features = model[0].out_features = SIDE
        return model

    def mine() -> nn.Module:
        model = layer()
        inject(model, LoRA(r=16, alpha=16), ["0"])
        model[0].adapters["weight"]["default"].lora_B.data.copy_(b)
        return model

    def other() -> Any:
        model = peft.get_peft_model(layer(), peft.LoraConfig(r=16, lora_alpha=16, target_modules=["0"]))
        model.base_model.model[0].lora_B["default"].weight.data.copy_(b)
        return model

    def again_and_back(model: Any) -> None:
        model.merge_adapter()
        model.unmerge_adapter()

    of = f"one {SIDE} x {SIDE} layer in {str(dtype).removeprefix('torch.')}"

    def merge_mine() -> Run:
        model = mine()
        return lambda: merge_(model)

    row = by_turns(f"merge {of}", rounds, merge_mine, lambda: other().merge_adapter)
    ours, theirs = mine(), other()
    yield row | {"note": peaks(lambda: merge_(ours), theirs.merge_adapter)}
    ours, theirs = mine(), other()
    row = by_turns(
        f"merge {of} and go back", 3, lambda: lambda: inside(merged(ours)), lambda: lambda: again_and_back(theirs)
    )
    assert row["rounds"] + 1 == 4
    changed = [
        share_changed(ours[0].weight, weight),
        share_changed(theirs.base_model.model[0].base_layer.weight, weight),
    ]
    note = f"after 4 times {changed[0]:.1%} of the weights are others here, {changed[1]:.1%} in PEFT"
    yield row | {"note": f"{note}; {peaks(lambda: inside(merged(ours)), lambda: again_and_back(theirs))}"}


def share_changed(weight: Tensor, before: Tensor) -> float:
    return float((weight != before).float().mean())


def peaks(ours: Run, theirs: Run) -> str:
    mine, other = (peak_bytes(run) / 2**20 for run in (ours, theirs))
    return f"peak +{mine:.1f} MiB here, +{other:.1f} MiB in PEFT"


def growth(rounds: int) -> Iterator[Row]:
    base = llama(64, 4, "cpu")
    x = torch.randint(256, (1, 16))
    for number in (1, 10, 100):
        mine, other = same_weights(base), peft.get_peft_model(same_weights(base), lora_config(4))
        for i in range(number):
            inject(mine, LoRA(r=4), TARGETS, task=f"task{i}")
            if i:
                other.add_adapter(f"task{i}", lora_config(4))
        mine.eval()
        other.eval()

        def forward(model: nn.Module) -> Prepare:
            def run() -> object:
                with torch.no_grad():
                    return model(input_ids=x)

            return lambda: run

        loaded_ones = f"{number} adapters loaded" if number > 1 else "1 adapter loaded"
        what = f"forward of {4 * len(TARGETS)} layers, 16 tokens, {loaded_ones}, 1 in use"
        yield by_turns(what, 3 * rounds, forward(mine), forward(other))
        last = f"task{number - 1}"
        yield by_turns(
            f"switch {4 * len(TARGETS)} layers, {loaded_ones}",
            3 * rounds,
            lambda mine=mine, last=last: lambda: use(mine, last),
            lambda other=other: lambda: other.set_adapter("default"),
        )


def page(found: dict[str, Any]) -> str:
    lines = []
    for row in found["rows"]:
        mine, theirs = (cell(row["seconds"][who]) for who in ("ours", "peft"))
        pairs = zip(row["seconds"]["ours"], row["seconds"]["peft"], strict=True)
        ratio = statistics.median(one / other if other else float("nan") for one, other in pairs)
        lines.append(f"| {row['what']} | {mine} | {theirs} | **{ratio:.3f}** | {row.get('note', '')} |")
    return f"""# Beside the step: what adapters cost next to PEFT

`python benchmarks/costs.py` writes this page. Times are CPU time on one thread in milliseconds, the median and the
quartiles of rounds in which both run by turns in one process; the ratio is the median of the rounds' ratios. Models are
Llamas of {LAYERS} layers with random weights. Peaks are what PyTorch had
allocated at most, beyond what was there before.

| what | here | PEFT | ratio | |
|---|---|---|---|---|
{chr(10).join(lines)}

{footer(found)}"""


def cell(seconds: list[float]) -> str:
    first, second, third = (1e3 * value for value in statistics.quantiles(seconds, n=4))
    return f"{number(second)} ({number(first)} to {number(third)})"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    given = options(__doc__, rounds=5)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    folder = Path(tempfile.mkdtemp())
    rows: list[Row] = []
    try:
        for part in (
            injected("meta", SIDE, given.rounds),
            injected("cpu", 256, given.rounds),
            loaded(given.rounds, folder),
            merges(torch.float32, given.rounds),
            merges(torch.bfloat16, given.rounds),
            growth(given.rounds),
        ):
            rows += part
    finally:
        shutil.rmtree(folder)
    found = {"rows": rows, **measured_with(given.remark)}
    write("costs", found, page(found))


if __name__ == "__main__":
    main()
