"""What was adapted, as a table and a line."""

from __future__ import annotations

from importlib.util import find_spec

from torch import nn

from lightning_lora.adapter import Adapter
from lightning_lora.quantized import number_of_values
from lightning_lora.sites import Site, pattern

_FILE_WIDTH = 200  # a log file has no width of its own, and rich would take 80 columns
COLUMNS = ("site", "count", "shape (out, in)", "r", "alpha", "parameters")


def rows(found: list[Site], task: str = "default") -> list[tuple[str, ...]]:
    """Return one row per group of like sites, whose names differ in numbers alone.

    Args:
        found: The sites.
        task: Their task.
    """
    groups: dict[tuple[str, str, str, str], list[tuple[str, int]]] = {}
    for site in found:
        adapter = site.adapter(task)
        key = (
            pattern(site.name),
            shape_of(adapter),
            str(adapter.method.r),
            f"{adapter.method.alpha:g}",
        )
        groups.setdefault(key, []).append((site.name, sum(p.numel() for p in adapter.parameters())))
    table: list[tuple[str, ...]] = []
    for (names, shape, r, alpha), members in groups.items():
        name = members[0][0] if len(members) == 1 else names
        table.append((name, str(len(members)), shape, r, alpha, f"{sum(n for _, n in members):,}"))
    return table


def shape_of(adapter: Adapter) -> str:
    """Return the shape of the matrix, or of the stack of matrices, that an adapter changes, as text."""
    up, down = adapter.factors()
    shape = f"{up.shape[-2]} x {down.shape[-1]}"
    return shape if up.dim() == 2 else f"{up.shape[0]} of {shape}"


def totals(model: nn.Module) -> str:
    """Return the line ``trainable / total (percent)``."""
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(map(number_of_values, parameters))
    return f"{trainable:,} trainable of {total:,} parameters ({100 * trainable / max(total, 1):.2f} %)"


def table(found: list[Site], task: str = "default") -> str:
    """Return the table as text, drawn by rich where it is installed.

    Args:
        found: The sites.
        task: Their task.
    """
    body = rows(found, task)
    if find_spec("rich") is not None:
        from rich.console import Console
        from rich.table import Table

        drawn = Table(title=f"adapters of task {task!r}")
        for column in COLUMNS:
            if column == "site":
                drawn.add_column(column, overflow="fold")  # names have no spaces to break at, and none may be cut short
            else:
                drawn.add_column(column, justify="right", no_wrap=True)
        for row in body:
            drawn.add_row(*row)
        console = Console() if Console().is_terminal else Console(width=_FILE_WIDTH)
        with console.capture() as capture:
            console.print(drawn)
        return capture.get().rstrip("\n")
    widths = [max(len(row[i]) for row in [COLUMNS, *body]) for i in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [COLUMNS, *body]]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
