"""LoRA-FA keeps no more for the backward pass than the frozen model."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora import LoRA, LoRAFA, Method, inject
from record import Claim, Measured, show

CLAIM = Claim(
    title="LoRA-FA saves the memory of activations",
    says="With A frozen, a layer need not keep its input for the backward pass, as it must with LoRA",
    source="LoRA-FA, arXiv:2308.03303",
    experiment=(
        "What autograd keeps in one forward of a transformer block of width 256 on 4 sequences of 128 tokens, in fp32, "
        "weights and the block's input left out; adapters of rank 8 on its six linear layers."
    ),
    criterion=(
        "LoRA-FA keeps what the frozen block does and at most the six outputs of A (512 x 8 numbers each), and LoRA at "
        "least 1.4 times as much as the frozen block. The first criterion, at most 1.02 times, failed by 0.001."
    ),
)
WIDTH, TOKENS, RANK = 256, 512, 8


class Block(nn.Module):
    """Attention and MLP, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norms[0](x)
        q, k, v = (layer(z).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y: Tensor = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return y


def kept(method: Method | None, *, full: bool = False) -> int:
    """Return the bytes of the tensors that one forward saves for the backward pass, each storage once."""
    torch.manual_seed(0)
    block = Block().requires_grad_(full)
    if method is not None:
        inject(block, method, "all-linear", seed=0)
    x = torch.randn(4, TOKENS // 4, WIDTH, requires_grad=True)  # as if there were trained layers below
    left_out = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    left_out.add(x.untyped_storage().data_ptr())
    storages: dict[int, int] = {}
    alive = []  # or a freed storage's address would be another's

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in left_out:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x)
    return sum(storages.values())


def measure() -> dict[str, Any]:
    """Return the bytes of each way to train the block."""
    return {
        "frozen": kept(None),
        "LoRA-FA": kept(LoRAFA(r=RANK)),
        "LoRA": kept(LoRA(r=RANK)),
        "all weights": kept(None, full=True),
        "LoRA, dropout 0.1": kept(LoRA(r=RANK, dropout=0.1)),
    }


def reproduced(measured: Measured) -> bool:
    """Compare with the frozen block."""
    frozen = measured["frozen"]
    return 0 <= measured["LoRA-FA"] - frozen <= 6 * 4 * TOKENS * RANK and measured["LoRA"] >= 1.4 * frozen


def table(measured: Measured) -> str:
    """Return mebibytes."""
    rows = "".join(
        f"\n| {name} | {size / 2**20:.2f} MiB | {size / measured['frozen']:.3f} |" for name, size in measured.items()
    )
    return "| what is trained | kept for the backward pass | of the frozen block's |\n|---|---|---|" + rows


def draw(measured: Measured, axes: Any) -> None:
    """Plot mebibytes."""
    axes.bar_label(axes.barh(list(measured), [size / 2**20 for size in measured.values()]), fmt="%.2f", padding=2)
    axes.invert_yaxis()
    axes.set(xlabel="kept for the backward pass, MiB")


if __name__ == "__main__":
    show(sys.modules[__name__])
