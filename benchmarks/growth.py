"""How a step grows with rank, layers, adapters and sequence length: slopes of what is measured beside what is counted.

Along each axis everything else stays as it is. A slope is that of the straight line with the least squared distance to
the points; what LoRA adds is a model's count less the floor's, and is compared with what its formula says.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bases import Base, llama
from contenders import W32, Case, Contender, ours, pefts, plain
from lightning_lora import LoRA, inject, use
from lightning_lora.plots import empty_figure
from measuring import RESULTS, by_turns, footer, measured_with, options, slope, table, write

HIDDEN, INNER, HEADS = 256, 688, 8
MATRICES = 4 * [(HIDDEN, HIDDEN)] + 2 * [(INNER, HIDDEN)] + [(HIDDEN, INNER)]  # of one layer, (out, in)
LAYERS, RANK, BATCH, TOKENS, BYTES = 2, 16, 2, 256, 4
QUANTITIES = ("operations", "launches", "kept", "traffic")
Models = dict[str, Callable[[], nn.Module]]


@dataclass(frozen=True)
class Point:
    """A step: everything but the one value that an axis varies is the centre's."""

    rank: int = RANK
    layers: int = LAYERS
    tokens: int = TOKENS
    there: int = 1
    active: int = 1

    def base(self) -> Base:
        return llama(self.layers, HIDDEN, INNER, HEADS, key_heads=HEADS)

    def formula(self) -> dict[str, int]:
        """Return what LoRA adds to the floor: fp32, no dropout."""
        n, r = BATCH * self.tokens, self.rank
        matrices, ends = self.layers * len(MATRICES), self.layers * sum(out + wide for out, wide in MATRICES)
        inputs = self.layers * (
            2 * HIDDEN + INNER
        )  # of q, k and v; of gate and up; of down: what attention keeps is there
        found = {
            "operations": 6 * n * r * ends * self.active,  # z; then u, dx, dA, dB
            "kept": BYTES * n * (inputs + r * matrices * self.active),  # x once for all that share it; z
        }
        if self.active > 1:  # the second and further ones are steps of their own around the layer
            return found
        factors = 3 * r * ends  # read forward and backward, their gradients written
        moved = n * (4 * ends + 6 * r * matrices)  # x, y, y, dy, dy, dx, dx, x; z and u
        return {**found, "launches": 6 * matrices, "traffic": BYTES * (moved + factors)}


AXES: dict[str, list[Point]] = {
    "rank": [Point(rank=value) for value in (4, 16, 64, 128, 256)],
    "layers": [Point(layers=value) for value in (1, 2, 4, 8)],
    "tokens": [Point(tokens=value) for value in (64, 128, 256, 512, 1024)],
    "there": [Point(there=value) for value in (1, 2, 4, 8)],
    "active": [Point(there=value, active=value) for value in (1, 2, 4, 8)],
}
SAID = {
    "rank": "the rank",
    "layers": "the number of layers",
    "tokens": f"the tokens of each of {BATCH} sequences",
    "there": "the number of adapters that are there, one of them active",
    "active": "the number of adapters that are active at once",
}


def models(point: Point) -> Models:
    """Return what builds each contender."""
    base, case = point.base(), Case("Llama-like", rank=point.rank)
    names = [f"task{number}" for number in range(1, point.there)]

    def ours_with_all() -> nn.Module:
        model = ours(base, LoRA(r=point.rank), W32)
        for name in names:
            inject(model, LoRA(r=point.rank), base.names(plain(base, torch.float32)), task=name)
        use(model, "default", *names[: point.active - 1])
        return model

    def pefts_with_all() -> nn.Module:
        model: Any = pefts(base, case)
        for name in names:
            model.add_adapter(name, model.peft_config["default"])
        model.base_model.set_adapter(["default", *names[: point.active - 1]])
        return model  # type: ignore[no-any-return]

    return {"floor": lambda: plain(base, torch.float32), "PEFT": pefts_with_all, "ours": ours_with_all}


def measure(point: Point, rounds: int) -> dict[str, Any]:
    """Return seconds and counts of each contender at one point."""
    torch.manual_seed(1)
    batch = point.base().draw(BATCH, point.tokens)
    contenders = {who: Contender(build(), batch, W32) for who, build in models(point).items()}
    seconds = by_turns({who: contender.step for who, contender in contenders.items()}, rounds)
    counted = {who: contender.counts() for who, contender in contenders.items()}
    for one in counted.values():
        one["launches"] = one["forward"] + one["backward"]
    return {**vars(point), "seconds": seconds, "counted": counted}


