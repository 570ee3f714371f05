"""The tables in docs/parameter_counts.md are counted from our adapters; ``python tests/test_parameter_counts.py`` writes
them anew.

Each row injects a method into a model that has the linear layers of the paper's, on the meta device, and counts what is
there. The expected number in each row was worked out by hand, from the shapes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_lora import LoRA, Method, inject

PAGE = Path(__file__).parent.parent / "docs" / "parameter_counts.md"
START, END = "<!-- written by tests/test_parameter_counts.py -->\n", "<!-- end -->\n"


@dataclass(frozen=True)
class Network:
    """The linear layers of each block as (out, in), and how many parameters the whole model has."""

    blocks: int
    layers: dict[str, tuple[int, int]]
    parameters: int | None = None

    def build(self, targets: list[str]) -> nn.Module:
        """Return the blocks with the layers that are needed."""

        def linear(out_features: int, in_features: int) -> nn.Module:
            return nn.Linear(in_features, out_features, bias=False, device="meta")

        return nn.ModuleList(
            nn.ModuleDict({name: linear(*self.layers[name]) for name in targets}) for _ in range(self.blocks)
        )


def encoder(blocks: int, width: int, parameters: int | None = None) -> Network:
    square = dict.fromkeys(("q", "k", "v", "o"), (width, width))
    return Network(blocks, {**square, "up": (4 * width, width), "down": (width, 4 * width)}, parameters)


def llama(blocks: int, width: int, inner: int, parameters: int, keys: int | None = None) -> Network:
    keys = keys or width
    attention = {"q": (width, width), "k": (keys, width), "v": (keys, width), "o": (width, width)}
    return Network(
        blocks, {**attention, "gate": (inner, width), "up": (inner, width), "down": (width, inner)}, parameters
    )


NETWORKS = {
    "RoBERTa-base": encoder(12, 768, 124_647_939),
    "RoBERTa-large": encoder(24, 1024, 355_362_819),
    "DeBERTa-v2-XXL": encoder(48, 1536, 1_566_913_538),
    "GPT-2 medium": encoder(24, 1024, 354_823_168),
    "GPT-2 large": encoder(36, 1280, 774_030_080),
    "GPT-3": encoder(96, 12288),
    "ViT-base": encoder(12, 768),
    "ViT-large": encoder(24, 1024),
    "LLaMA-7B": llama(32, 4096, 11008, 6_738_415_616),
    "LLaMA-13B": llama(40, 5120, 13824, 13_015_864_320),
    "LLaMA3-8B": llama(32, 4096, 14336, 8_030_261_248, keys=1024),
    "Llama-3.2-3B": llama(28, 3072, 8192, 3_212_749_824, keys=1024),
}
ALL_LINEAR = "q k v o gate up down"


@dataclass(frozen=True)
class Row:
    """One adapted model.

    Attributes:
        network: Its name.
        targets: The adapted layers.
        method: The method.
        trained: How many parameters must be trained.
        figures: What was printed about it, each with its source: ``"0.3M (LoRA)"``, ``"2.31 % (DoRA)"``, ``"1.5 MB"``.
        why_not: Why the figures that do not follow do not.
        dtype: Type of the adapters.
    """

    network: str
    targets: str
    method: Method
    trained: int
    figures: tuple[str, ...] = ()
    why_not: str = ""
    dtype: torch.dtype = torch.float32


TABLES: dict[str, list[Row]] = {
    "LoRA": [
        Row("RoBERTa-base", "q v", LoRA(r=8), 294_912, ("0.3M (LoRA)",)),
        Row("RoBERTa-large", "q v", LoRA(r=8), 786_432, ("0.8M (LoRA)",)),
        Row("DeBERTa-v2-XXL", "q v", LoRA(r=16), 4_718_592, ("4.7M (LoRA)",)),
        Row(
            "GPT-2 medium",
            "q v",
            LoRA(r=4),
            393_216,
            ("0.35M (LoRA)", "1.5 MB (file released with LoRA)"),
            "0.35M is 0.1 % of the base; the released file has our count",
        ),
        Row(
            "GPT-2 large",
            "q v",
            LoRA(r=4),
            737_280,
            ("0.77M (LoRA)", "2.3 MB (file released with LoRA)"),
            "0.77M is 0.1 % of the base; the file's size fits neither",
        ),
        Row("GPT-3", "q v", LoRA(r=1), 4_718_592, ("4.7M (LoRA)",)),
        Row("GPT-3", "q v", LoRA(r=2), 9_437_184, ("9.4M (LoRA)",)),
        Row("GPT-3", "q v", LoRA(r=4), 18_874_368, ("18.9M (LoRA)", "18M (LoRA)")),
        Row("GPT-3", "q", LoRA(r=8), 18_874_368, ("18M (LoRA)",)),
        Row("GPT-3", "q k v o", LoRA(r=2), 18_874_368, ("18M (LoRA)",)),
        Row(
            "GPT-3",
            "q v",
            LoRA(r=4),
            18_874_368,
            ("35 MB (LoRA)",),
            "35 MB is 350 GB / 10,000",
            dtype=torch.float16,
        ),
        Row("GPT-3", "q v", LoRA(r=8), 37_748_736, ("37.7M (LoRA)",)),
        Row("GPT-3", "q v", LoRA(r=64), 301_989_888, ("301.9M (LoRA)",)),
        Row("ViT-base", "q v", LoRA(r=8), 294_912, ("294.9K (VeRA)",)),
        Row("ViT-large", "q v", LoRA(r=8), 786_432, ("786.4K (VeRA)",)),
        Row("LLaMA-7B", ALL_LINEAR, LoRA(r=64), 159_907_840, ("159.9M (VeRA)", "2.31 % (DoRA)")),
        Row("LLaMA-13B", ALL_LINEAR, LoRA(r=64), 250_347_520, ("250.3M (VeRA)",)),
        Row("LLaMA-7B", "q k v up down", LoRA(r=32), 56_098_816, ("0.83 % (DoRA)",)),
        Row("LLaMA-13B", "q k v up down", LoRA(r=32), 87_818_240, ("0.67 % (DoRA)",)),
        Row("LLaMA3-8B", "q k v up down", LoRA(r=32), 56_623_104, ("0.70 % (DoRA)",)),
        Row("Llama-3.2-3B", "q v", LoRA(r=32), 9_175_040, ("9,175,040 (PEFT's benchmark)",)),
        Row("Llama-3.2-3B", "q v", LoRA(r=64), 18_350_080, ("18,350,080 (PEFT's benchmark)",)),
    ],
}
ROWS = [row for rows in TABLES.values() for row in rows]


@dataclass(frozen=True)
class Count:
    """What an adapted model holds, besides its base."""

    trained: int
    stored: int
    bytes: int


@cache
def count(row: Row) -> Count:
    targets = row.targets.split()
    model = NETWORKS[row.network].build(targets)
    base = {id(parameter) for parameter in model.parameters()}
    inject(model, row.method, targets, seed=0, dtype=row.dtype)
    ours = [parameter for parameter in model.parameters() if id(parameter) not in base]
    return Count(
        sum(parameter.numel() for parameter in ours if parameter.requires_grad),
        sum(parameter.numel() for parameter in ours),
        sum(parameter.numel() * parameter.element_size() for parameter in ours),
    )


def share(row: Row) -> float | None:
    """Return the percentage that is trained of the whole adapted model."""
    total = NETWORKS[row.network].parameters
    return None if total is None else 100 * count(row).trained / (total + count(row).trained)


def follows(row: Row, figure: str) -> bool:
    """Return whether a printed figure is ours, rounded or cut after its last digit."""
    digits, unit = re.fullmatch(r"([\d.,]+) ?(M|K|%|MB|)( \(.*\))?", figure).groups()[:2]
    printed, unit_of_last_digit = float(digits.replace(",", "")), 10.0 ** -len(digits.partition(".")[2])
    counted = count(row)
    ours = {
        "": [counted.trained],
        "K": [counted.trained / 1e3],
        "M": [counted.trained / 1e6],
        "%": [share(row) or 0.0],
        "MB": [counted.bytes / 2**20, counted.bytes / 1e6],
    }[unit]
    return any(abs(value - printed) < unit_of_last_digit for value in ours)


def line(row: Row) -> str:
    counted, percent = count(row), share(row)
    wrong = [figure.partition(" (")[0] for figure in row.figures if not follows(row, figure)]
    verdict = f"**no** ({', '.join(wrong)}): {row.why_not}" if wrong else "yes" if row.figures else ""
    cells = (
        row.network,
        ", ".join(row.targets.split()),
        str(row.method.r),
        f"{counted.trained:,}",
        "" if percent is None else f"{percent:.4f} %",
        f"{counted.bytes / 2**20:,.3f} MiB" + (" in fp16" if row.dtype == torch.float16 else ""),
        "; ".join(row.figures),
        verdict,
    )
    return "| " + " | ".join(cells) + " |\n"


def tables() -> str:
    head = "| model | adapted | r | trained | share | size | printed | follows |\n|---|---|---|---|---|---|---|---|\n"
    return START + "\n".join(f"## {name}\n\n{head}{''.join(map(line, rows))}" for name, rows in TABLES.items()) + END


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.network} {row.targets} {row.method.r}")
def test_an_adapted_model_trains_the_number_of_parameters_that_its_shapes_give(row: Row) -> None:
    assert count(row).trained == row.trained


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.network} {row.targets} {row.method.r}")
def test_the_table_says_why_where_a_figure_does_not_follow_and_only_there(row: Row) -> None:
    assert bool(row.why_not) == any(not follows(row, figure) for figure in row.figures)


def test_the_tables_of_parameter_counts_are_what_is_counted() -> None:
    page = PAGE.read_text()
    assert page[page.index(START) : page.index(END) + len(END)] == tables(), "run python tests/test_parameter_counts.py"


if __name__ == "__main__":
    page = PAGE.read_text()
    PAGE.write_text(page[: page.index(START)] + tables() + page[page.index(END) + len(END) :])
