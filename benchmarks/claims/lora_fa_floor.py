"""What LoRA-FA cannot represent, and how much of it directions of the inputs win back."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from lightning_lora import LoRA, LoRAFA, Method, inject, merge_
from record import Claim, Measured, numbers, show
from training import fit

CLAIM = Claim(
    title="LoRA-FA has a floor",
    says=(
        "Not the paper's but a consequence of it: with a random frozen A the part of the best change outside of A's "
        "rows is out of reach, sqrt(1 - r / d) of it for a change in all directions"
    ),
    source="on LoRA-FA, arXiv:2308.03303",
    experiment=(
        "One 64 x 64 matrix, fitted to itself plus a change of rank 8, the rank of the adapters; 600 steps of Adam at "
        "1e-2. What is left of the change, relative, with three seeds, and the floor `|D (I - P_A)| / |D|` of each A."
    ),
    criterion=(
        "with LoRA-FA what is left is within 2 % of the floor of its own A and within 5 % of sqrt(1 - 8 / 64) = 0.935, "
        "and with LoRA it is below 0.1, at every seed."
    ),
)
WIDTH, RANK, SEEDS = 64, 8, range(3)


def left(method: Method, seed: int) -> tuple[float, float]:
    """Return what is left of the change, and the floor of the A at the start."""
    generator = torch.Generator().manual_seed(seed)
    start, up, down = (torch.randn(*size, generator=generator) for size in ((64, 64), (64, RANK), (RANK, 64)))
    start, change = start / WIDTH**0.5, up @ down / WIDTH
    layer = nn.Linear(WIDTH, WIDTH, bias=False)
    layer.weight = nn.Parameter(start.clone())
    model, every_input = nn.Sequential(layer), torch.eye(WIDTH)
    (site,) = inject(model, method, ["0"], seed=seed)
    rows = torch.linalg.qr(site.adapter("default").factors()[1].detach().T).Q
    floor = (change - change @ rows @ rows.T).norm() / change.norm()
    fit(model, method, lambda _: (model(every_input) - (start + change).T).square().sum(), steps=600, lr=1e-2)
    merged = merge_(model)[0].weight  # type: ignore[index]
    return ((merged - start - change).norm() / change.norm()).item(), floor.item()


def measure() -> dict[str, Any]:
    """Return what is left and the floors, by seed."""
    fa = [left(LoRAFA(r=RANK, alpha=RANK), seed) for seed in SEEDS]
    lora = [left(LoRA(r=RANK, alpha=RANK), seed)[0] for seed in SEEDS]
    return {"LoRA-FA": [one for one, _ in fa], "floor": [floor for _, floor in fa], "LoRA": lora}


def reproduced(measured: Measured) -> bool:
    """Look at every seed."""
    expected = (1 - RANK / WIDTH) ** 0.5
    near = all(
        abs(found / floor - 1) < 0.02 and abs(found / expected - 1) < 0.05
        for found, floor in zip(measured["LoRA-FA"], measured["floor"], strict=True)
    )
    return near and max(measured["LoRA"]) < 0.1


def table(measured: Measured) -> str:
    """Return what is left."""
    rows = "".join(f"\n| {name} | {numbers(values)} |" for name, values in measured.items())
    return "| | left of the change, three seeds |\n|---|---|" + rows


def draw(measured: Measured, axes: Any) -> None:
    """Plot what is left."""
    for offset, (name, values) in enumerate(measured.items()):
        axes.bar([seed + 0.25 * offset for seed in SEEDS], values, 0.25, label=name)
    axes.axhline((1 - RANK / WIDTH) ** 0.5, color="black", linewidth=0.8, linestyle="--", label="sqrt(1 - r / d)")
    axes.set(xlabel="seed", ylabel="left of the change", xticks=list(SEEDS), ylim=(0, 1.4))
    axes.legend(ncols=2)


if __name__ == "__main__":
    show(sys.modules[__name__])
