"""Many adapters on one linear layer beside PEFT's: a batch in which each row has its own, and eight added together.

Times are this process's CPU time on one thread, in milliseconds over the layer without adapters of the same round, as
the median of rounds in which all take turns; launches are counted, not timed, and are the same on every machine.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn

from lightning_lora import LoRA, inject, per_example, sites, use
from measuring import Kernels, by_turns, footer, measured_with, options, write

WIDTH, RANK, ROWS, ACTIVE = 1024, 16, 64, 8
CASES = [(tasks, tokens) for tokens in (1, 32) for tasks in (1, 4, 16, 64)]
BASE, PEFT, OURS, ENTERING = "base", "PEFT", "ours", "ours, entering the block each time"


class Model(nn.Module):
    """One linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y


def contenders(tasks: list[str]) -> tuple[nn.Module, Any, nn.Module]:
    """The bare layer, PEFT's and ours with the same factors."""
    config = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=["linear"], init_lora_weights=False)
    theirs = peft.get_peft_model(Model(), config, adapter_name=tasks[0])
    for task in tasks[1:]:
        theirs.add_adapter(task, config)
    ours = Model()
    for task in tasks:
        (site,) = inject(ours, LoRA(r=RANK, alpha=16), ["linear"], task=task)
        for factor in ("lora_A", "lora_B"):
            getattr(site.adapter(task), factor).data.copy_(getattr(theirs.base_model.model.linear, factor)[task].weight)
    assert len(sites(ours)) == 1
    return Model().eval(), theirs.eval(), ours.eval()


def compared(runs: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, Any]:
    """Seconds and launches of each contender, whose outputs are the same but for the base's."""
    expected = runs[PEFT]()
    for who, run in runs.items():
        if who != BASE:
            torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-3)
    seconds = by_turns(runs, rounds)
    launches = {}
    for who, run in runs.items():
        with Kernels() as counted:
            run()
        launches[who] = counted.launches
    over = {
        who: statistics.median(1e3 * (a - b) for a, b in zip(values, seconds[BASE], strict=True))
        for who, values in seconds.items()
    }
    over[BASE] = 1e3 * statistics.median(seconds[BASE])
    return {"milliseconds over the base": over, "launches": launches, "seconds": seconds}


@torch.no_grad()
def mixed(tasks: int, tokens: int, rounds: int) -> dict[str, Any]:
    """A batch of rows of which each has one of the tasks, in no order."""
    names = [f"task{i}" for i in range(tasks)]
    base, theirs, ours = contenders(names)
    rows = [names[i % tasks] for i in torch.randperm(ROWS, generator=torch.Generator().manual_seed(1)).tolist()]
    x = torch.randn(ROWS, tokens, WIDTH)

    def entering() -> Tensor:
        with per_example(ours, rows):
            return entered()

    def entered() -> Tensor:
        y: Tensor = ours(x)
        return y

    with per_example(ours, rows):
        runs = {BASE: lambda: base(x), PEFT: lambda: theirs(x, adapter_names=rows), OURS: entered}
        found = compared(runs, rounds)
    again = compared({BASE: lambda: base(x), PEFT: runs[PEFT], ENTERING: entering}, rounds)
    for what, value in again.items():
        found[what][ENTERING] = value[ENTERING]
    return {"tasks": tasks, "tokens": tokens, **found}


@torch.no_grad()
def active(tokens: int, rounds: int) -> dict[str, Any]:
    """All tasks added together."""
    names = [f"task{i}" for i in range(ACTIVE)]
    base, theirs, ours = contenders(names)
    theirs.base_model.set_adapter(names)
    use(ours, *names)
    x = torch.randn(ROWS, tokens, WIDTH)
    return {
        "tokens": tokens,
        **compared({BASE: lambda: base(x), PEFT: lambda: theirs(x), OURS: lambda: ours(x)}, rounds),
    }


def page(found: dict[str, Any]) -> str:
    def cells(case: dict[str, Any], *who: str) -> str:
        over, launches = case["milliseconds over the base"], case["launches"]
        times = " | ".join(f"{over[one]:.2f}" for one in who)
        return f"{times} | {' | '.join(str(launches[one]) for one in who if one != ENTERING)} |"

    mixes = [f"| {c['tasks']} | {c['tokens']} | {cells(c, BASE, PEFT, OURS, ENTERING)}" for c in found["mixed"]]
    actives = [f"| {ROWS} x {c['tokens']} | {cells(c, BASE, PEFT, OURS)}" for c in found["active"]]
    return f"""# Many adapters beside PEFT's

One linear layer of {WIDTH} x {WIDTH} in fp32, LoRA of rank {RANK}, no gradients. `python benchmarks/many_adapters.py`
writes this page. Time is CPU time on one thread in milliseconds: that of the bare layer, and what adapters add to it,
as the median of rounds in which all take turns. Launches include the layer's own one; they are counted and exact.

## A task for each of {ROWS} rows

PEFT's `adapter_names=` and `with per_example(model, tasks)`. Rows of a task lie scattered in the batch. Inside the
block the stacked factors are kept; the last time is that of a block for every forward, in which they are stacked anew.

| tasks | tokens per row | base, ms | PEFT adds | we add | we add with entering | launches: base | PEFT | ours |
|---|---|---|---|---|---|---|---|---|
{chr(10).join(mixes)}

## {ACTIVE} tasks added together

PEFT's `set_adapter` with a list and `use(model, *tasks)`.

| rows x tokens | base, ms | PEFT adds | we add | launches: base | PEFT | ours |
|---|---|---|---|---|---|---|
{chr(10).join(actives)}

{footer(found)}"""


def main() -> None:
    given = options(__doc__, rounds=15)
    found: dict[str, Any] = {"mixed": [], "active": []}
    for tasks, tokens in CASES:
        found["mixed"].append(mixed(tasks, tokens, given.rounds))
        print(tasks, "tasks,", tokens, "tokens:", found["mixed"][-1]["milliseconds over the base"], flush=True)
    for tokens in (1, 4, 32):
        found["active"].append(active(tokens, given.rounds))
        print(ACTIVE, "together,", tokens, "tokens:", found["active"][-1]["milliseconds over the base"], flush=True)
    found |= measured_with(given.remark)
    write("many_adapters", found, page(found))


if __name__ == "__main__":
    main()
