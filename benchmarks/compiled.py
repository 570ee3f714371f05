"""torch.compile over adapters: graph breaks beside PEFT's, and compiled steps beside PEFT's compiled ones.

The model is a stack of plain blocks, so that everything a compiler sees beside the adapters is the same few operations.
Needs a C++ compiler, which inductor calls.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

from bases import Base
from contenders import METHODS, REGIMES, W16, W32, Case, Contender, ours, pefts, plain
from measuring import by_turns, footer, measured_with, options, quartiles, ratio, table, write

LAYERS, HIDDEN, INNER = 2, 512, 1376


class Block(nn.Module):
    """A gated feed-forward block, Llama's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN)
        self.gate_proj, self.up_proj = (nn.Linear(HIDDEN, INNER, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(inner)) * self.up_proj(inner))  # type: ignore[no-any-return]


BASE = Base(
    lambda: nn.Sequential(*(Block() for _ in range(LAYERS))),
    ("gate_proj", "up_proj", "down_proj"),
    lambda batch, tokens: {"input": torch.randn(batch, tokens, HIDDEN)},
)
TIMED = [Case("blocks", "LoRA", W32), Case("blocks", "LoRA", W16), Case("blocks", "DoRA", W16)]


def builders(case: Case) -> dict[str, Callable[[], nn.Module]]:
    """Return what builds each contender."""
    dtype, _, _ = REGIMES[case.regime]
    return {
        "floor": lambda: plain(BASE, dtype),
        "PEFT": lambda: pefts(BASE, case),
        "ours": lambda: ours(BASE, METHODS[case.method].ours(case.rank, case.dropout), case.regime),
    }


def contender(build: Callable[[], nn.Module], case: Case, backend: str) -> Contender:
    """Return a compiled contender that has run once before, so that what is made at the first call is there."""
    torch.manual_seed(1)
    found = Contender(build(), BASE.draw(case.batch, case.tokens), case.regime)
    found.forward_and_backward()
    found.model = torch.compile(found.model, backend=backend, dynamic=False)  # type: ignore[assignment]
    return found


def breaks(case: Case) -> dict[str, int]:
    """Return the number of graph breaks in a forward of each contender."""
    found = {}
    for who, build in builders(case).items():
        torch._dynamo.reset()
        counters.clear()
        contender(build, case, "eager").forward()
        found[who] = sum(counters["graph_break"].values())
    return found


def times(case: Case, rounds: int) -> dict[str, Any]:
    """Return the times of compiled steps."""
    torch._dynamo.reset()
    compiled = {who: contender(build, case, "inductor") for who, build in builders(case).items()}
    seconds = by_turns({who: one.step for who, one in compiled.items()}, rounds, warmup=3)
    return {**vars(case), "seconds": seconds, "ratios": quartiles(seconds, "PEFT")}


def page(record: dict[str, Any]) -> str:
    """Return the page of what was measured."""
    linears = LAYERS * len(BASE.targets)
    broken = [[name, one["PEFT"], one["ours"]] for name, one in record["breaks"].items()]
    timed = [
        [
            f"{one['method']}, {one['regime']}",
            f"{one['ratios']['floor'][1]:.2f}",
            ratio(one["ratios"]["ours"], best=True),
        ]
        for one in record["timed"]
    ]
    slow = (
        table(["step", "floor's time", "our time"], timed) if timed else "No C++ compiler was there to compile them.\n"
    )
    return f"""# Compiled steps beside PEFT's

{LAYERS} gated feed-forward blocks, hidden size {HIDDEN}, inner size {INNER}, rank 16, adapters on all {linears} linear
layers, under `torch.compile`. `python benchmarks/compiled.py` writes this page.

## Graph breaks in a forward

{table(["method", "PEFT", "ours"], broken)}
## Steps

Compiled by inductor, {TIMED[0].batch} x {TIMED[0].tokens} tokens, AdamW outside of the graph: CPU time on one thread as
a ratio to that of PEFT's compiled step of the same round, the median and the quartiles. The bar is 1.00.

{slow}
{footer(record)}"""


def main() -> None:
    given = options(__doc__, rounds=7)
    logging.getLogger("torch").setLevel(logging.ERROR)
    found = {name: breaks(Case("blocks", name)) for name in METHODS}
    print(found, flush=True)
    timed = []
    for case in TIMED if shutil.which("g++") or shutil.which("clang++") else []:
        timed.append(times(case, given.rounds))
        print(f"{case}: {timed[-1]['ratios']['ours'][1]:.2f} of PEFT's time", flush=True)
    record = {"breaks": found, "timed": timed, **measured_with(given.remark)}
    write("compiled", record, page(record))


if __name__ == "__main__":
    main()
