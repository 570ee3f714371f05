"""VeRA: the loss of LoRA with a tenth of its parameters?"""

from __future__ import annotations

import sys
from typing import Any

from lightning_lora import LoRA, VeRA
from record import Claim, Measured, show
from tiny_lm import SETTING, fine_tune

CLAIM = Claim(
    title="VeRA is as good as LoRA with a fraction of the parameters",
    says="Vectors trained between shared random matrices keep LoRA's quality with ten times fewer parameters or less",
    source="VeRA, arXiv:2310.11454",
    experiment=(
        f"{SETTING} VeRA has rank 256, LoRA ranks 4 and 1 with alpha 2r. VeRA has the better of two learning rates "
        "(its loss still fell from 1e-2 to 3e-2), LoRA those that were better of 3e-3 and 1e-2."
    ),
    criterion="VeRA has at most half of the parameters of LoRA of rank 4 and a loss at most 0.02 nats above its.",
)


def measure() -> dict[str, Any]:
    """Return parameters and the loss at each learning rate."""
    candidates = {
        "LoRA, rank 4": (LoRA(r=4, alpha=8), (3e-3,)),
        "VeRA, rank 256": (VeRA(r=256), (3e-2, 1e-1)),
        "LoRA, rank 1": (LoRA(r=1, alpha=2), (1e-2,)),
    }
    found = {}
    for name, (method, rates) in candidates.items():
        runs = {f"{lr:g}": fine_tune(method, lr=lr) for lr in rates}
        trained = next(run.trained for run in runs.values())
        found[name] = {"trained": trained, "losses": {lr: run.loss for lr, run in runs.items()}}
    return found


def best(found: Measured) -> float:
    """Return the loss at the better learning rate."""
    return min(found["losses"].values())


def reproduced(measured: Measured) -> bool:
    """Compare with rank 4."""
    vera, lora = measured["VeRA, rank 256"], measured["LoRA, rank 4"]
    return 2 * vera["trained"] <= lora["trained"] and best(vera) <= best(lora) + 0.02


def table(measured: Measured) -> str:
    """Return the losses."""
    rows = ""
    for name, found in measured.items():
        losses = "; ".join(f"{loss:.3f} at {lr}" for lr, loss in found["losses"].items())
        rows += f"\n| {name} | {found['trained']:,} | {losses} |"
    return "| method | trained | loss at each learning rate |\n|---|---|---|" + rows


def draw(measured: Measured, axes: Any) -> None:
    """Plot the loss against the number of parameters."""
    for name, found in measured.items():
        axes.plot(found["trained"], best(found), "o", label=name)
    axes.set(xscale="log", xlabel="trained parameters", ylabel="loss, nats")
    axes.legend()


if __name__ == "__main__":
    show(sys.modules[__name__])
