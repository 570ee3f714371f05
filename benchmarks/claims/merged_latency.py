"""Merged adapters cost nothing: the merged model makes exactly the base's calls."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_lora import LoRA, inject, merge_
from record import Claim, Measured, show
from tiny_lm import SYMBOLS, TARGETS, Block, TinyLM

CLAIM = Claim(
    title="Merged, LoRA adds no latency",
    says="Merged into the weights, LoRA adds nothing to inference, unlike bottleneck adapters between the layers",
    source="LoRA, arXiv:2106.09685",
    experiment=(
        "The operators that PyTorch dispatches in one forward of a language model of three blocks, and their "
        "floating-point operations; no timing. LoRA has rank 8 on all linear layers of the blocks; the bottleneck "
        "adapters (Houlsby et al., arXiv:1902.00751) have width 8, after the attention and after the MLP."
    ),
    criterion=(
        "the merged model dispatches the base's operators, one for one, computes what the unmerged one does within "
        "1e-5, and both the unmerged one and the one with bottlenecks dispatch more."
    ),
)


class Recorder(TorchDispatchMode):
    """Keeps the name of every operator that runs inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(str(func))
        return func(*args, **(kwargs or {}))


class Bottleneck(nn.Module):
    """What bottleneck adapters put after a layer: ``y + up(relu(down(y)))``."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.down, self.up = layer, nn.Linear(64, width), nn.Linear(width, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y + self.up(torch.relu(self.down(y)))  # type: ignore[no-any-return]


def cost(model: TinyLM, symbols: Tensor) -> tuple[list[str], int, Tensor]:
    """Return the operators of one forward, its floating-point operations, and the logits."""
    with torch.no_grad():
        with Recorder() as recorder:
            logits = model.logits(symbols)
        with FlopCounterMode(display=False) as counter:
            model.logits(symbols)
    return recorder.operators, counter.get_total_flops(), logits


def model() -> TinyLM:
    """Return the same random model at every call."""
    torch.manual_seed(0)
    return TinyLM().eval()


def measure() -> dict[str, Any]:
    """Return operators and floating-point operations of the base and of its adapted forms."""
    symbols = torch.randint(SYMBOLS, (1, 16), generator=torch.Generator().manual_seed(0))
    adapted, bottlenecked = model(), model()
    for site in inject(adapted, LoRA(r=8), TARGETS, seed=0):
        nn.init.normal_(site.adapter("default").lora_B, std=0.1)
    for block in bottlenecked.blocks:
        assert isinstance(block, Block)
        block.o, block.down = Bottleneck(block.o, 8), Bottleneck(block.down, 8)  # type: ignore[assignment]
    costs = {"base": cost(model(), symbols), "unmerged LoRA": cost(adapted, symbols)}
    costs["merged LoRA"] = cost(merge_(adapted), symbols)
    costs["bottleneck adapters"] = cost(bottlenecked, symbols)
    base = costs["base"][0]
    return {
        "operators": {name: len(operators) for name, (operators, _, _) in costs.items()},
        "operations": {name: operations for name, (_, operations, _) in costs.items()},
        "first difference": {
            name: next(
                (i for i, pair in enumerate(zip(operators, base, strict=False)) if pair[0] != pair[1]), len(base)
            )
            for name, (operators, _, _) in costs.items()
        },
        "difference": {
            other: (costs["merged LoRA"][2] - costs[other][2]).abs().max().item() for other in ("unmerged LoRA", "base")
        },
    }


def reproduced(measured: Measured) -> bool:
    """Compare the operators."""
    operators, operations = measured["operators"], measured["operations"]
    same = measured["first difference"]["merged LoRA"] == operators["merged LoRA"] == operators["base"]
    more = min(operators["unmerged LoRA"], operators["bottleneck adapters"]) > operators["base"]
    exact = measured["difference"]["unmerged LoRA"] < 1e-5
    return same and operations["merged LoRA"] == operations["base"] and more and exact


def table(measured: Measured) -> str:
    """Return the counts."""
    rows = "".join(
        f"\n| {name} | {count} | {measured['operations'][name]:,} |" for name, count in measured["operators"].items()
    )
    difference = measured["difference"]
    return (
        "| model | operators dispatched | floating-point operations |\n|---|---|---|"
        + rows
        + f"\n\nThe merged model's logits differ by at most {difference['unmerged LoRA']:.0e} from the unmerged "
        f"one's, and by up to {difference['base']:.2g} from the base's."
    )


def draw(measured: Measured, axes: Any) -> None:
    """Plot the numbers of operators."""
    bars = axes.barh(list(measured["operators"]), list(measured["operators"].values()))
    axes.bar_label(bars, padding=2)
    axes.invert_yaxis()
    axes.set(xlabel="operators dispatched in one forward")


if __name__ == "__main__":
    show(sys.modules[__name__])
