"""AdaLoRA gives its ranks to the blocks that need them."""

from __future__ import annotations

import sys
from typing import Any

from lightning_lora import AdaLoRA, LoRA, Method, inject, sites
from record import Claim, Measured, numbers, show
from six_blocks import CHANGED, held_out, student_and_loss
from training import fit

CLAIM = Claim(
    title="AdaLoRA finds the blocks that need rank",
    says="Ranks moved to the matrices where they matter beat the same number of ranks spread evenly",
    source="AdaLoRA, arXiv:2303.10512",
    experiment=(
        "Six residual blocks of width 64, fitted to six that differ in block 2 (by rank 8) and in block 4 (by rank 3), "
        "counted from 0. AdaLoRA starts with rank 8 everywhere and ends with 12 ranks of 48 in 1,500 steps; LoRA has "
        "rank 2 everywhere, 12 as well. Learning rate 1e-2 for both; three seeds. In a first version the blocks' own "
        "weights were half as large, so that blocks could stand in for each other: AdaLoRA left 1, 1, 3, 3, 3, 1, and "
        "its loss was 0.8 of LoRA's."
    ),
    criterion=(
        "at every seed exactly 12 ranks are left, at least 8 of them in blocks 2 and 4, and the loss is below 0.6 of "
        "LoRA's."
    ),
)
SEEDS, STEPS = range(3), 1500


def run(method: Method, seed: int) -> tuple[float, list[int]]:
    """Return the loss on held-out inputs, and how many directions of each block are not masked."""
    model, loss_of = student_and_loss(seed)
    inject(model, method, "all-linear", seed=seed)
    fit(model, method, loss_of, steps=STEPS, lr=1e-2)
    cores = [site.adapter("default")._parameters.get("lora_E") for site in sites(model)]
    return held_out(loss_of), [0 if core is None else int(core.count_nonzero()) for core in cores]


def measure() -> dict[str, Any]:
    """Return ranks and losses of each seed."""
    adalora = AdaLoRA(r=8, target_r=2, alpha=8, initial_steps=150, final_steps=500)
    adaptive = [run(adalora, seed) for seed in SEEDS]
    even = [run(LoRA(r=2, alpha=2), seed) for seed in SEEDS]
    return {
        "ranks": [ranks for _, ranks in adaptive],
        "AdaLoRA": [loss for loss, _ in adaptive],
        "LoRA": [loss for loss, _ in even],
    }


def reproduced(measured: Measured) -> bool:
    """Look at every seed."""
    found = all(sum(ranks) == 12 and sum(ranks[block] for block in CHANGED) >= 8 for ranks in measured["ranks"])
    better = all(ours < 0.6 * even for ours, even in zip(measured["AdaLoRA"], measured["LoRA"], strict=True))
    return found and better


def table(measured: Measured) -> str:
    """Return ranks and losses."""
    rows = "".join(
        f"\n| {seed} | {numbers(ranks, 'd')} | {ours:.2g} | {even:.2g} |"
        for seed, ranks, ours, even in zip(SEEDS, measured["ranks"], measured["AdaLoRA"], measured["LoRA"], strict=True)
    )
    return "| seed | AdaLoRA's ranks of blocks 0 to 5 | AdaLoRA's loss | LoRA's loss |\n|---|---|---|---|" + rows


def draw(measured: Measured, axes: Any) -> None:
    """Draw the map of ranks, one row for each seed."""
    axes.imshow(measured["ranks"], cmap="Blues", vmin=0, vmax=8)
    for seed, ranks in enumerate(measured["ranks"]):
        for block, rank in enumerate(ranks):
            axes.text(block, seed, rank, ha="center", va="center", color="white" if rank > 4 else "black")
    axes.set(xlabel="block (2 and 4 need rank 8 and 3)", ylabel="seed", yticks=list(SEEDS))


if __name__ == "__main__":
    show(sys.modules[__name__])
