"""Steps of Llamas with random weights on one GPU beside PEFT's, in ten minutes: ``python benchmarks/gpu/step.py``.

Tokens per second, memory and ratios at the shapes of Llama 3.2 1B and Llama 3.1 8B, eager and compiled; training every
weight for scale; the claims of LoRA's paper; merged adapters. All contenders of a comparison hold the same frozen base
in memory once and take turns; every step gets inputs of its own, and what lay in free memory before is NaN, so that
reading memory that nobody wrote shows in the loss. Writes ``benchmarks/results/gpu_step.json`` and ``.md``.

``--toy`` does the same with a tiny model on the CPU; it prints the page and keeps nothing. That much was tried; nothing
here was run on a GPU yet.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lightning_lora import inject, merge_, save_adapter

sys.path.append(str(Path(__file__).parents[1]))
import contenders as held
from bases import Base
from contenders import ALL16, AMP, METHODS, REGIMES, W16, W32, Case, Contender
from measuring import footer, measured_with, peak_bytes, quartiles, ratio, table, write

SHAPES: dict[str, dict[str, Any]] = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "toy": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
}
ROWS, LENGTH = {"1B": 4, "8B": 2, "toy": 2}, {"1B": 2048, "8B": 2048, "toy": 64}
CASES: list[tuple[str, str, str, bool]] = [  # model, method, regime, compiled
    *(("1B", "LoRA", regime, False) for regime in (W32, AMP, W16, ALL16)),  # those with a base of one dtype together
    *(("1B", method, W16, False) for method in ("DoRA", "LoRA-FA", "AdaLoRA", "VeRA")),
    *(("1B", "LoRA", regime, True) for regime in (W16, ALL16)),
    *(("8B", "LoRA", regime, False) for regime in (W16, ALL16)),
    ("8B", "DoRA", W16, False),
]
TOY_CASES = [
    ("toy", "LoRA", W32, False),
    ("toy", "LoRA", AMP, False),
    ("toy", "LoRA", W16, True),
    *(("toy", method, W16, False) for method in ("DoRA", "LoRA-FA", "AdaLoRA", "VeRA")),
]
ROUNDS, WARMUP = 7, 3
Result = dict[str, Any]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def llama(name: str) -> Base:
    """Return a Llama of one of the shapes, made where it stays."""
    small = name == "toy"
    config = transformers.LlamaConfig(
        **SHAPES[name],
        vocab_size=256 if small else 128_256,
        num_key_value_heads=2 if small else 8,
        tie_word_embeddings=name != "8B",
        use_cache=False,
    )

    def build() -> nn.Module:
        with device():
            return transformers.LlamaForCausalLM(config)

    def draw(batch: int, tokens: int) -> dict[str, Any]:
        with device():
            labels = torch.randint(config.vocab_size, (batch, tokens))
            return {"inputs_embeds": torch.randn(batch, tokens, config.hidden_size), "labels": labels}

    return Base(build, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), draw)


def on_one_base(base: Base, dtype: torch.dtype) -> Base:
    """Return a base all of whose models hold the parameters of one that is made now."""
    torch.set_default_dtype(dtype)  # so that it is never there in another
    first: Any = base.build().requires_grad_(False)
    torch.set_default_dtype(torch.float32)

    def build() -> nn.Module:
        with torch.device("meta"):
            model = type(first)(first.config)
        model.load_state_dict(first.state_dict(), assign=True)
        for name, buffer in first.named_buffers():  # those that no file holds
            owner, _, last = name.rpartition(".")
            model.get_submodule(owner)._buffers[last] = buffer
        model.tie_weights()
        return model  # type: ignore[no-any-return]

    return replace(base, build=build)


def seconds(run: Callable[[], object]) -> float:
    """Return how long a function takes: between two CUDA events, or this process's CPU time."""
    if device().type == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def poison() -> None:
    """Write NaN to half of the free memory, in large and in small pieces, and leave it to the allocator."""
    gc.collect()
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 2**24
    with device():
        pieces = [torch.full((free // 4,), math.nan, dtype=torch.bfloat16)]
        pieces += [torch.full((2**16,), math.nan, dtype=torch.bfloat16) for _ in range(64)]
    del pieces


def by_turns(contenders: dict[str, Contender], base: Base, rows: int, length: int) -> dict[str, list[float]]:
    """Return the seconds of each one's steps; each step has inputs of its own, and its loss has to be a number."""
    found: dict[str, list[float]] = {who: [] for who in contenders}
    for turn in range(WARMUP + ROUNDS):
        batch = base.draw(rows, length)
        for who, contender in contenders.items():
            contender.take(
                {**batch, contender.first: batch[contender.first].to(contender.batch[contender.first].dtype)}
            )
            losses: list[Tensor] = []
            took = seconds(lambda contender=contender, losses=losses: losses.append(contender.step()))  # type: ignore[misc]
            if not losses[0].isfinite():
                raise ValueError(f"the loss of {who} is {losses[0].item()}")
            if turn >= WARMUP:
                found[who].append(took)
    return found


def total_bytes(contender: Contender) -> int:
    """Return what a training step takes: parameters, the optimizer's state, and the most that comes on top."""
    own = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in contender.model.parameters()}
    states = contender.optimizer.state.values() if contender.optimizer else ()
    kept = sum(t.nbytes for state in states for t in state.values() if isinstance(t, Tensor))
    return sum(own.values()) + kept + increase(contender.step)


def increase(run: Callable[[], object]) -> int:
    """Return the most bytes that are allocated at a time beyond those that were there before."""
    if device().type == "cpu":
        return peak_bytes(run)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def compile_blocks(model: nn.Module) -> None:
    """Compile the blocks one by one, which share what is compiled."""
    for block in next(module for module in model.modules() if isinstance(module, nn.ModuleList)):
        block.compile()


def compare(name: str, base: Base, method: str, regime: str, compiled: bool) -> Result:
    """Measure floor, PEFT and ours over one base."""
    rows, length = ROWS[name], LENGTH[name]
    rank = 256 if method == "VeRA" else 16
    case = Case(name, method, regime, rank, batch=rows, tokens=length)
    models = {
        "floor": held.plain(base, REGIMES[regime][0]),
        "PEFT": held.pefts(base, case),
        "ours": held.ours(base, METHODS[method].ours(rank, 0.0), regime),
    }
    batch = base.draw(rows, length)
    contenders = {who: Contender(model, batch, regime, fused=True) for who, model in models.items()}
    for contender in contenders.values():
        contender.step()  # all that is made at the first call
        if compiled:
            compile_blocks(contender.model)
    poison()
    times = by_turns(contenders, base, rows, length)
    return {
        **vars(case),
        "compiled": compiled,
        "seconds": times,
        "ratios": quartiles(times, "PEFT"),
        "over floor": quartiles(times, "floor"),
        "increase": {who: increase(contender.step) for who, contender in contenders.items()},
    }


def full(name: str, regime: str) -> Result:
    """Measure training of every weight beside LoRA as its paper trains it: rank 4 on queries and values."""
    rows, length, base = ROWS[name], LENGTH[name], llama(name)
    found: Result = {"base": name, "regime": regime, "seconds": {}, "bytes": {}, "checkpoint": {}}
    for who in ("every weight", "LoRA"):
        torch.set_default_dtype(REGIMES[regime][0])
        model = base.build()
        torch.set_default_dtype(torch.float32)
        if who == "LoRA":
            inject(model, METHODS["LoRA"].ours(4, 0.0), ["q_proj", "v_proj"])
            with tempfile.TemporaryDirectory() as folder:
                save_adapter(model, Path(folder) / "it.adapter")
                files = (Path(folder) / "it.adapter").rglob("*.safetensors")
                found["checkpoint"][who] = sum(file.stat().st_size for file in files)
        else:
            found["checkpoint"][who] = sum(parameter.nbytes for parameter in model.parameters())
        contender = Contender(model, base.draw(rows, length), regime, fused=True)
        found["seconds"][who] = by_turns({who: contender}, base, rows, length)[who]
        found["bytes"][who] = total_bytes(contender)
        del model, contender
        release()
    return found


def merged_latency(name: str) -> Result:
    """Measure a forward of the base, of the base with adapters, and with these merged."""
    base = on_one_base(llama(name), torch.bfloat16)
    models = {
        "base": held.plain(base, torch.bfloat16),
        "not merged": held.ours(base, METHODS["LoRA"].ours(16, 0), ALL16),
    }
    own = llama(name)
    torch.set_default_dtype(torch.bfloat16)
    merged = own.build()
    torch.set_default_dtype(torch.float32)
    inject(merged, METHODS["LoRA"].ours(16, 0.0), base.names(merged))
    models["merged"] = merge_(merged)
    batch = {key: t.bfloat16() if t.is_floating_point() else t for key, t in base.draw(1, LENGTH[name]).items()}
    times: dict[str, list[float]] = {who: [] for who in models}
    with torch.inference_mode():
        for turn in range(WARMUP + 3 * ROUNDS):
            for who, model in models.items():
                took = seconds(lambda model=model: model.eval()(**batch))  # type: ignore[misc]
                if turn >= WARMUP:
                    times[who].append(took)
    return {"base": name, "seconds": times, "ratios": quartiles(times, "base")}


def release() -> None:
    """Give back what nothing holds any more."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def gpt3() -> float:
    """Return how many times smaller LoRA's factors are than GPT-3's weights: rank 4, queries and values, on paper."""
    layers, width, vocabulary, positions = 96, 12_288, 50_257, 2048
    weights = layers * 12 * width**2 + (vocabulary + positions) * width
    return weights / (layers * 2 * 2 * 4 * width)


def page(record: Result) -> str:
    """Return the page of what was measured."""
    steps = []
    for one in record["steps"]:
        asked = [one["base"], f"{one['method']}, {one['regime']}{', compiled' if one['compiled'] else ''}"]
        if "error" in one:
            steps.append([*asked, one["error"], *[""] * 4])
            continue
        tokens = one["batch"] * one["tokens"]
        speed = [f"{tokens / statistics.median(one['seconds'][who]):,.0f}" for who in ("floor", "PEFT", "ours")]
        memory = [f"{one['increase'][who] / 1e9:.3g}" for who in ("floor", "PEFT", "ours")]
        ratios = [ratio(one["ratios"]["ours"], best=True), ratio(one["over floor"]["ours"])]
        steps.append([*asked, " / ".join(speed), *ratios, " / ".join(memory)])
    claims = []
    for one in record["full"]:
        if "error" in one:
            claims.append([one["base"], one["regime"], one["error"], *[""] * 4])
            continue
        every, lora = (
            (statistics.median(one["seconds"][who]), one["bytes"][who], one["checkpoint"][who])
            for who in ("every weight", "LoRA")
        )
        memory = [f"{every[1] / 1e9:.3g} / {lora[1] / 1e9:.3g}", f"{every[1] / lora[1]:.1f}"]
        claims.append([one["base"], one["regime"], f"{every[0] / lora[0]:.2f}", *memory, f"{every[2] / lora[2]:,.0f}"])
    latency = [[who, ratio(found)] for who, found in record["merged"].get("ratios", {}).items()]
    head = ["model", "step", "tokens/s", "ours to PEFT", "ours to the floor", "GB on top"]
    beside = ["model", "regime", "times faster", "GB in all: every weight / LoRA", "times", "checkpoint, times smaller"]
    sizes = "; ".join(f"{name}: {ROWS[name]} x {LENGTH[name]} tokens" for name in record["sizes"])
    return f"""# Steps on a GPU

On {record["device"]}; Llamas with random weights, adapters of rank 16 (VeRA 256) on all linear layers of the blocks,
fused AdamW; {sizes}. Contenders take turns over one base; ratios are medians of {ROUNDS} rounds with their quartiles,
between CUDA events. Three numbers are floor / PEFT / ours, where the floor is the base's own forward and the gradient
of its input. Every step had fresh inputs, and free memory was NaN before. "On top" is what forward, backward and
optimizer allocate at their peak beyond parameters and the optimizer's state. Compiled: each block by `torch.compile`.
`python benchmarks/gpu/step.py` writes this page.

{table(head, steps)}
## Beside training every weight

LoRA as in its paper's experiments on GPT-3: rank 4 on queries and values. The paper (arXiv:2106.09685) says 3 times
less memory, 25 % faster, and a checkpoint 10,000 times smaller, at 175 billion weights; there, on paper, this rank
makes it {gpt3():,.0f} times.

{table(beside, claims)}
## Merged

Seconds of a forward as a ratio to the base's; one sequence, bf16.

{table(["model", "time"], latency)}
{footer(record)}"""


def attempt(found: Result, measure: Callable[[], Result], until: float) -> Result:
    """Return what was measured, or why it was not."""
    if time.monotonic() > until:
        return {**found, "error": "left out, the time was up"}
    try:
        return measure()
    except torch.OutOfMemoryError:
        return {**found, "error": "out of memory"}
    finally:
        release()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--toy", action="store_true", help="a tiny model on the CPU; nothing is kept")
    parser.add_argument("--seconds", type=float, default=540, help="nothing new is begun after these")
    parser.add_argument("--remark", default="", help="what else was going on, for the page")
    options = parser.parse_args()
    if not options.toy and not torch.cuda.is_available():
        sys.exit("no GPU is here: give --toy to try the benchmark on the CPU")
    if device().type == "cpu":
        torch.set_num_threads(1)
    until = time.monotonic() + options.seconds
    cases = TOY_CASES if options.toy else CASES
    names = list(dict.fromkeys(name for name, *_ in cases))
    steps: list[Result] = []
    for (name, dtype), group in groupby(cases, lambda one: (one[0], REGIMES[one[2]][0])):
        base = on_one_base(llama(name), dtype)
        for _, method, regime, compiled in group:
            asked = {"base": name, "method": method, "regime": regime, "compiled": compiled}
            measure = partial(compare, name, base, method, regime, compiled)
            steps.append(attempt(asked, measure, until))
            print(asked, steps[-1].get("error") or steps[-1]["ratios"]["ours"], flush=True)
        del base, measure
        release()
    whole = [
        attempt({"base": name, "regime": regime}, partial(full, name, regime), until)
        for name in names
        for regime in ([ALL16] if name == "8B" else [ALL16, AMP])
    ]
    merged = attempt({}, partial(merged_latency, names[0]), until)
    kind = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    record = {"device": kind, "sizes": names, "steps": steps, "full": whole, "merged": merged}
    record |= measured_with(options.remark)
    if options.toy:
        print(page(record))
    else:
        write("gpu_step", record, page(record))


if __name__ == "__main__":
    main()
