"""rsLoRA: with alpha over the root of the rank, a higher rank learns more at the same learning rate."""

from __future__ import annotations

import sys
from typing import Any

from lightning_lora import LoRA
from record import Claim, Measured, show
from tiny_lm import SETTING, fine_tune

CLAIM = Claim(
    title="rsLoRA lets the rank matter",
    says="With alpha / r a higher rank learns hardly more, with alpha / sqrt(r) it does, at one learning rate",
    source="rsLoRA, arXiv:2312.03732",
    experiment=f"{SETTING} Learning rate 3e-4, alpha 16; the loss on the new chain by rank.",
    criterion=(
        "from rank 1 to 64 the loss falls at least twice as far as with alpha / r, and at rank 64 it is lower by 0.05."
    ),
)
RANKS = (1, 8, 64)


def measure() -> dict[str, Any]:
    """Return the loss by scaling and rank; at rank 1 the two scalings are the same."""
    losses = {"linear": {"1": fine_tune(LoRA(r=1, alpha=16), lr=3e-4).loss}}
    losses["rsqrt"] = dict(losses["linear"])
    for r in RANKS[1:]:
        losses["linear"][str(r)] = fine_tune(LoRA(r=r, alpha=16), lr=3e-4).loss
        losses["rsqrt"][str(r)] = fine_tune(LoRA(r=r, alpha=16, scaling="rsqrt"), lr=3e-4).loss
    return losses


def reproduced(measured: Measured) -> bool:
    """Compare the gains and the ends."""
    linear, rsqrt = measured["linear"], measured["rsqrt"]
    gains = rsqrt["1"] - rsqrt["64"] >= 2 * (linear["1"] - linear["64"])
    return gains and linear["64"] - rsqrt["64"] > 0.05


def table(measured: Measured) -> str:
    """Return the losses."""
    rows = "".join(f"\n| {r} | {measured['linear'][str(r)]:.3f} | {measured['rsqrt'][str(r)]:.3f} |" for r in RANKS)
    return "| rank | LoRA, alpha / r | rsLoRA, alpha / sqrt(r) |\n|---|---|---|" + rows


def draw(measured: Measured, axes: Any) -> None:
    """Plot the loss against the rank."""
    for scaling, name in (("linear", "LoRA, alpha / r"), ("rsqrt", "rsLoRA, alpha / sqrt(r)")):
        axes.plot(RANKS, [measured[scaling][str(r)] for r in RANKS], "o-", label=name)
    axes.set(xscale="log", xlabel="rank", ylabel="loss, nats", xticks=RANKS, xticklabels=RANKS)
    axes.legend()


if __name__ == "__main__":
    show(sys.modules[__name__])
