"""The tables in docs/parameter_counts.md are counted from our adapters; ``python tests/test_parameter_counts.py``
writes them anew.

Each row injects a method into a model that has the linear layers of the paper's, on the meta device, and counts what is
there. The expected number in each row was worked out by hand, from the shapes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_lora import AdaLoRA, DeltaLoRA, DoRA, LoRA, LoRADrop, LoRAFA, Method, VeRA, inject, sites
from lightning_lora.sharing import share as share_adapters

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
    "DeBERTa-v3-base": encoder(12, 768, 184_423_682),
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
MAGNITUDES_ONLY = dict.fromkeys(("o", "gate", "up", "down"), 0)


@dataclass(frozen=True, eq=False)
class Row:
    """One adapted model.

    Attributes:
        network: Its name.
        targets: The adapted layers.
        method: The method.
        trained: How many parameters must be trained.
        figures: What was printed about it, each with its source: ``"0.3M (LoRA)"``, ``"2.31 % (DoRA)"``, ``"1.5 MB"``,
            ``"2.8M with what is frozen (VeRA)"``.
        why_not: Why the figures that do not follow do not.
        dtype: Type of the adapters.
        ranks: Other ranks by layer.
        kept: How many of each kind of layer keep adapters of their own after LoRA-drop's selection.
        held: How many parameters the adapters must hold with those that are frozen; None if none are.
    """

    network: str
    targets: str
    method: Method
    trained: int
    figures: tuple[str, ...] = ()
    why_not: str = ""
    dtype: torch.dtype = torch.float32
    ranks: Mapping[str, int] = field(default_factory=dict)
    kept: int | None = None
    held: int | None = None


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
        Row("DeBERTa-v3-base", "q k v o up down", LoRA(r=8), 1_327_104, ("1.33M (AdaLoRA)",)),
        Row("DeBERTa-v3-base", "q k v o up down", LoRA(r=2), 331_776, ("0.33M (AdaLoRA)",)),
        Row("RoBERTa-base", "q v", LoRA(r=1), 36_864),
        Row("RoBERTa-base", "q v", LoRA(r=16), 589_824),
        Row("RoBERTa-base", "q v", LoRA(r=256), 9_437_184),
        Row("RoBERTa-large", "q v", LoRA(r=1), 98_304),
        Row("RoBERTa-large", "q v", LoRA(r=16), 1_572_864),
        Row("RoBERTa-large", "q v", LoRA(r=256), 25_165_824),
        Row("GPT-3", "q v", LoRA(r=16), 75_497_472, ("75.5M (VeRA)",)),
        Row("GPT-3", "q v", LoRA(r=256), 1_207_959_552),
    ],
    "DoRA": [
        Row("LLaMA-7B", "q k v up down", DoRA(r=32), 56_975_360, ("0.84 % (DoRA)",)),
        Row("LLaMA-7B", "q k v up down", DoRA(r=16), 28_925_952, ("0.43 % (DoRA)",)),
        Row("LLaMA-13B", "q k v up down", DoRA(r=32), 89_190_400, ("0.68 % (DoRA)",)),
        Row("LLaMA-13B", "q k v up down", DoRA(r=16), 45_281_280, ("0.35 % (DoRA)",)),
        Row("LLaMA3-8B", "q k v up down", DoRA(r=32), 57_409_536, ("0.71 % (DoRA)",)),
        Row(
            "LLaMA3-8B",
            "q k v up down",
            DoRA(r=16),
            29_097_984,
            ("0.35 % (DoRA)",),
            "0.35 % is LoRA's share at this rank, without the magnitudes",
        ),
        Row("LLaMA-7B", ALL_LINEAR, DoRA(r=64), 161_267_712, ("2.33 % (DoRA)",)),
        Row("LLaMA-7B", ALL_LINEAR, DoRA(r=32), 26_525_696, ("0.39 % (DoRA)",), ranks=MAGNITUDES_ONLY),
        Row("LLaMA-13B", ALL_LINEAR, DoRA(r=32), 41_451_520, ("0.31 % (DoRA)",), ranks=MAGNITUDES_ONLY),
        Row("Llama-3.2-3B", "q v", DoRA(r=32), 9_289_728, ("9,289,728 (PEFT's benchmark)",)),
    ],
    "VeRA": [
        Row("RoBERTa-base", "q v", VeRA(r=1), 18_456, held=19_992),
        Row("RoBERTa-base", "q v", VeRA(r=16), 18_816, held=43_392),
        Row("RoBERTa-base", "q v", VeRA(r=256), 24_576, held=417_792),
        Row("RoBERTa-base", "q v", VeRA(r=1024), 43_008, ("0.043M (VeRA)",), held=1_615_872),
        Row("RoBERTa-large", "q v", VeRA(r=1), 49_200, held=51_248),
        Row("RoBERTa-large", "q v", VeRA(r=16), 49_920, held=82_688),
        Row("RoBERTa-large", "q v", VeRA(r=256), 61_440, ("0.061M (VeRA)",), held=585_728),
        Row("GPT-2 medium", "q v", VeRA(r=1024), 98_304, ("0.098M (VeRA)",), held=2_195_456),
        Row("GPT-2 large", "q v", VeRA(r=1024), 165_888, ("0.17M (VeRA)",), held=2_787_328),
        Row("GPT-3", "q v", VeRA(r=1), 2_359_488, held=2_384_064),
        Row("GPT-3", "q v", VeRA(r=16), 2_362_368, ("2.8M with what is frozen (VeRA)",), held=2_755_584),
        Row("GPT-3", "q v", VeRA(r=256), 2_408_448, ("8.7M with what is frozen (VeRA)",), held=8_699_904),
        Row("ViT-base", "q v", VeRA(r=256), 24_576, held=417_792),
        Row("ViT-large", "q v", VeRA(r=256), 61_440, held=585_728),
        Row("LLaMA-7B", ALL_LINEAR, VeRA(r=1024), 1_589_248, ("1.6M (VeRA)", "0.02 % (DoRA)"), held=24_133_632),
        Row("LLaMA-7B", ALL_LINEAR, VeRA(r=256), 1_417_216, ("1.4M (first version of VeRA)",), held=7_053_312),
        Row("LLaMA-13B", ALL_LINEAR, VeRA(r=1024), 2_416_640, ("2.4M (VeRA)",), held=30_728_192),
        Row("Llama-3.2-3B", "q v", VeRA(r=256), 129_024, ("129,024 (PEFT's benchmark)",), held=1_701_888),
    ],
    "DVoRA": [
        Row("RoBERTa-base", "q v", VeRA(magnitude=True, r=1024), 61_440, held=1_634_304),
        Row("LLaMA-7B", ALL_LINEAR, VeRA(magnitude=True, r=1024), 2_949_120, ("0.04 % (DoRA)",), held=25_493_504),
        Row("LLaMA-13B", ALL_LINEAR, VeRA(magnitude=True, r=1024), 4_546_560, held=32_858_112),
    ],
    "AdaLoRA": [
        Row(
            "DeBERTa-v3-base",
            "q k v o up down",
            AdaLoRA(r=12, target_r=8),
            1_991_520,
            ("1.27M (AdaLoRA)",),
            "that is after training: the 576 ranks that are left cost between 885,312 and 2,212,416, by where they are",
        ),
    ],
    "LoRA-FA": [
        Row("RoBERTa-base", "q v", LoRAFA(r=8), 147_456, held=294_912),
        Row("GPT-3", "q v", LoRAFA(r=4), 9_437_184, held=18_874_368),
    ],
    "LoRA-drop": [Row("RoBERTa-base", "q v", LoRADrop(r=8), 147_456, kept=5)],
    "Delta-LoRA": [Row("RoBERTa-base", "q v", DeltaLoRA(r=8), 294_912, held=589_824)],
}
ROWS = [row for rows in TABLES.values() for row in rows]


@dataclass(frozen=True)
class Count:
    """Numbers and bytes of the parameters that the adapters train, and of all that they hold."""

    trained: int
    trained_bytes: int
    held: int
    held_bytes: int


@cache
def count(row: Row) -> Count:
    targets = row.targets.split()
    model = NETWORKS[row.network].build(targets)
    base = {id(parameter) for parameter in model.parameters()}
    inject(model, row.method, targets, rank_pattern=row.ranks, seed=0, dtype=row.dtype)
    if row.kept is not None:
        names = [site.name for site in sites(model)]
        kept = [name for target in targets for name in [one for one in names if f".{target}." in one][: row.kept]]
        share_adapters(model, kept)
    held = [parameter for parameter in model.parameters() if id(parameter) not in base]
    trained = [parameter for parameter in held if parameter.requires_grad]
    return Count(numbers(trained), size(trained), numbers(held), size(held))


def numbers(parameters: list[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def size(parameters: list[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def share(row: Row) -> float | None:
    """Return the percentage that is trained of the whole adapted model."""
    total = NETWORKS[row.network].parameters
    return None if total is None else 100 * count(row).trained / (total + count(row).trained)


def follows(row: Row, figure: str) -> bool:
    """Return whether a printed figure is ours, rounded or cut after its last digit."""
    digits, unit, frozen = re.fullmatch(r"([\d.,]+) ?(M|K|%|MB|)( with what is frozen)?( \(.*\))?", figure).groups()[:3]
    printed, unit_of_last_digit = float(digits.replace(",", "")), 10.0 ** -len(digits.partition(".")[2])
    counted = count(row)
    number, size = (counted.held, counted.held_bytes) if frozen else (counted.trained, counted.trained_bytes)
    ours = {
        "": [number],
        "K": [number / 1e3],
        "M": [number / 1e6],
        "%": [share(row) or 0.0],
        "MB": [size / 2**20, size / 1e6],
    }[unit]
    return any(abs(value - printed) < unit_of_last_digit for value in ours)


def memory(size: int) -> str:
    return f"{size / 2**20:,.2f} MiB" if size >= 2**20 else f"{size / 2**10:,.1f} KiB"


def adapted(row: Row) -> str:
    others = [name for name in row.ranks if row.ranks[name] == 0]
    own = [name for name in row.targets.split() if name not in others]
    if row.kept is not None:
        return f"{row.kept} each of {', '.join(own)}; the rest share one each"
    return ", ".join(own) + (f"; magnitudes of {', '.join(others)} too" if others else "")


def line(row: Row) -> str:
    counted, percent = count(row), share(row)
    wrong = [figure.partition(" (")[0] for figure in row.figures if not follows(row, figure)]
    verdict = f"**no** ({', '.join(wrong)}): {row.why_not}" if wrong else "yes" if row.figures else ""
    frozen = f"{counted.held:,}, {memory(counted.held_bytes)}" if counted.held != counted.trained else ""
    cells = (
        row.network,
        adapted(row),
        str(row.method.r),
        f"{counted.trained:,}",
        "" if percent is None else f"{percent:.4f} %",
        memory(counted.trained_bytes) + (" in fp16" if row.dtype == torch.float16 else ""),
        frozen,
        "; ".join(row.figures),
        verdict,
    )
    return "| " + " | ".join(cells) + " |\n"


def table(rows: list[Row]) -> str:
    head = "| model | adapted | r | trained | share | size | with what is frozen | printed | follows |\n"
    return f"{head}|{'---|' * 9}\n{''.join(map(line, rows))}"


def tables() -> str:
    return START + "\n".join(f"## {name}\n\n{table(rows)}" for name, rows in TABLES.items()) + END


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.network} {row.targets} {row.method.r}")
def test_an_adapted_model_trains_the_number_of_parameters_that_its_shapes_give(row: Row) -> None:
    assert count(row).trained == row.trained
    assert count(row).held == (row.held or row.trained)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.network} {row.targets} {row.method.r}")
def test_the_table_says_why_where_a_figure_does_not_follow_and_only_there(row: Row) -> None:
    assert bool(row.why_not) == any(not follows(row, figure) for figure in row.figures)


def test_the_tables_of_parameter_counts_are_what_is_counted() -> None:
    page = PAGE.read_text()
    assert page[page.index(START) : page.index(END) + len(END)] == tables(), "run python tests/test_parameter_counts.py"


if __name__ == "__main__":
    page = PAGE.read_text()
    PAGE.write_text(page[: page.index(START)] + tables() + page[page.index(END) + len(END) :])
