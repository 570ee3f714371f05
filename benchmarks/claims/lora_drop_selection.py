"""LoRA-drop keeps the adapters of the blocks that need them."""

from __future__ import annotations

import sys
from typing import Any

import torch

from lightning_lora import LoRA, LoRADrop, inject
from lightning_lora.importance import alike, importances, select
from lightning_lora.sharing import share
from record import Claim, Measured, numbers, show
from six_blocks import CHANGED, WIDTH, SixBlocks, held_out, student_and_loss
from training import fit

CLAIM = Claim(
    title="LoRA-drop keeps the adapters that matter",
    says="Sharing one adapter among the layers whose adapters change least halves the parameters and costs no quality",
    source="LoRA-drop, arXiv:2402.07721",
    experiment=(
        "Six residual blocks of width 64, fitted to six that differ in blocks 2 and 4, counted from 0. Rank 8; 150 "
        "steps of sample, importances on 16 batches, threshold 0.9; then 1,000 steps anew with what was selected, with "
        "two other blocks instead (0 and 5), and with all. Learning rate 5e-3; two seeds."
    ),
    criterion=(
        "at every seed exactly blocks 2 and 4 are kept, the parameters are half of all, and the loss is at most twice "
        "that of all adapters and at most a tenth of that with the other two blocks."
    ),
)
SEEDS, SAMPLE, STEPS, LR = range(2), 150, 1000, 5e-3
METHOD = LoRADrop(r=8, alpha=8, sample_steps=SAMPLE)


def measured_importances(seed: int) -> list[float]:
    """Return the importance of each block after the sample."""
    model, loss_of = student_and_loss(seed)
    inject(model, METHOD, "all-linear", seed=seed)
    fit(model, LoRA(), loss_of, steps=SAMPLE, lr=LR)
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(128, WIDTH, generator=generator) for _ in range(16)]
    return [found for _, found in sorted(importances(model, batches, model).items())]


def kept_of(found: list[float]) -> list[int]:
    """Return the numbers of the blocks that the threshold keeps."""
    model = adapted(0)[0]
    names = sorted(name for group in alike(model) for name in group)
    kept = select(dict(zip(names, found, strict=True)), alike(model), threshold=METHOD.threshold)
    return sorted(names.index(name) for name in kept)


def adapted(seed: int) -> tuple[SixBlocks, Any]:
    """Return blocks with an adapter each, and their loss."""
    model, loss_of = student_and_loss(seed)
    inject(model, METHOD, "all-linear", seed=seed)
    return model, loss_of


def loss_with(kept: list[int], seed: int) -> tuple[int, float]:
    """Return the number of trained parameters, and the loss after training with what is kept and a shared adapter."""
    model, loss_of = adapted(seed)
    share(model, [f"blocks.{block}.weight" for block in kept])
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    fit(model, LoRA(), loss_of, steps=STEPS, lr=LR)
    return trained, held_out(loss_of)


def measure() -> dict[str, Any]:
    """Return importances, selections, and parameters and losses of the three choices, by seed."""
    found = [measured_importances(seed) for seed in SEEDS]
    kept = [kept_of(one) for one in found]
    choices = {"selected": lambda seed: kept[seed], "0 and 5": lambda _: [0, 5], "all": lambda _: list(range(6))}
    runs = {name: [loss_with(choice(seed), seed) for seed in SEEDS] for name, choice in choices.items()}
    return {
        "importances": found,
        "kept": kept,
        "trained": {name: of_seeds[0][0] for name, of_seeds in runs.items()},
        "losses": {name: [loss for _, loss in of_seeds] for name, of_seeds in runs.items()},
    }


def reproduced(measured: Measured) -> bool:
    """Look at every seed."""
    losses, trained = measured["losses"], measured["trained"]
    good = all(
        selected <= 2 * whole and selected <= 0.1 * other
        for selected, whole, other in zip(losses["selected"], losses["all"], losses["0 and 5"], strict=True)
    )
    return (
        good and 2 * trained["selected"] == trained["all"] and all(kept == list(CHANGED) for kept in measured["kept"])
    )


def table(measured: Measured) -> str:
    """Return importances and losses."""
    bars = "".join(
        f"\n| {seed} | {numbers(found, '.2f')} | {numbers(kept, 'd')} |"
        for seed, (found, kept) in enumerate(zip(measured["importances"], measured["kept"], strict=True))
    )
    rows = "".join(
        f"\n| {name} | {measured['trained'][name]:,} | {numbers(losses, '.1e')} |"
        for name, losses in measured["losses"].items()
    )
    return (
        f"| seed | importances of blocks 0 to 5 | kept |\n|---|---|---|{bars}\n\n"
        f"| blocks with adapters of their own | trained | loss, two seeds |\n|---|---|---|{rows}"
    )


def draw(measured: Measured, axes: Any) -> None:
    """Draw the importances as bars."""
    for seed, found in enumerate(measured["importances"]):
        axes.bar([block + 0.4 * seed - 0.2 for block in range(6)], found, 0.4, label=f"seed {seed}")
    axes.set(xlabel="block (2 and 4 differ)", ylabel="importance", ylim=(0, 1))
    axes.legend()


if __name__ == "__main__":
    show(sys.modules[__name__])
