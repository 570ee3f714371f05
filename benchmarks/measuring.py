"""How steps are measured: counted where that can be, else timed by turns in one process.

Counts do not depend on the machine. Times are this process's CPU time on one thread: contenders run one after the other
in every round, and what is compared is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from lightning_lora.plots import empty_figure

RESULTS = Path(__file__).parent / "results"
WITHOUT_KERNEL = {
    *("view", "_unsafe_view", "t", "transpose", "permute", "expand", "detach", "alias", "unsqueeze", "squeeze"),
    *("slice", "select", "split", "split_with_sizes", "empty", "empty_like", "empty_strided", "new_empty"),
    *("new_empty_strided", "promote_types", "scalar_tensor", "as_strided", "unbind", "lift_fresh", "diagonal"),
}
WRITES_ALONE = {"copy_", "fill_", "zero_"}  # the first argument, without reading it


class Kernels(TorchDispatchMode):
    """Counts operations that run a kernel, and the bytes that these read and write.

    An operation reads each of its tensors once and writes each of its results once, in whole: the least traffic that it
    could have if nothing stayed in a cache from one operation to the next. An element that is broadcast counts once.

    Attributes:
        launches: The number of operations.
        traffic: Bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.traffic = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = op(*args, **kwargs)
        name = op.overloadpacket.__name__
        if name not in WITHOUT_KERNEL:
            self.launches += 1
            read = tree_leaves((args, {key: value for key, value in kwargs.items() if key != "out"}))
            if name in WRITES_ALONE or (name in ("addmm_", "baddbmm_") and kwargs.get("beta") == 0):
                read = read[1:]
            self.traffic += sum(_extent(tensor) for tensor in [*read, *tree_leaves(result)])
        return result


def _extent(value: Any) -> int:
    if not isinstance(value, Tensor):
        return 0
    sizes = (size for size, stride in zip(value.shape, value.stride(), strict=True) if stride)
    count = 1
    for size in sizes:
        count *= size
    return count * value.element_size()


@contextmanager
def kept(beside: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """Collect the bytes that autograd keeps for a backward pass, by storage.

    Args:
        beside: Tensors that are there anyway, such as the model's parameters.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in beside}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def _product(into: Any, one: torch.Size, other: torch.Size, **kwargs: Any) -> int:
    return 2 * one[0] * one[1] * other[1]


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)  # type: ignore[no-any-return, no-untyped-call]


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)  # type: ignore[no-any-return, no-untyped-call]


LEFT_OUT = {  # by PyTorch's counter
    torch.ops.aten.addmm_: _product,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def floating_point_operations(run: Callable[[], object]) -> int:
    """Return those of products, convolutions and attention that a function makes."""
    with FlopCounterMode(display=False, custom_mapping=LEFT_OUT) as counted:
        run()
    return counted.get_total_flops()


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the most bytes that PyTorch had allocated on the CPU at a time, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def by_turns(runs: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Return the CPU seconds of each run in each round.

    Args:
        runs: What is timed, by name.
        rounds: How many times.
        warmup: Rounds before these that do not count.
    """
    seconds: dict[str, list[float]] = {who: [] for who in runs}
    for _ in range(warmup):
        for run in runs.values():
            run()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for who, run in runs.items():
                start = time.process_time()
                run()
                seconds[who].append(time.process_time() - start)
    finally:
        gc.enable()
    return seconds


def quartiles(seconds: Mapping[str, Sequence[float]], to: str) -> dict[str, list[float]]:
    """Return lower quartile, median and upper quartile of each one's ratio to another in the same round."""
    ratios = {who: [a / b for a, b in zip(times, seconds[to], strict=True)] for who, times in seconds.items()}
    return {who: statistics.quantiles(values, n=4, method="inclusive") for who, values in ratios.items()}


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the slope of the straight line through points that has the least squared distance to them."""
    return statistics.linear_regression(x, y).slope


def options(about: str | None, rounds: int, **more: Any) -> argparse.Namespace:
    """Read the command line of a benchmark, which runs on one thread from here on.

    Args:
        about: What ``--help`` says.
        rounds: How many rounds are timed if nothing else is said.
        more: Further options, each with what argparse takes of it.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--remark", default="", help="what else was going on, for the page")
    for name, how in more.items():
        parser.add_argument(f"--{name}", **how)
    torch.set_num_threads(1)
    return parser.parse_args()


def measured_with(remark: str = "") -> dict[str, Any]:
    """Return machine, load and versions, for the record."""
    import peft
    import transformers

    import lightning_lora

    versions = {"lightning_lora": lightning_lora, "PEFT": peft, "PyTorch": torch, "transformers": transformers}
    return {
        "machine": f"{platform.machine()} {processor()}".strip(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "remark": remark,
        "versions": ", ".join(f"{name} {module.__version__}" for name, module in versions.items()),
    }


def processor() -> str:
    """Return the processor's name where the system tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def footer(record: Mapping[str, Any]) -> str:
    """Return the lines of a page that say what it was measured with."""
    load = ", ".join(f"{one:.1f}" for one in record["load"])
    remark = f": {record['remark']}" if record["remark"] else ""
    return (
        f"Measured on {record['machine']}; load averages at the end {load} on {record['cores']} cores{remark}.\n"
        f"{record['versions']}.\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines) + "\n"


def ratio(found: Sequence[float], best: bool = False) -> str:
    """Return a median with its quartiles, as a cell."""
    middle = f"**{found[1]:.2f}**" if best else f"{found[1]:.2f}"
    return f"{middle} ({found[0]:.2f} to {found[2]:.2f})"


def draw_ratios(name: str, cases: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Draw the times of many cases as ratios to PEFT's: medians, and lines from quartile to quartile.

    Args:
        name: The picture's, among the results.
        cases: For each case, and each contender in it, what ``quartiles`` found.
    """
    figure = empty_figure(f"benchmarks/{name}.py", 9, 1 + 0.2 * len(cases))
    panel = figure.subplots()
    for who, marker, color in (("floor", "|", "C7"), ("ours", "o", "C0")):
        low, middle, high = zip(*(ratios[who] for ratios in cases.values()), strict=True)
        panel.hlines(range(len(cases)), low, high, color=color)
        panel.plot(middle, range(len(cases)), marker, color=color, label=who)
    panel.axvline(1.0, color="C3", label="PEFT")
    panel.set_yticks(range(len(cases)), list(cases), fontsize=7)
    panel.margins(y=0.02)
    panel.invert_yaxis()
    panel.set_xlim(0, 1.3)
    panel.set_xlabel("time of a step, to PEFT's")
    panel.legend(loc="lower left")
    figure.savefig(RESULTS / f"{name}.png", dpi=80)


def write(name: str, record: Mapping[str, Any], page: str) -> None:
    """Write a record and its page among the results."""
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(page)
