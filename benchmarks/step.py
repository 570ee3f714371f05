"""One training step beside PEFT's: two Llama layers with random weights, all contenders by turns in one process.

The floor is the same model without adapters, differentiated with respect to its input: what no adapter can undercut.
"""

from __future__ import annotations

from typing import Any

import torch

from bases import llama
from contenders import ALL16, AMP, METHODS, W16, W32, Case, Contender, compare, ours
from lightning_lora import DeltaLoRA, DoRA, Method, sites
from measuring import by_turns, draw_ratios, footer, measured_with, options, quartiles, ratio, table, write

LAYERS, HIDDEN, INNER = 2, 512, 1376
BASE = llama(LAYERS, HIDDEN, INNER, heads=8, key_heads=8)
VERAS_RANK = 256


def case(method: str, regime: str, rank: int = 16, **sizes: Any) -> Case:
    return Case("Llama-like", method, regime, rank, **sizes)


CASES = [  # with the ratio to PEFT's time that is to be met
    (case("LoRA", W32), 0.92),
    (case("LoRA", W16), 0.75),
    (case("LoRA", AMP), 0.88),
    (case("LoRA", ALL16), 0.92),
    *((case("LoRA", regime, batch=1, tokens=16), 0.95) for regime in (W32, W16, AMP, ALL16)),
    (case("LoRA", W32, dropout=0.1), 1.0),
    (case("LoRA", W16, dropout=0.1), 1.0),
    (case("DoRA", W32), 0.78),
    (case("DoRA", AMP), 0.56),
    (case("DoRA", W16), 0.55),
    (case("DoRA", W16, dropout=0.1), 1.0),
    (case("LoRA-FA", W16), 0.75),
    (case("AdaLoRA", W16), 0.68),
    (case("VeRA", W16, VERAS_RANK), 0.86),
]
PEAKS = {"LoRA": 0.75, "DoRA": 0.50}  # of PEFT's, with a bf16 base
BESIDE_LORA = {"DoRA": 1.10, "Delta-LoRA": 1.02, "LoRA-FA": 1.0}  # of LoRA's time


class WithSchedule(Contender):
    """A method's own work around the optimizer's steps belongs to its step."""

    def __init__(self, method: Method, batch: dict[str, Any], regime: str) -> None:
        model = ours(BASE, method, regime)
        super().__init__(model, batch, regime)
        self.schedules = method.schedules(sites(model), "default", total_steps=10_000)

    def step(self) -> torch.Tensor:
        """Train one step and return its loss."""
        loss = self.forward()
        loss.backward()
        self.batch[self.first].grad = None
        assert self.optimizer is not None
        for schedule in self.schedules:
            schedule.before_step(self.optimizer)
        self.optimizer.step()
        for schedule in self.schedules:
            schedule.after_step(self.optimizer)
        self.optimizer.zero_grad()
        return loss.detach()


def beside_lora(rounds: int) -> dict[str, Any]:
    """Return our methods' times as ratios to our LoRA's, with a bf16 base and all that a step of each does."""
    methods: dict[str, Method] = {name: METHODS[name].ours(16, 0.0) for name in METHODS if name != "VeRA"}
    methods |= {"VeRA": METHODS["VeRA"].ours(VERAS_RANK, 0.0), "Delta-LoRA": DeltaLoRA(r=16, start_step=-1)}
    methods |= {f"{name}, dropout 0.1": METHODS[name].ours(16, 0.1) for name in ("LoRA", "DoRA")}
    methods["DoRA, dropout 0.1 on the branch"] = DoRA(r=16, dropout=0.1, dropout_on="branch")
    torch.manual_seed(1)
    batch = BASE.draw(4, 256)
    contenders = {name: WithSchedule(method, batch, W16) for name, method in methods.items()}
    seconds = by_turns({name: contender.step for name, contender in contenders.items()}, rounds)
    return {"seconds": seconds, "ratios": quartiles(seconds, "LoRA")}


def against(value: float, bar: float) -> str:
    """Return a bar as a cell that says whether it was met."""
    return f"{bar:.2f}" if value <= bar else f"{bar:.2f}, **missed**"


def page(record: dict[str, Any]) -> str:
    """Return the page of what was measured."""
    rows, peaks = [], []
    for (asked, bar), found in zip(CASES, record["cases"], strict=True):
        floor, mine = found["ratios"]["floor"], found["ratios"]["ours"]
        counted = [found["counted"][who] for who in ("floor", "PEFT", "ours")]
        launches = " / ".join(f"{one['forward']}+{one['backward']}" for one in counted)
        amounts = [" / ".join(f"{one[what] / 2**20:.1f}" for one in counted) for what in ("kept", "peak", "traffic")]
        operations = " / ".join(f"{one['operations'] / 1e9:.2f}" for one in counted)
        timed = [f"{floor[1]:.2f}", ratio(mine, best=True), against(mine[1], bar)]
        rows.append([asked, *timed, launches, *amounts, operations])
        plain = not asked.dropout and asked.batch > 1 and asked.regime == W16
        if plain and asked.method in PEAKS:
            share = counted[2]["peak"] / counted[1]["peak"]
            peaks.append(f"{asked.method} {share:.2f} (bar {against(share, PEAKS[asked.method])})")
    others = [
        [name, ratio(found), against(found[1], BESIDE_LORA[name]) if name in BESIDE_LORA else ""]
        for name, found in record["beside LoRA"]["ratios"].items()
    ]
    head = ["step", "floor's time", "our time", "bar", "launches"]
    head += ["MiB kept", "MiB at the peak", "MiB of traffic", "GFLOP"]
    return f"""# One training step beside PEFT's

{LAYERS} Llama layers, hidden size {HIDDEN}, inner size {INNER}, adapters on all seven linear layers of each, AdamW; the
same weights and data for all. `python benchmarks/step.py` writes this page. The floor is the same frozen model without
adapters, differentiated with respect to its input.

Time is CPU time on one thread as a ratio to PEFT's of the same round: the median and the quartiles. The rest is
counted, is the same on every machine, and stands as floor / PEFT / ours: launches (forward + backward, without the
optimizer); MiB kept for the backward pass; MiB that forward and backward allocate at their peak beyond what was there
before; MiB that all launches together read and write, where each reads its inputs and writes its results once; GFLOP of
products and attention.

![Time of a step beside PEFT's](step.png)

{table(head, rows)}
Bytes at the peak, ours to PEFT's, with a bf16 base: {"; ".join(peaks)}.

## Our methods beside our LoRA

With a bf16 base and fp32 adapters, 4 x 256 tokens, and all that a step of the method does around the optimizer.

{table(["method", "time as a ratio to LoRA's", "bar"], others)}
{footer(record)}"""


def main() -> None:
    given = options(__doc__, rounds=7)
    cases = []
    for asked, _ in CASES:
        cases.append(compare(BASE, asked, given.rounds))
        print(f"{asked}: {cases[-1]['ratios']['ours'][1]:.2f} of PEFT's time", flush=True)
    record = {"cases": cases, "beside LoRA": beside_lora(given.rounds), **measured_with(given.remark)}
    write("step", record, page(record))
    draw_ratios("step", {found["case"]: found["ratios"] for found in cases})


if __name__ == "__main__":
    main()
