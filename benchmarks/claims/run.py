"""Measure every claim, or those named, and write the page: ``python benchmarks/claims/run.py [script ...]``."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from importlib import import_module
from types import ModuleType

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
    record = json.loads(MEASURED.read_text()) if MEASURED.exists() else {"scripts": {}}
    record["environment"] = (
        f"Python {platform.python_version()}, torch {torch.__version__}, one thread of {os.cpu_count()} cores "
        f"({platform.machine()})"
    )
    pretrained()  # kept from then on, and not counted
    scripts = {name: import_module(name) for name in SCRIPTS}
    for name in names or SCRIPTS:
        start = time.process_time()
        measured = scripts[name].measure()
        record["scripts"][name] = {"seconds": round(time.process_time() - start), "measured": measured}
        print(f"{scripts[name].CLAIM.title}: {verdict(scripts[name], measured)}", flush=True)
        record["scripts"] = {known: record["scripts"][known] for known in SCRIPTS if known in record["scripts"]}
        MEASURED.write_text(json.dumps(record, indent=1) + "\n")
        draw(scripts[name], measured)
    if len(record["scripts"]) == len(SCRIPTS):
        PAGE.write_text(page(list(scripts.values()), record))


if __name__ == "__main__":
    main(sys.argv[1:])
