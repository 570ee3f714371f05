"""What was adapted, as a table and a line; ranks by depth and kind of matrix, as a table and a plot."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from torch import nn

from lightning_lora.adapter import Adapter
from lightning_lora.plots import empty_figure
from lightning_lora.quantized import number_of_values
from lightning_lora.sites import NUMBER, Site, pattern

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
        trained = sum(p.numel() for p in adapter.parameters(recurse=False) if p.requires_grad)
        groups.setdefault(key, []).append((site.name, trained))
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
    return _drawn(f"adapters of task {task!r}", COLUMNS, rows(found, task))


def importance_table(importances: Mapping[str, float], kept: Collection[str], shared: Mapping[str, str]) -> str:
    """Return the table of what LoRA-drop measured and chose as text, drawn by rich where it is installed.

    Args:
        importances: Shares by site name.
        kept: The sites that keep an adapter of their own.
        shared: The site whose adapter it is, by the name of each site that shares it.
    """
    body = [
        (name, f"{value:.4f}", "own" if name in kept else f"shares {shared[name]}" if name in shared else "none")
        for name, value in importances.items()
    ]
    return _drawn("importances by LoRA-drop", ("site", "importance", "adapter"), body)


def plot_importances(importances: Mapping[str, float], path: str | Path, kept: Collection[str] = ()) -> None:
    """Draw a bar for each site, and write it as an image.

    Args:
        importances: Shares by site name.
        path: The file; its ending gives the format.
        kept: The sites that keep an adapter of their own, which are darker.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure = empty_figure("plot_importances", 8, 1 + 0.25 * len(importances))
    axes = figure.add_subplot()
    colors = ["tab:blue" if name in kept else "lightsteelblue" for name in importances]
    axes.barh(list(importances), list(importances.values()), color=colors)
    axes.invert_yaxis()  # the first site on top
    axes.set_xlabel("share of what the adapters of like matrices add")
    figure.savefig(path)


def _drawn(title: str, columns: tuple[str, ...], body: Sequence[tuple[str, ...]]) -> str:
    if find_spec("rich") is not None:
        from rich.console import Console
        from rich.table import Table

        drawn = Table(title=title)
        for column in columns:
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
    widths = [max(len(row[i]) for row in [columns, *body]) for i in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [columns, *body]]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def ranks(found: list[Site], task: str = "default") -> dict[str, int]:
    """Return how many ranks of each site are in use, by the site's name: those that AdaLoRA masked are not.

    Args:
        found: The sites.
        task: Their task.
    """
    return {site.name: int((site.adapter(task).factors()[1] != 0).any(-1).sum()) for site in found}


def rank_table(ranks: Mapping[str, int]) -> str:
    """Return ranks as text: a row for each kind of matrix, a column for each depth.

    Args:
        ranks: By site name; the first number in a name is its depth.
    """
    grid, depths = _by_kind(ranks)
    total = {depth: sum(row.get(depth, 0) for row in grid.values()) for depth in depths}
    lines = [["rank at depth", *_labels(depths), "total"]]
    for kind, row in {**grid, "total": total}.items():
        lines.append([kind, *(str(row.get(depth, "")) for depth in depths), str(sum(row.values()))])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    texts = [
        line[0].ljust(widths[0]) + "".join(f"  {line[i]:>{widths[i]}}" for i in range(1, len(line))) for line in lines
    ]
    return "\n".join([texts[0], "-" * len(texts[0]), *texts[1:]])


def plot_ranks(ranks: Mapping[str, int], path: str | Path) -> None:
    """Draw ranks as a map of depth (across) and kind of matrix (down), and write it as an image.

    Args:
        ranks: As for ``rank_table``.
        path: The file; its ending gives the format.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    grid, depths = _by_kind(ranks)
    figure = empty_figure("plot_ranks", 4 + 0.4 * len(depths), 1.5 + 0.4 * len(grid))
    axes = figure.add_subplot()
    values = [[row.get(depth, float("nan")) for depth in depths] for row in grid.values()]
    image = axes.imshow(values, cmap="Blues", vmin=0, aspect="auto")
    for y, row in enumerate(grid.values()):
        for x, depth in enumerate(depths):
            if depth in row:
                light = row[depth] > 0.6 * max(ranks.values())
                axes.text(x, y, str(row[depth]), ha="center", va="center", color="white" if light else "black")
    axes.set_xticks(range(len(depths)), _labels(depths))
    axes.set_yticks(range(len(grid)), list(grid))
    axes.set_xlabel("depth")
    figure.colorbar(image, label="rank")
    figure.savefig(path)


def _by_kind(ranks: Mapping[str, int]) -> tuple[dict[str, dict[int | None, int]], list[int | None]]:
    """Return the ranks by kind of matrix and depth, and all depths; None is that of names without a number."""
    grid: dict[str, dict[int | None, int]] = {}
    for name, rank in ranks.items():
        number = NUMBER.search(name)
        depth = None if number is None else int(number[0])
        kind = name if number is None else f"{name[: number.start()]}*{name[number.end() :]}"
        grid.setdefault(kind.removesuffix(".weight"), {})[depth] = rank
    depths = {depth for row in grid.values() for depth in row}
    return grid, sorted(depths, key=lambda depth: (depth is None, depth or 0))


def _labels(depths: list[int | None]) -> list[str]:
    return ["-" if depth is None else str(depth) for depth in depths]
