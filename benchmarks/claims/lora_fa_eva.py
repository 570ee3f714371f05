"""LoRA-FA with an A along the directions of the layer's inputs."""

from __future__ import annotations

import sys
from typing import Any

from lightning_lora import LoRA, LoRAFA
from record import Claim, Measured, show
from tiny_lm import SETTING, fine_tune

CLAIM = Claim(
    title="EVA gives a frozen A the right directions",
    says="Starting A along the principal directions of the layer's inputs helps, and most where A stays as it starts",
    source="EVA, arXiv:2410.07170, with LoRA-FA, arXiv:2308.03303",
    experiment=f"{SETTING} Rank 8, alpha 16, learning rate 3e-3; eight batches for EVA, ranks not moved.",
    criterion="LoRA-FA with EVA is below LoRA-FA by more than 0.02 nats.",
)


def measure() -> dict[str, Any]:
    """Return parameters and losses."""
    runs = {
        "LoRA-FA": fine_tune(LoRAFA(r=8, alpha=16), lr=3e-3),
        "LoRA-FA, EVA": fine_tune(LoRAFA(r=8, alpha=16, init="eva"), lr=3e-3, from_data=True),
        "LoRA": fine_tune(LoRA(r=8, alpha=16), lr=3e-3),
    }
    return {name: {"trained": run.trained, "loss": run.loss} for name, run in runs.items()}


def reproduced(measured: Measured) -> bool:
    """Compare the two starts."""
    return measured["LoRA-FA, EVA"]["loss"] < measured["LoRA-FA"]["loss"] - 0.02


def table(measured: Measured) -> str:
    """Return the losses."""
    rows = "".join(f"\n| {name} | {run['trained']:,} | {run['loss']:.3f} |" for name, run in measured.items())
    return "| method | trained | loss |\n|---|---|---|" + rows


def draw(measured: Measured, axes: Any) -> None:
    """Plot the losses."""
    axes.bar_label(axes.barh(list(measured), [run["loss"] for run in measured.values()]), fmt="%.3f", padding=2)
    axes.invert_yaxis()
    axes.set(xlabel="loss, nats")


if __name__ == "__main__":
    show(sys.modules[__name__])
