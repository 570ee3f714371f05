"""LoRA+: fewer steps to a target than with one learning rate for both factors."""

from __future__ import annotations

import copy
import sys
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora import LoRA, inject
from record import Claim, Measured, show
from training import fit

CLAIM = Claim(
    title="LoRA+ needs fewer steps",
    says="A larger learning rate for B than for A reaches the same loss in up to half the steps",
    source="LoRA+, arXiv:2402.12354",
    experiment=(
        "After the paper's toy: a network of width 256 whose middle layer lacks a change of rank 4, fitted with Adam "
        "to the network that has it. Steps until the loss is 2 % of the first, at most 500. LoRA+ has ratio 16."
    ),
    criterion="at learning rate 1e-3 the median of five seeds with ratio 16 is below 0.6 of that with ratio 1.",
)
RATES, RATIOS, SEEDS, CAP = (3e-4, 1e-3, 3e-3, 1e-2), (1, 16), range(5), 500


class Toy(nn.Module):
    """``out(relu(middle(relu(into(x)))))``, of which the middle is adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.middle, self.out = (
            nn.Linear(*shape, bias=False) for shape in ((64, 256), (256, 256), (256, 1))
        )
        for layer in (self.into, self.middle, self.out):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(torch.relu(self.middle(torch.relu(self.into(x)))))
        return y


def steps_to_target(lr: float, ratio: float, seed: int) -> int:
    """Return the number of steps until the loss is 2 % of its first value, or CAP."""
    torch.manual_seed(seed)
    x, model = torch.randn(512, 64), Toy()
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        teacher.middle.weight += torch.randn(256, 4) @ torch.randn(4, 256) / 4 / 256**0.5
        y = teacher(x)
    method = LoRA(r=4, alpha=4)
    inject(model, method, ["middle"], seed=seed)
    losses = fit(model, method, lambda _: (model(x) - y).square().mean(), steps=CAP, lr=lr, lr_ratio=ratio)
    return next((step for step, loss in enumerate(losses) if loss < 0.02 * losses[0]), CAP)


def measure() -> dict[str, Any]:
    """Return the steps of every seed, by learning rate and ratio."""
    return {
        f"{lr:g}": {str(ratio): [steps_to_target(lr, ratio, seed) for seed in SEEDS] for ratio in RATIOS}
        for lr in RATES
    }


def reproduced(measured: Measured) -> bool:
    """Compare the medians at 1e-3."""
    steps = measured["0.001"]
    return median(steps["16"]) < 0.6 * median(steps["1"])


def table(measured: Measured) -> str:
    """Return medians and ranges."""

    def shown(steps: list[int]) -> str:
        return f"{median(steps):g} ({min(steps)} to {max(steps)})"

    rows = "".join(f"\n| {lr} | {shown(steps['1'])} | {shown(steps['16'])} |" for lr, steps in measured.items())
    lora, plus = (min(median(steps[ratio]) for steps in measured.values()) for ratio in ("1", "16"))
    return (
        "| learning rate of A | LoRA: median (range) of 5 | LoRA+ |\n|---|---|---|"
        + rows
        + f"\n\nWith the best of these rates for each, LoRA needs {lora:g} steps and LoRA+ {plus:g}."
    )


def draw(measured: Measured, axes: Any) -> None:
    """Plot the medians against the learning rate."""
    for ratio, name in (("1", "LoRA"), ("16", "LoRA+, ratio 16")):
        axes.plot(
            [float(lr) for lr in measured], [median(steps[ratio]) for steps in measured.values()], "o-", label=name
        )
    axes.set(xscale="log", xlabel="learning rate of A", ylabel="steps to 2 % of the loss", ylim=0)
    axes.legend()


if __name__ == "__main__":
    show(sys.modules[__name__])
