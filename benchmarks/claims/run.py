"""Measure every claim, or those named, and write the page: ``python benchmarks/claims/run.py [script ...]``."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from importlib import import_module
from types import ModuleType
from typing import Any

import matplotlib
import torch

from record import MEASURED, PAGE, RESULTS, SCRIPTS, Measured, page, verdict
from tiny_lm import pretrained

matplotlib.use("Agg")


def draw(script: ModuleType, measured: Measured) -> None:
    """Write the plot of one script."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3), layout="constrained")
    script.draw(measured, axes)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS / f"{script.__name__}.png", dpi=90)
    pyplot.close(figure)


def main(names: list[str]) -> None:
    """Measure, print a line for each, and write the page."""
    unknown = [name for name in names if name not in SCRIPTS]
    if unknown:
        sys.exit(f"no claim is called {unknown[0]}: choose of {', '.join(SCRIPTS)}")
    torch.set_num_threads(1)
    RESULTS.mkdir(exist_ok=True)
    pretrained()  # kept from then on, and not counted
    for name in names or SCRIPTS:
        script = import_module(name)
        start = time.process_time()
        measured = script.measure()
        keep(name, {"seconds": round(time.process_time() - start), "measured": measured})
        draw(script, measured)
        print(f"{script.CLAIM.title}: {verdict(script, measured)}", flush=True)
    record = json.loads(MEASURED.read_text())
    if len(record["scripts"]) == len(SCRIPTS):
        PAGE.write_text(page([import_module(name) for name in SCRIPTS], record))


def keep(name: str, found: dict[str, Any]) -> None:
    """Add what was measured to the file, which another process may have written to in the meantime."""
    scripts = json.loads(MEASURED.read_text())["scripts"] if MEASURED.exists() else {}
    scripts[name] = found
    environment = (
        f"Python {platform.python_version()}, torch {torch.__version__}, one thread of {os.cpu_count()} cores "
        f"({platform.machine()})"
    )
    scripts = {known: scripts[known] for known in SCRIPTS if known in scripts}
    MEASURED.write_text(json.dumps({"environment": environment, "scripts": scripts}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
