"""Delta-LoRA is LoRA with a larger alpha: the changes that it adds to the base telescope."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora import DeltaLoRA, LoRA, Method, inject, merge_, param_groups, sites
from record import Claim, Measured, show

CLAIM = Claim(
    title="Delta-LoRA is LoRA with a larger alpha",
    says=(
        "Not the paper's but this project's claim: what Delta-LoRA adds to W telescopes, so that under Adam, from the "
        "first step on, it is LoRA with alpha (1 + lambda), and the whole change of a late start has rank 2r at most"
    ),
    source="on Delta-LoRA, arXiv:2309.02411",
    experiment=(
        "Two layers of width 16, rank 2, lambda 2, 60 steps of Adam (eps 1e-30) in float64. Compared are this "
        "library's Delta-LoRA, the paper's loop written out (it changes W after each step), and LoRA with three "
        "times the alpha."
    ),
    criterion=(
        "with a start at the first step all three give the same weights to 1e-10, with a start after 20 steps the "
        "first two do and LoRA does not, and the changes have rank 2 and 4."
    ),
)
STEPS, RANK, ALPHA, RATIO = 60, 2, 4.0, 2.0


def network() -> nn.Sequential:
    """Return the same two layers at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)).double()


def losses(model: nn.Module) -> Tensor:
    """Return the loss on data that is the same at every call."""
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(64, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    return (model(x) - y).square().mean()


def trained(method: Method) -> nn.Module:
    """Return the network trained with a method of the library, merged."""
    model = network()
    inject(model, method, "all-linear", seed=0)
    optimizer = torch.optim.Adam(param_groups(model, 1e-2), eps=1e-30)
    schedules = method.schedules(sites(model), "default", STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses(model).backward()
        for schedule in schedules:
            schedule.before_step(optimizer)
        optimizer.step()
        for schedule in schedules:
            schedule.after_step(optimizer)
    return merge_(model)


def written_out(start_step: int) -> nn.Module:
    """Return the network trained with the paper's loop: ``W <- W + lambda * s * (B' A' - B A)`` in steps t > K."""
    model = network()
    inject(model, LoRA(r=RANK, alpha=ALPHA), "all-linear", seed=0)
    optimizer = torch.optim.Adam(param_groups(model, 1e-2), eps=1e-30)
    for step in range(STEPS):
        optimizer.zero_grad()
        losses(model).backward()
        before = [site.adapter("default").delta().detach() for site in sites(model)]
        optimizer.step()
        if step > start_step:
            for site, delta in zip(sites(model), before, strict=True):
                weight = site.weight
                assert weight is not None
                with torch.no_grad():
                    weight += RATIO * (site.adapter("default").delta() - delta)
    return merge_(model)


def distance(one: nn.Module, other: nn.Module) -> float:
    """Return the largest difference between two networks' weights."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def rank(model: nn.Module) -> int:
    """Return the numerical rank of the first layer's change."""
    change = model[0].weight - network()[0].weight  # type: ignore[index]
    return int(torch.linalg.matrix_rank(change.detach(), rtol=1e-9))


def measure() -> dict[str, Any]:
    """Return distances and ranks, by the step after which W follows."""
    larger = trained(LoRA(r=RANK, alpha=ALPHA * (1 + RATIO)))
    found = {}
    for start_step in (-1, 20):
        ours = trained(DeltaLoRA(r=RANK, alpha=ALPHA, update_ratio=RATIO, start_step=start_step))
        found[str(start_step)] = {
            "loop": distance(ours, written_out(start_step)),
            "lora": distance(ours, larger),
            "rank": rank(copy.deepcopy(ours)),
            "moved": distance(ours, network()),
        }
    return found


def reproduced(measured: Measured) -> bool:
    """Look at both starts."""
    first, late = measured["-1"], measured["20"]
    same = max(first["loop"], first["lora"], late["loop"]) < 1e-10 < min(late["lora"], first["moved"])
    return same and first["rank"] == RANK and late["rank"] == 2 * RANK


def table(measured: Measured) -> str:
    """Return distances and ranks."""
    names = {"-1": "at the first step", "20": "after 20 steps and one"}
    rows = "".join(
        f"\n| {names[start]} | {run['loop']:.0e} | {run['lora']:.0e} | {run['moved']:.2f} | {run['rank']} |"
        for start, run in measured.items()
    )
    return "| W follows | from the loop | from LoRA, 3 alpha | from the start | rank |\n|---|---|---|---|---|" + rows


def draw(measured: Measured, axes: Any) -> None:
    """Plot the distances."""
    for offset, (key, name) in enumerate({"loop": "from the paper's loop", "lora": "from LoRA with 3 alpha"}.items()):
        heights = [max(measured[start][key], 1e-18) for start in ("-1", "20")]
        axes.bar([0.4 * offset, 1 + 0.4 * offset], heights, 0.35, label=name)
    axes.set(
        yscale="log",
        xticks=[0.2, 1.2],
        xticklabels=["from the first step", "after 20 steps"],
        ylabel="largest difference",
    )
    axes.legend()


if __name__ == "__main__":
    show(sys.modules[__name__])
