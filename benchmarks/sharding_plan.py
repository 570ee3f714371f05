"""What training over many GPUs costs in memory and messages, on paper: ``python benchmarks/sharding_plan.py``.

Models are built without memory, adapters are injected, and bytes are worked out from the shapes that are then there.
The formulas are the properties of `Plan`; ``tests/test_sharding_plan.py`` holds them against bytes counted in
processes. Writes ``benchmarks/results/sharding_plan.md`` in less than a minute.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
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
        rest: The frozen tensors in no block; they are gathered before the first block and stay during all of them.
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
    """Bytes of one process (the first, if they differ) for a model, a number of processes, and a way to divide it.

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
        """The most that is there of gathered tensors, where blocks are alike.

        What is in no block is there twice, in its message and copied out of it, until the message of the first block
        has come. From then on it is there once, with two messages of blocks, or one and its copy.
        """
        if self.how == "ddp":
            return 0
        rest, *blocks = self._units()
        if self.reshard:
            return rest + max(blocks) + max(rest, *blocks)
        return max(blocks) + max(2 * rest, rest + sum(blocks))

    @property
    def needed(self) -> int:
        """All that is held at once besides activations; gradients are averaged when nothing is gathered any more."""
        return self.base + self.state + max(self.gathered_at_once, self.message_buffer)

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
        """The tensors in a checkpoint: what is trained, Adam's moments, and a count of steps for each, in fp32."""
        trained = self.shapes.all_trained
        return (1 + MOMENTS) * size(trained) + 4 * len(trained)

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
                frozen + trained for frozen, trained in zip(units, [shapes.trained_rest, *shapes.trained], strict=True)
            ]
        return [self.world * shard(unit, self.world) for unit in units]


def shapes(name: str, r: int) -> Shapes:
    """Return those of a Llama in bf16 with fp32 LoRA on all linear layers of its blocks, built without memory."""
    config = LlamaConfig(vocab_size=128_256, num_key_value_heads=8, tie_word_embeddings=False, **SIZES[name])
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    inject(model, LoRA(r=r, alpha=2 * r))
    return Shapes.of(model)


def table(head: list[str], rows: list[list[Any]]) -> str:
    cells = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(str(cell) for cell in row)} |\n" for row in cells)


def gb(size: float) -> str:
    """Return bytes in units of 10^9, with three digits that count."""
    value = size / GB
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def left(memory: int, needed: int) -> str:
    return gb(memory * GB - needed) if needed < memory * GB else "**none**"


def model_rows(counted: dict[tuple[str, int], Shapes]) -> str:
    rows = []
    for (name, r), one in counted.items():
        base, trained = (sum(t.numel() for t in tensors) for tensors in (one.all_frozen, one.all_trained))
        block, whole = max(map(size, one.blocks)), Plan(one, 1, "lora_fsdp2")
        parts = [size(one.all_frozen), block, size(one.rest), whole.adapters, whole.state, whole.checkpoint]
        rows.append([name, r, f"{base:,}", f"{trained:,}", f"{trained / base:.2%}", *map(gb, parts)])
    head = [
        "model",
        "r",
        "base",
        "trained",
        "share",
        "base GB",
        "a block",
        "in no block",
        "adapters",
        "16 T",
        "checkpoint",
    ]
    return table(head, rows)


def memory_rows(counted: dict[tuple[str, int], Shapes]) -> str:
    rows = []
    for (name, r), one in counted.items():
        for world in WORLDS:
            ddp, ours, divided = (Plan(one, world, how) for how in HOWS)
            spare = [left(memory, plan.needed) for memory in MEMORIES for plan in (ddp, ours, divided)]
            parts = [ours.base, ours.state, divided.state, ours.gathered_at_once]
            rows.append([name, r, world, *map(gb, parts), *spare])
    spare = [f"{memory} GB: {how}" for memory in MEMORIES for how in ("ddp", "lora_fsdp2", "divided")]
    head = ["model", "r", "GPUs", "base", "16 T whole", "16 T divided", "gathered at once", *spare]
    return table(head, rows)


def message_rows(counted: dict[tuple[str, int], Shapes]) -> str:
    rows = []
    for (name, r), one in counted.items():
        for world in WORLDS:
            ddp, ours, divided = (Plan(one, world, how) for how in HOWS)
            parts = [ours.gathered, ours.averaged, ddp.received, ours.received, divided.received]
            rows.append([name, r, world, *map(gb, parts), gb(divided.checkpoint_received)])
    head = ["model", "r", "GPUs", "base gathered", "gradients averaged", "received: ddp", "lora_fsdp2", "divided"]
    return table([*head, "checkpoint, divided"], rows)


def limit_rows(counted: dict[tuple[str, int], Shapes]) -> str:
    rows = []
    for (name, r), one in counted.items():
        state = Plan(one, 1, "lora_fsdp2").state
        ranks = [rank_at(counted, name, memory) for memory in MEMORIES]
        rows.append([name, r, gb(state), f"{size(one.all_frozen) / state:.0f}", *ranks])
    head = ["model", "r", "16 T", "GPUs at which the base's share is as large"]
    return table([*head, *(f"r that fills a quarter of {memory} GB" for memory in MEMORIES)], rows)


