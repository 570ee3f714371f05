"""Six residual blocks, of which two were changed: one by a matrix of rank 8, one by one of rank 3."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

WIDTH, CHANGED = 64, {2: 8, 4: 3}


class SixBlocks(nn.Module):
    """``x + layer(tanh(x))``, six times; the same at every seed but for the given one."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(6))
        for layer in self.blocks:
            nn.init.normal_(layer.weight, std=WIDTH**-0.5, generator=self.generator)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.blocks:
            x = x + layer(torch.tanh(x))
        return x


def student_and_loss(seed: int) -> tuple[SixBlocks, Callable[[int], Tensor]]:
    """Return the blocks before the change, and their squared error to those after it, on fresh inputs at each step."""
    student, teacher = SixBlocks(seed), SixBlocks(seed)
    with torch.no_grad():
        for block, rank in CHANGED.items():
            up, down = (torch.randn(WIDTH, rank, generator=teacher.generator) for _ in range(2))
            teacher.blocks[block].weight += up @ down.T / WIDTH

    def loss_of(step: int) -> Tensor:
        x = torch.randn(128, WIDTH, generator=torch.Generator().manual_seed(1_000_000 * (seed + 1) + step))
        with torch.no_grad():
            y = teacher(x)
        return (student(x) - y).square().mean()

    return student, loss_of


def held_out(loss_of: Callable[[int], Tensor]) -> float:
    """Return the mean loss of sixteen batches that no training saw."""
    with torch.no_grad():
        return sum(loss_of(500_000 + step).item() for step in range(16)) / 16
