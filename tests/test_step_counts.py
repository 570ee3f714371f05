"""In whole training steps adapters launch, keep and move no more than they do now: a guard that counts and never times.

Counted is what a step has beyond that of the same frozen model without adapters. If a change lowers a count these tests
pass: lower its number here then, so that it stays low. Raise one only for a change that is worth it, and say why there.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRA, LoRAFA, Method, VeRA, inject, known_methods

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from bases import Base, encoder, gpt2, llama, loss_of
from measuring import Kernels, kept

BASES = {"Llama": llama(1, 32, 48, heads=4, key_heads=2), "GPT-2": gpt2(1, 32, heads=4), "encoder": encoder(1, 32, 4)}
METHODS: dict[str, Method] = {
    "LoRA": LoRA(r=4),
    "DoRA": known_methods()["DoRA"]().at(4, 8.0),
    "LoRA-FA": LoRAFA(r=4),
    "AdaLoRA": known_methods()["AdaLoRA"]().at(4, 8.0),
    "VeRA": VeRA(r=8),
}
BATCH, TOKENS = 2, 512  # 1,024 rows: enough for the fused form


class Count(NamedTuple):
    """Launches of the forward and of the backward pass, bytes kept in between, bytes read and written."""

    forward: int
    backward: int
    kept: int
    traffic: int


def built(base: Base, method: Method | None, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = base.build().to(dtype).requires_grad_(False).train()
    if method is not None:
        inject(model, method, base.names(model))
    batch = base.draw(BATCH, TOKENS)
    first = next(iter(batch))
    return model, {**batch, first: batch[first].to(dtype).requires_grad_()}


@cache
def count(base: str, method: str | None, dtype: torch.dtype) -> Count:
    model, batch = built(BASES[base], METHODS[method] if method else None, dtype)
    loss_of(model(**batch)).backward()  # what is made at the first call only
    with Kernels() as ahead, kept(model.parameters()) as bytes_kept:
        loss = loss_of(model(**batch))
    with Kernels() as back:
        loss.backward()
    return Count(ahead.launches, back.launches, sum(bytes_kept.values()), ahead.traffic + back.traffic)


def added(base: str, method: str, dtype: torch.dtype) -> Count:
    both = zip(count(base, method, dtype), count(base, None, dtype), strict=True)
    return Count(*(adapted - floor for adapted, floor in both))


# Over bf16 with what a CPU alone does: it turns the small operands of the factors' gradients and, for DoRA without a
# bias, casts a sum that is a third as dear in bf16 as in fp32.
AT_MOST = {
    ("Llama", "LoRA", torch.float32): Count(14, 42, 573_440, 8_334_848),
    ("Llama", "LoRA", torch.bfloat16): Count(28, 84, 286_720, 4_441_344),
    ("Llama", "DoRA", torch.float32): Count(98, 84, 1_492_960, 17_703_476),
    ("Llama", "DoRA", torch.bfloat16): Count(119, 140, 747_488, 9_209_780),
    ("Llama", "LoRA-FA", torch.float32): Count(14, 28, 114_688, 7_221_760),
    ("Llama", "LoRA-FA", torch.bfloat16): Count(28, 56, 57_344, 3_758_592),
    ("Llama", "AdaLoRA", torch.float32): Count(21, 70, 577_280, 8_366_240),
    ("Llama", "AdaLoRA", torch.bfloat16): Count(35, 105, 288_640, 4_466_976),
    ("Llama", "VeRA", torch.float32): Count(28, 70, 236_544, 7_902_784),
    ("Llama", "VeRA", torch.bfloat16): Count(42, 91, 118_272, 4_275_264),
    ("GPT-2", "LoRA", torch.float32): Count(8, 24, 851_968, 8_830_976),
    ("GPT-2", "LoRA", torch.bfloat16): Count(16, 48, 425_984, 4_595_712),
    ("GPT-2", "DoRA", torch.float32): Count(64, 60, 2_034_208, 24_474_832),
    ("GPT-2", "DoRA", torch.bfloat16): Count(76, 88, 1_018_400, 12_546_704),
    ("GPT-2", "LoRA-FA", torch.float32): Count(8, 16, 65_536, 7_833_600),
    ("GPT-2", "LoRA-FA", torch.bfloat16): Count(16, 32, 32_768, 4_020_736),
    ("GPT-2", "AdaLoRA", torch.float32): Count(12, 40, 855_552, 8_860_032),
    ("GPT-2", "AdaLoRA", torch.bfloat16): Count(20, 60, 427_776, 4_619_392),
    ("GPT-2", "VeRA", torch.float32): Count(16, 40, 140_288, 8_295_936),
    ("GPT-2", "VeRA", torch.bfloat16): Count(24, 52, 70_144, 4_391_936),
    ("encoder", "LoRA", torch.float32): Count(11, 24, 311_296, 6_717_440),
    ("encoder", "LoRA", torch.bfloat16): Count(17, 38, 155_648, 3_587_072),
    ("encoder", "DoRA", torch.float32): Count(61, 54, 985_632, 15_669_968),
    ("encoder", "DoRA", torch.bfloat16): Count(69, 70, 502_304, 8_254_864),
    ("encoder", "LoRA-FA", torch.float32): Count(11, 16, 180_224, 5_996_544),
    ("encoder", "LoRA-FA", torch.bfloat16): Count(17, 26, 90_112, 3_174_912),
    ("encoder", "AdaLoRA", torch.float32): Count(15, 40, 314_880, 6_746_496),
    ("encoder", "AdaLoRA", torch.bfloat16): Count(21, 52, 157_952, 3_612_288),
    ("encoder", "VeRA", torch.float32): Count(19, 40, 218_112, 6_292_992),
    ("encoder", "VeRA", torch.bfloat16): Count(25, 48, 109_056, 3_427_328),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16 base"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", BASES)
def test_adapters_add_at_most_what_they_add_now(base: str, method: str, dtype: torch.dtype) -> None:
    found, most = added(base, method, dtype), AT_MOST[base, method, dtype]
    worse = [name for name, one, bound in zip(Count._fields, found, most, strict=True) if one > bound]
    assert not worse, f"{found} where {most} is known to be possible"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo looks at it on a block's input
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", BASES)
def test_a_block_compiles_into_one_graph(base: str, method: str) -> None:
    torch._dynamo.reset()
    model, batch = built(BASES[base], METHODS[method], torch.float32)
    expected = loss_of(model(**batch))
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    for block in blocks:
        block.compile(backend="eager", fullgraph=True)  # a graph break is an error
    loss = loss_of(model(**batch))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
