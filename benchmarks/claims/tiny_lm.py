"""A tiny language model that was pretrained on one Markov chain, and a second chain to fine-tune it on.

Both chains are of second order over 48 symbols: the logits of the next symbol are a sum of what the last two symbols
say and a part that belongs to the pair alone. The second chain changes some of each. The pretrained weights are kept in
``.cache/`` beside this file, which git ignores; deleting it makes them anew.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora import Method, inject, start_from_data
from training import fit

SETTING = (
    "Fine-tuning of a tiny language model (three blocks of width 64, 48 symbols), pretrained on one second-order "
    "Markov chain, to another: 250 steps of 64 sequences with Adam, all linear layers of the blocks adapted."
)
SYMBOLS, WIDTH, BLOCKS, LENGTH, BATCH = 48, 64, 3, 16, 64
PRETRAINING_STEPS = 1200
TARGETS = ["q", "k", "v", "o", "up", "down"]
CACHE = Path(__file__).parent / ".cache" / "tiny_lm.pt"


class Block(nn.Module):
    """Causal attention with four heads and an MLP, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        z = self.attention_norm(x)
        q, k, v = (layer(z).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        hidden: Tensor = x + self.down(F.gelu(self.up(self.mlp_norm(x))))
        return hidden


class TinyLM(nn.Module):
    """A decoder of three blocks; ``forward`` returns the mean cross entropy of the next symbol, in nats."""

    def __init__(self) -> None:
        super().__init__()
        self.symbols, self.positions = nn.Embedding(SYMBOLS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, SYMBOLS, bias=False)

    def logits(self, read: Tensor) -> Tensor:
        """Return the logits (sequences, length, symbols) of what follows each symbol."""
        x = self.symbols(read) + self.positions.weight[: read.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits

    def forward(self, sequences: Tensor) -> Tensor:
        logits = self.logits(sequences[:, :-1])[:, 1:]  # the first symbol alone says nothing of the next
        return F.cross_entropy(logits.flatten(0, 1), sequences[:, 2:].flatten())


class Run(NamedTuple):
    """One fine-tuning."""

    model: TinyLM
    trained: int
    losses: list[float]
    loss: float
    loss_on_old: float


class Chain:
    """A second-order Markov chain.

    Attributes:
        table: Probabilities (symbols, symbols, symbols) of the next symbol after two.
    """

    def __init__(self, logits: Tensor) -> None:
        self.table = logits.softmax(-1)

    def sample(self, number: int, seed: int) -> Tensor:
        """Return sequences (number, LENGTH + 1)."""
        generator = torch.Generator().manual_seed(seed)
        sequences = torch.randint(SYMBOLS, (number, LENGTH + 1), generator=generator)
        for t in range(2, LENGTH + 1):
            after = self.table[sequences[:, t - 2], sequences[:, t - 1]]
            sequences[:, t] = torch.multinomial(after, 1, generator=generator)[:, 0]
        return sequences


@cache
def chains() -> tuple[Chain, Chain]:
    """Return the chain of the pretraining and the one of the fine-tuning."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    before, last, pair = normal(SYMBOLS, 1, SYMBOLS), normal(1, SYMBOLS, SYMBOLS), normal(SYMBOLS, SYMBOLS, SYMBOLS)
    old = 1.6 * before + 2.0 * last + 0.3 * pair
    new = old + normal(SYMBOLS, 1, SYMBOLS) + 1.4 * normal(1, SYMBOLS, SYMBOLS)
    return Chain(old), Chain(new)


@cache
def _pretrained() -> TinyLM:
    torch.manual_seed(0)
    model = TinyLM()
    if CACHE.exists():
        model.load_state_dict(torch.load(CACHE, weights_only=True))
        return model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PRETRAINING_STEPS)
    for step in range(PRETRAINING_STEPS):
        optimizer.zero_grad()
        model(chains()[0].sample(BATCH, seed=step)).backward()
        optimizer.step()
        decay.step()
    CACHE.parent.mkdir(exist_ok=True)
    torch.save(model.state_dict(), CACHE)
    return model


def pretrained() -> TinyLM:
    """Return a fresh copy of the pretrained model."""
    return copy.deepcopy(_pretrained())


@torch.no_grad()
def loss_on(chain: Chain, model: TinyLM) -> float:
    """Return the loss on 2,048 sequences that no training saw."""
    return model(chain.sample(2048, seed=-1)).item()


def fine_tune(
    method: Method, *, lr: float, steps: int = 250, lr_ratio: float = 1.0, seed: int = 0, from_data: bool = False
) -> Run:
    """Adapt all linear layers of the blocks of a pretrained model to the second chain.

    Args:
        method: The method.
        lr: Learning rate.
        steps: Number of steps.
        lr_ratio: Learning rate of B divided by ``lr``.
        seed: Of the adapters and of the data.
        from_data: Whether the adapters start from batches of the second chain.

    Returns:
        The model, the number of trained parameters, the loss of each step, and the loss on both chains.
    """
    model, (old, new) = pretrained(), chains()
    inject(model, method, TARGETS, seed=seed)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    first = 1_000_000 * (seed + 1)
    if from_data:
        start_from_data(model, (new.sample(BATCH, seed=first - 1 - batch) for batch in range(8)), model)
    losses = fit(
        model, method, lambda step: model(new.sample(BATCH, seed=first + step)), steps=steps, lr=lr, lr_ratio=lr_ratio
    )
    return Run(model, trained, losses, loss_on(new, model), loss_on(old, model))
