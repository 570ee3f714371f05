"""The table in docs/layers.md is what the contract tests hold; ``python tests/test_layer_table.py`` writes it anew."""

from __future__ import annotations

from pathlib import Path

from test_contract import KINDS, Kind
from torch import nn

from lightning_lora.layers import kind_of
from lightning_lora.layers.linear import AdaptedLinear

PAGE = Path(__file__).parent.parent / "docs" / "layers.md"
START, END = "<!-- written by tests/test_layer_table.py -->\n", "<!-- end -->\n"
HEAD = "| layer | forward | merge | PEFT's format | quantized | `torch.compile` |\n|---|---|---|---|---|---|\n"


def no(reason: str) -> str:
    return f"no: {reason}" if reason else "yes"


def quantized(kind: Kind) -> str:
    layer = kind.layer()
    if kind_of(layer) is AdaptedLinear:
        return "yes"
    if any(isinstance(inner, nn.Linear) for inner in layer.modules()):
        return "its linear layers"
    return "no: linear layers only are packed"


def row(name: str, kind: Kind) -> str:
    # every kind in the table passes the contract's tests of forward and merge
    return f"| {name} | yes | yes | {no(kind.beyond_peft)} | {quantized(kind)} | {no(kind.uncompiled)} |\n"


def table() -> str:
    return START + HEAD + "".join(row(name, kind) for name, kind in KINDS.items()) + END


def test_the_table_of_layers_is_what_the_tests_hold() -> None:
    page = PAGE.read_text()
    assert page[page.index(START) : page.index(END) + len(END)] == table(), "run python tests/test_layer_table.py"


if __name__ == "__main__":
    page = PAGE.read_text()
    PAGE.write_text(page[: page.index(START)] + table() + page[page.index(END) + len(END) :])