def seconds_of(found: Mapping[str, Any], who: str) -> float:
    """Return the median."""
    return statistics.median(found["seconds"][who])


def page(record: dict[str, Any]) -> str:
    """Return the page of what was measured."""
    parts = []
    for axis, points in record["axes"].items():
        x = [point[axis] for point in points]

        def slopes(value: Callable[[Any, str], float], x: Sequence[int] = x, points: Any = points) -> list[float]:
            return [slope(x, [value(point, who) for point in points]) for who in ("floor", "PEFT", "ours")]

        def added(what: str, who: str, x: Sequence[int] = x, points: Any = points) -> float:
            return slope(x, [point["counted"][who][what] - point["counted"]["floor"][what] for point in points])

        rows = [["CPU ms", *(f"{1000 * one:.3g}" for one in slopes(seconds_of)), "", "", ""]]
        formulas = [Point(**{name: point[name] for name in vars(Point())}).formula() for point in points]
        for what in (*QUANTITIES, "peak"):
            known = all(what in one for one in formulas)
            by_formula = f"{slope(x, [one[what] for one in formulas]):,.0f}" if known else ""
            counts = [f"{one:,.0f}" for one in slopes(lambda point, who, what=what: point["counted"][who][what])]
            rows.append(
                [UNITS[what], *counts, f"{added(what, 'PEFT'):,.0f}", f"{added(what, 'ours'):,.0f}", by_formula]
            )
        head = ["by one more", "floor", "PEFT", "ours", "PEFT adds", "ours adds", "by formula"]
        parts.append(f"## Against {SAID[axis]}\n\nAt {', '.join(map(str, x))}.\n\n{table(head, rows)}")
    return f"""# How a step grows

LoRA in fp32 on all linear layers of a Llama-like model: {LAYERS} layers, hidden size {HIDDEN}, rank {RANK}, {BATCH} x
{TOKENS} tokens, where an axis does not say otherwise. Numbers are slopes: what one more of the axis costs in a step, by
the line with the least squared distance to the points. "Adds" is the slope of what is beyond the floor, the frozen
model without adapters. By formula, for each (out, in) matrix and n rows, LoRA makes 6 n r (in + out) operations in 6
launches, moves 4 n (in + out) + 6 n r + 3 r (in + out) numbers, and keeps n r, and n in once for all layers that share
their input. Attention makes the floor itself grow with the square of the tokens, so that its slopes hold over their
range only.
`python benchmarks/growth.py` writes this page and the plot.

![CPU time and bytes kept against each axis](growth.png)

{chr(10).join(parts)}
{footer(record)}"""


UNITS = {
    "operations": "operations",
    "launches": "launches",
    "kept": "bytes kept",
    "traffic": "bytes of traffic",
    "peak": "bytes at the peak",
}


def draw(record: dict[str, Any]) -> None:
    """Write the plot: time and bytes kept along each axis."""
    figure = empty_figure("benchmarks/growth.py", 3 * len(AXES), 5)
    panels = figure.subplots(2, len(AXES), squeeze=False)
    for column, (axis, points) in enumerate(record["axes"].items()):
        x = [point[axis] for point in points]
        for who in ("floor", "PEFT", "ours"):
            kept = [point["counted"][who]["kept"] / 2**20 for point in points]
            times = [1000 * seconds_of(point, who) for point in points]
            for panel, y, label in zip(panels[:, column], (times, kept), ("CPU ms", "MiB kept"), strict=True):
                panel.plot(x, y, marker="o", markersize=3, label=who)
                panel.set(xlabel=axis, ylim=(0, None))
                panel.spines[["top", "right"]].set_visible(False)
                if column == 0:
                    panel.set_ylabel(label)
    panels[0, 0].legend(frameon=False)
    figure.savefig(RESULTS / "growth.png", dpi=80)


def main() -> None:
    given = options(__doc__, rounds=5)
    axes: dict[str, list[dict[str, Any]]] = {}
    for axis, points in AXES.items():
        axes[axis] = []
        for point in points:
            axes[axis].append(measure(point, given.rounds))
            mine = seconds_of(axes[axis][-1], "ours") / seconds_of(axes[axis][-1], "PEFT")
            print(f"{axis} {getattr(point, axis)}: {mine:.2f} of PEFT's time", flush=True)
    record = {"axes": axes, **measured_with(given.remark)}
    write("growth", record, page(record))
    draw(record)


if __name__ == "__main__":
    main()
