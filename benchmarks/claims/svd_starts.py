"""PiSSA and OLoRA: factors that start from the weight learn faster at first."""

from __future__ import annotations

import sys
from statistics import mean
from typing import Any

from lightning_lora import LoRA
from record import Claim, Measured, numbers, show
from tiny_lm import SETTING, fine_tune

CLAIM = Claim(
    title="PiSSA and OLoRA start faster",
    says="Factors that start from the weight's principal directions, or from its QR decomposition, converge faster",
    source="PiSSA, arXiv:2404.02948; OLoRA, arXiv:2406.01775",
    experiment=(
        f"{SETTING.replace('250 steps', '50 steps')} Rank 8, alpha 8, learning rate 1e-3 for all; the mean training "
        "loss of steps 25 to 50, with two seeds of data and adapters."
    ),
    criterion="both are below LoRA by more than 0.02 nats at both seeds.",
)
STARTS, SEEDS = {"LoRA": "kaiming", "PiSSA": "pissa", "OLoRA": "olora"}, range(2)


def measure() -> dict[str, Any]:
    """Return the training losses of each start and seed."""
    return {
        name: [fine_tune(LoRA(r=8, alpha=8, init=init), lr=1e-3, steps=50, seed=seed).losses for seed in SEEDS]
        for name, init in STARTS.items()
    }


def early(losses: list[float]) -> float:
    """Return the mean loss of the second half."""
    return mean(losses[25:])


def reproduced(measured: Measured) -> bool:
    """Look at every seed."""
    bounds = [early(losses) - 0.02 for losses in measured["LoRA"]]
    return all(early(measured[name][seed]) < bounds[seed] for name in ("PiSSA", "OLoRA") for seed in SEEDS)


def table(measured: Measured) -> str:
    """Return the early losses."""
    rows = "".join(f"\n| {name} | {numbers(map(early, runs))} |" for name, runs in measured.items())
    return "| start | training loss of steps 25 to 50, two seeds |\n|---|---|" + rows


def draw(measured: Measured, axes: Any) -> None:
    """Plot the losses of the first seed."""
    for name, runs in measured.items():
        axes.plot(runs[0], label=name, linewidth=1)
    axes.set(xlabel="step", ylabel="training loss, nats")
    axes.legend()


if __name__ == "__main__":
    show(sys.modules[__name__])
