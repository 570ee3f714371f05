"""Gradients of A and B changed before the step: what a step moves the weight by, and how many steps it takes."""

from __future__ import annotations

import sys
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora import LoRA, LoRAFA, Method, inject, param_groups, sites
from record import Claim, Measured, numbers, show

CLAIM = Claim(
    title="Preconditioned gradients move the weight as full fine-tuning would",
    says=(
        "Gradients of A and B can be changed so that a step moves W as nearly by the full gradient as low-rank factors "
        "can, which needs fewer steps"
    ),
    source="LoRA-Pro, arXiv:2407.18242; Riemannian, arXiv:2402.02347; second version of LoRA-FA, arXiv:2308.03303",
    experiment=(
        "One 32 x 32 matrix in float64, W plus a change of rank 4 whose singular values are 8, 4, 2 and 1, fitted by "
        "gradient descent to a squared error (full gradient G). First the step of SGD, 1e-8 long, after 50 steps of "
        "plain LoRA, against each paper's formula: `P_B G + (I - P_B) G P_A` (LoRA-Pro); `s^2 (P_B G + G P_A)` with "
        "the damping of 0.01 in it (Riemannian); `G P_A` (LoRA-FA). After 5 steps, as it was at first, B is so small "
        "that the 1e-8 which LoRA-Pro adds to `B^T B` shows: 1e-5. Then the steps to 1 % of the error, at most 2,000, "
        "each with the best of eleven learning rates that are factors of 2 apart; three seeds."
    ),
    criterion=(
        "each step is its formula within 1e-6 of the gradient's norm, and LoRA-Pro and the Riemannian form need at "
        "most half of plain LoRA's steps, as a median."
    ),
)
WIDTH, RANK, SEEDS, CAP = 32, 4, range(3), 2000
METHODS: dict[str, Method] = {
    "plain": LoRA(r=RANK, alpha=2 * RANK),
    "riemannian": LoRA(r=RANK, alpha=2 * RANK, gradient="riemannian"),
    "lora_pro": LoRA(r=RANK, alpha=2 * RANK, gradient="lora_pro"),
}
FA = LoRAFA(r=RANK, alpha=2 * RANK, gradient="fa")


class Problem:
    """A matrix to change, with its loss ``|W' - target|^2 / 2``, whose gradient by W' is their difference."""

    def __init__(self, method: Method, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        start, up, down = (
            torch.randn(*size, generator=generator, dtype=torch.float64)
            for size in ((WIDTH, WIDTH), (WIDTH, RANK), (WIDTH, RANK))
        )
        values = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
        self.target = start + torch.linalg.qr(up).Q * values @ torch.linalg.qr(down).Q.T
        layer = nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.float64)
        layer.weight = nn.Parameter(start)
        self.model, self.method = nn.Sequential(layer), method
        (site,) = inject(self.model, method, ["0"], seed=seed)
        self.adapter = site.adapter("default")
        self.every_input = torch.eye(WIDTH, dtype=torch.float64)

    def weight(self) -> Tensor:
        """Return the adapted weight."""
        weight: Tensor = self.model(self.every_input).T
        return weight

    def descend(self, lr: float, steps: int, enough: float = 0.0) -> int:
        """Train with SGD until the loss is a share of what it was, and return the number of steps, or CAP."""
        optimizer = torch.optim.SGD(param_groups(self.model, lr))
        schedules = self.method.schedules(sites(self.model), "default", steps)
        first = None
        for step in range(steps):
            optimizer.zero_grad()
            loss = (self.weight() - self.target).square().sum() / 2
            first = first or loss.item()
            if loss.item() <= enough * first:
                return step
            if not loss.item() < 100 * first:
                return CAP
            loss.backward()
            for schedule in schedules:
                schedule.before_step(optimizer)
            optimizer.step()
            for schedule in schedules:
                schedule.after_step(optimizer)
        return CAP


def projector(columns: Tensor) -> Tensor:
    """Return the projector on the span of the columns."""
    q = torch.linalg.qr(columns).Q
    return q @ q.T


def formula(name: str, problem: Problem) -> Tensor:
    """Return what a step of length 1 must move the weight by, from the papers' formulas."""
    up, down = (factor.detach() for factor in problem.adapter.factors())
    gradient, s = (problem.weight() - problem.target).detach(), problem.adapter.scaling
    onto_up, onto_down = projector(up), projector(down.T)
    eye = torch.eye(RANK, dtype=torch.float64)
    damped_up = up @ torch.linalg.inv(up.T @ up + 0.01 * eye) @ up.T
    damped_down = down.T @ torch.linalg.inv(down @ down.T + 0.01 * eye) @ down
    return -{
        "lora_pro": onto_up @ gradient + (gradient - onto_up @ gradient) @ onto_down,
        "riemannian": s**2 * (damped_up @ gradient + gradient @ damped_down),
        "fa": gradient @ onto_down,
    }[name]


def error(name: str, method: Method) -> float:
    """Return how far a short step is from its formula, relative to the gradient."""
    trained = Problem(METHODS["plain"], seed=0)
    trained.descend(1e-2, 50)
    problem = Problem(method, seed=0)
    problem.adapter.load_state_dict(trained.adapter.state_dict())
    expected, before, lr = formula(name, problem), problem.weight().detach(), 1e-8
    gradient = (before - problem.target).norm()
    problem.descend(lr, 1)
    return (((problem.weight() - before) / lr - expected).norm() / gradient).item()


def fewest_steps(method: Method, seed: int) -> tuple[int, float]:
    """Return the fewest steps over the learning rates, and the rate."""
    return min((Problem(method, seed).descend(2.0**power, CAP, enough=0.01), 2.0**power) for power in range(-10, 1))


def measure() -> dict[str, Any]:
    """Return the errors of the steps, and the numbers of steps by seed."""
    return {
        "errors": {name: error(name, method) for name, method in (METHODS | {"fa": FA}).items() if name != "plain"},
        "steps": {name: [fewest_steps(method, seed)[0] for seed in SEEDS] for name, method in METHODS.items()},
    }


def reproduced(measured: Measured) -> bool:
    """Look at errors and medians."""
    steps = {name: median(of_seeds) for name, of_seeds in measured["steps"].items()}
    faster = all(steps[name] <= 0.5 * steps["plain"] for name in ("lora_pro", "riemannian"))
    return max(measured["errors"].values()) < 1e-6 and faster


def table(measured: Measured) -> str:
    """Return errors and steps."""
    rows = ""
    for name in ("plain", "riemannian", "lora_pro", "fa"):
        error = f"{measured['errors'][name]:.0e}" if name in measured["errors"] else ""
        steps = numbers(measured["steps"][name], "d") if name in measured["steps"] else ""
        rows += f"\n| {name} | {error} | {steps} |"
    return "| gradient | step's distance from its formula | steps to 1 %, three seeds |\n|---|---|---|" + rows


def draw(measured: Measured, axes: Any) -> None:
    """Plot the medians."""
    medians = [median(of_seeds) for of_seeds in measured["steps"].values()]
    axes.bar_label(axes.bar(list(measured["steps"]), medians))
    axes.set(ylabel="steps to 1 % of the error")


if __name__ == "__main__":
    show(sys.modules[__name__])
