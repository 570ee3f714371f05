"""What training over many GPUs costs in memory and messages, on paper: ``python benchmarks/sharding_plan.py``.

Models are built without memory, adapters are injected, and bytes are worked out from the shapes that are then there. The
formulas are the properties of `Plan`; ``tests/test_sharding_plan.py`` holds them against bytes counted in processes.
Writes ``benchmarks/results/sharding_plan.md`` in less than a minute.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRA, inject
from lightning_lora.strategies.blocks import blocks_of, kept_whole

PAGE = Path(__file__).parent / "results" / "sharding_plan.md"
SIZES: dict[str, dict[str, int]] = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "405B": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
}
RANKS, WORLDS, MEMORIES = (16, 64), (8, 64, 512), (80, 141)
How = Literal["ddp", "lora_fsdp2", "adapters sharded too"]
HOWS: tuple[How, ...] = ("ddp", "lora_fsdp2", "adapters sharded too")
MOMENTS = 2  # of Adam
GB = 10**9


@dataclass(frozen=True)
class Shapes:
    """What of a model is gathered together, and what is trained.

    Attributes:
        blocks: The frozen tensors of each block.
        rest: The frozen tensors in no block; they are gathered before the first block and stay during it and all others.
        trained: The trained tensors of each block.
        trained_rest: The trained tensors in no block.
    """

    blocks: list[list[Tensor]]
    rest: list[Tensor]
    trained: list[list[Tensor]]
    trained_rest: list[Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> Shapes:
        """Take them from an adapted model, which may be on the meta device."""
        whole = kept_whole(model)
        blocks = [list(block.parameters()) for block in blocks_of(model)]
        inside = {parameter for block in blocks for parameter in block}
        rest = [parameter for parameter in model.parameters() if parameter not in inside]
        return cls(
            [[tensor for tensor in block if tensor not in whole] for block in blocks],
            [tensor for tensor in rest if tensor not in whole],
            [[tensor for tensor in block if tensor.requires_grad] for block in blocks],
            [tensor for tensor in rest if tensor.requires_grad],
        )

    @property
    def all_frozen(self) -> list[Tensor]:
        return [*self.rest, *(tensor for block in self.blocks for tensor in block)]

    @property
    def all_trained(self) -> list[Tensor]:
        return [*self.trained_rest, *(tensor for block in self.trained for tensor in block)]


def size(tensors: list[Tensor]) -> int:
    """Return the bytes of whole tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def shard(tensors: list[Tensor], world: int) -> int:
    """Return the bytes that one of ``world`` processes holds of tensors: rows are dealt out, the last shard padded."""
    return sum(
        math.ceil(tensor.shape[0] / world) * math.prod(tensor.shape[1:]) * tensor.element_size() for tensor in tensors
    )


@dataclass(frozen=True)
class Plan:
    """Bytes for one model, number of processes, and way to divide it. All are of one process (the first, if they differ).

    Attributes:
        shapes: The model's.
        world: How many processes there are.
        how: What is divided: nothing, the base, or the adapters with it.
        reshard: Whether a unit is let go of after its forward and gathered again for its backward.
    """

    shapes: Shapes
    world: int
    how: How
    reshard: bool = True

    @property
    def base(self) -> int:
        """What is held of the frozen base."""
        frozen = self.shapes.all_frozen
        return size(frozen) if self.how == "ddp" else shard(frozen, self.world)

    @property
    def adapters(self) -> int:
        """What is held of the adapters."""
        trained = self.shapes.all_trained
        return shard(trained, self.world) if self.how == "adapters sharded too" else size(trained)

    @property
    def state(self) -> int:
        """Adapters, their gradients, and Adam's moments: 16 bytes for a number in fp32."""
        return (2 + MOMENTS) * self.adapters

    @property
    def message_buffer(self) -> int:
        """A copy of the gradients in which they are averaged: DDP's buckets stay, ours is there for a moment."""
        trained = self.shapes.all_trained
        ours = size(trained) + sum(tensor.element_size() for tensor in trained)  # one number says that there is one
        return {"ddp": size(trained), "lora_fsdp2": ours, "adapters sharded too": 0}[self.how]

    @property
    def gathered_at_once(self) -> int:
        """What is whole of the divided tensors while the largest block runs: that block, and what is in no block."""
        if self.how == "ddp":
            return 0
        return self._units()[0] + self.largest_block

    @property
    def largest_block(self) -> int:
        """The largest block, gathered; on a GPU one more of them is on its way meanwhile."""
        return 0 if self.how == "ddp" else max(self._units()[1:])

    @property
    def gathered(self) -> int:
        """What all-gathers give in a step."""
        return 0 if self.how == "ddp" else (1 + self.reshard) * sum(self._units())

    @property
    def averaged(self) -> int:
        """What goes into all-reduces of gradients in a step, or into reduce-scatters."""
        if self.how == "adapters sharded too":
            return self.world * self.adapters
        return self.message_buffer

    @property
    def received(self) -> float:
        """What arrives from other processes in a step, if all-reduces run as a ring: as a scatter and a gather."""
        others = (self.world - 1) / self.world
        return others * (self.gathered + self.averaged * (1 if self.how == "adapters sharded too" else 2))

    @property
    def checkpoint(self) -> int:
        """The tensors in a checkpoint: what is trained and Adam's moments, without the two numbers of each step count."""
        return (1 + MOMENTS) * size(self.shapes.all_trained)

    @property
    def checkpoint_received(self) -> float:
        """What arrives from other processes before one of them can write the checkpoint."""
        return self.checkpoint * (self.world - 1) / self.world if self.how == "adapters sharded too" else 0

    def _units(self) -> list[int]:
        """Return the bytes of each unit when it is gathered, padding with it; first that of what is in no block."""
        shapes = self.shapes
        units = [shapes.rest, *shapes.blocks]
        if self.how == "adapters sharded too":
            units = [
                frozen + trained
                for frozen, trained in zip(units, [shapes.trained_rest, *shapes.trained], strict=True)
            ]
        return [self.world * shard(unit, self.world) for unit in units]