def page(counted: dict[tuple[str, int], Shapes]) -> str:
    """Return the page."""
    example, small = counted["70B", 64], counted["405B", 16]
    whole, divided = (Plan(example, 64, how) for how in ("lora_fsdp2", "adapters sharded too"))
    wide, wide_divided = (Plan(small, 512, how) for how in ("lora_fsdp2", "adapters sharded too"))
    saved = wide.needed - wide_divided.needed
    full, full_divided = (Plan(counted["405B", 64], 64, how) for how in ("lora_fsdp2", "adapters sharded too"))
    return f"""# Sharded training at scale, on paper

Nothing on this page was run at these sizes. Models are built on the meta device with LoRA on all linear layers of
their blocks, and bytes are worked out from the shapes. `tests/test_sharding_plan.py` holds the formulas against bytes
counted in 2 and 4 processes that train small models: they are exact there, padding with them.
`python benchmarks/sharding_plan.py` writes this page; `benchmarks/gpu/sharding.py` measures speed and memory on GPUs.

## Formulas

P numbers of the base in b bytes each (2 in bf16), T trained numbers in fp32 held in n tensors, W processes. A unit is
what is gathered together: a block, or all that is in no block (embeddings, the head). Rows of a tensor are dealt out,
ceil(rows / W) to each process, so what is divided by W below, or gathered, is a sum over tensors padded to whole rows.

| bytes of one process | `ddp`, `lora_ddp` | `lora_fsdp2` | adapters divided too |
|---|---|---|---|
| base | b P | b P / W | b P / W |
| adapters, gradients, Adam's two moments | 16 T | 16 T | 16 T / W, padded |
| copy of the gradients to be averaged | 4 T, all the time | 4 (T + n), after backward | not worked out |
| gathered at once, a block being B, the rest R | 0 | R + B + max(R, B) | the same, with adapters |
| gathered in a step | 0 | 2 b P (b P with `reshard_after_forward=False`) | 2 b P + 8 T |
| averaged in a step | 4 T | 4 (T + n) | 4 T |
| received in a step, times (W - 1) / W | 8 T | 2 b P + 8 (T + n) | 2 b P + 12 T |
| tensors in a checkpoint | 12 T + 4 n | 12 T + 4 n | 12 T + 4 n |
| received to write one | 0 | 0 | that, times (W - 1) / W |
| copied to main memory to write one | that, where it is written | the same | as it is written |

An all-reduce counts as a ring, which moves its bytes twice. R is there twice for a moment, as the message and copied
out of it, until the message of the first block has come. Beside the checkpoint the adapter folder takes 4 T. To resume,
each process reads the whole file. With `replicas=k` the base is divided over W / k processes; adapters are averaged
over all W.

All was counted on CPUs; GPUs run messages beside the computation, and may hold them longer. These lines are read from
code and not counted: DDP's copy of the gradients, what is gathered at once with divided adapters, what is received, and
what is copied to main memory. Left out: activations, logits, buffers, what an optimizer needs during its step, and what
an allocator leaves unused.

## Models

Sizes in GB (10^9 bytes).

{model_rows(counted)}
## Memory of one GPU

GB. The last six columns are what is left for activations and all else that is not counted, of 80 or 141 GB; **none**:
it does not fit. "Divided" is what `fully_shard` does with adapters if it is not told to leave them whole; no strategy
of this library does that.

{memory_rows(counted)}
## Messages of one GPU

GB in a step; in the last column for a checkpoint, for which `ddp` and `lora_fsdp2` receive nothing.

{message_rows(counted)}
## What whole adapters cost, and where they stop paying

{limit_rows(counted)}
- **The price is 16 T (1 - 1/W) bytes of each GPU.** For 70B at r=64 on 64 GPUs: {gb(whole.state)} GB on each, where
  divided ones take {gb(divided.state)}, beside {gb(whole.base)} GB of the base. All that is held at once, without
  activations, is {gb(whole.needed)} GB instead of {gb(divided.needed)}.
- **What it buys**: no weight is gathered for a checkpoint (divided, {gb(divided.checkpoint_received)} GB arrive), and
  adapters cost 8 T a step in messages instead of 12 T: {gb(whole.received)} GB in all, divided
  {gb(divided.received)}.
- **Padding turns against division where W > r.** A factor A (r, in) has r rows. Divided over more processes than that,
  those with a row hold a whole one, and W rows are gathered. For 405B at r=16 on 512 GPUs a step of divided adapters
  receives {gb(wide_divided.received)} GB, of whole ones {gb(wide.received)}. Division would free {gb(saved)} GB.
- **More GPUs stop helping** beyond the number in the table, where the base's share is no larger than 16 T: from there
  on most of what a GPU keeps is adapters, which do not shrink.
- **Whole adapters stop paying where activations need the memory that 16 T takes.** Our rule is a quarter of a GPU. All
  three models are below that at r=16, and 8B at any usual rank; 70B reaches it at r={rank_at(counted, "70B", 80)} on
  80 GB, 405B at r={rank_at(counted, "405B", 80)} on 80 GB and at r={rank_at(counted, "405B", 141)} on 141 GB. 405B at
  r=64 on 64 GPUs of 80 GB leaves {left(80, full.needed)} GB whole and {left(80, full_divided.needed)} divided: do not
  run that with whole adapters. Use a lower rank, fewer target modules, or a method that trains less (VeRA, LoRA-FA).
- Dividing Adam's moments alone would leave 8 T + 8 T / W at the messages of whole adapters; no strategy here does it.
- `ddp` sends least: where the base fits beside activations, it is the one to take.
"""


def rank_at(counted: dict[tuple[str, int], Shapes], name: str, memory: int) -> int:
    """Return the rank at which 16 T fills a quarter of a GPU's memory."""
    r = RANKS[0]
    return int(memory * GB / 4 // (Plan(counted[name, r], 1, "lora_fsdp2").state / r))


def main() -> None:
    PAGE.write_text(page({(name, r): shapes(name, r) for name in SIZES for r in RANKS}))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
