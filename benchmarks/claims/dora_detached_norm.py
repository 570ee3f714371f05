"""DoRA with the norm taken for a constant in the backward pass, against the exact gradient and against LoRA."""

from __future__ import annotations

import sys
from typing import Any

from lightning_lora import DoRA, LoRA
from record import Claim, Measured, show
from tiny_lm import SETTING, fine_tune

CLAIM = Claim(
    title="DoRA needs no gradient through the norm",
    says="Taking the norm for a constant in the backward pass saves memory and hardly changes the accuracy",
    source="DoRA, arXiv:2402.09353",
    experiment=f"{SETTING} Rank 4, alpha 8, learning rate 3e-3; LoRA for comparison.",
    criterion="the loss on the new chain is at most 0.01 nats above that with the exact gradient.",
)


def measure() -> dict[str, Any]:
    """Return parameters and loss of each form."""
    methods = {
        "DoRA, norm detached": DoRA(r=4, alpha=8),
        "DoRA, exact gradient": DoRA(r=4, alpha=8, detach_norm=False),
        "LoRA": LoRA(r=4, alpha=8),
    }
    runs = {name: fine_tune(method, lr=3e-3) for name, method in methods.items()}
    return {name: {"trained": run.trained, "loss": run.loss} for name, run in runs.items()}


def reproduced(measured: Measured) -> bool:
    """Compare the two forms, after a check that there is something to compare: they must not be the same run."""
    detached, exact = measured["DoRA, norm detached"]["loss"], measured["DoRA, exact gradient"]["loss"]
    return detached != exact and detached - exact <= 0.01


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
