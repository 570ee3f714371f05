"""Every method on the demo's task: one learning rate each, found alike, then three seeds; writes a table.

Learning rates are rungs of one ladder. Each method starts with seed 0 on the rung nearest to its rate in methods.yaml
and climbs to its better neighbour, by the validation accuracy of the best checkpoint, until both neighbours of the best
rung are worse. Seeds 1 and 2 run at that rung. Runs that are on record are not repeated, so an interrupted benchmark
goes on where it was. Steps are timed apart from that, all methods by turns in one process.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "examples/debian_sections"
RESULTS = ROOT / "benchmarks/results"
RECORD = RESULTS / "methods_on_text.jsonl"
PAGE = RESULTS / "methods_on_text.md"
LADDER = [3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]
SEEDS = (0, 1, 2)
BUDGET = ["--trainer.max_epochs=2", "--data.max_tokens=16"]  # of every run, so that all of them fit in an afternoon

sys.path.insert(0, str(DEMO))
from demo import METHODS, arguments  # noqa: E402

Run = dict[str, Any]


def one_run(name: str, lr: float, seed: int) -> Run:
    """Train and test in this process, with one thread."""
    import torch

    torch.set_num_threads(1)
    from sections import SectionClassifier, SectionData
    from train import SectionCLI, fit_and_test

    quiet = ["--trainer.enable_progress_bar=false", "--trainer.logger.init_args.save_dir=runs/methods_on_text"]
    args = [*arguments(name, lr, seed), *BUDGET, *quiet]
    cli = SectionCLI(SectionClassifier, SectionData, run=False, args=args)
    score = fit_and_test(cli.trainer, cli.model, cli.datamodule)
    folder = score.checkpoint.with_suffix(".adapter")
    return {
        "method": name,
        "lr": lr,
        "seed": seed,
        "validation": score.validation_accuracy,
        "test": score.test_accuracy,
        "trainable": score.trainable,
        "checkpoint_bytes": score.checkpoint.stat().st_size,
        "folder_bytes": sum(file.stat().st_size for file in folder.iterdir()) if folder.is_dir() else None,
        "seconds": score.seconds,
    }


class Record:
    """The runs that are done, in a file of one line each."""

    def __init__(self) -> None:
        lines = RECORD.read_text().splitlines() if RECORD.exists() else []
        self.runs: dict[tuple[str, float, int], Run] = {}
        for run in map(json.loads, lines):
            self.runs[run["method"], run["lr"], run["seed"]] = run

    def get(self, name: str, lr: float, seed: int) -> Run:
        """Return a run, made in a process of its own if it is not there yet."""
        key = (name, lr, seed)
        if key not in self.runs:
            command = [sys.executable, __file__, "--one", name, str(lr), str(seed)]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
            if done.returncode != 0:
                raise RuntimeError(f"{name} at {lr:g}, seed {seed}:\n{done.stderr[-3000:]}")
            self.runs[key] = json.loads(done.stdout.splitlines()[-1])
            with RECORD.open("a") as file:
                file.write(json.dumps(self.runs[key]) + "\n")
            print(json.dumps(self.runs[key]), flush=True)
        return self.runs[key]


def climb(record: Record, name: str) -> list[Run]:
    """Return the three runs of one method at the learning rate that the ladder ends on."""
    best = min(range(len(LADDER)), key=lambda rung: abs(math.log(LADDER[rung] / float(METHODS[name]["lr"]))))
    tried = {best: record.get(name, LADDER[best], 0)["validation"]}
    while True:
        for rung in (best - 1, best + 1):
            if 0 <= rung < len(LADDER) and rung not in tried:
                tried[rung] = record.get(name, LADDER[rung], 0)["validation"]
        top = max(tried, key=lambda rung: (tried[rung], -rung))
        if top == best:
            return [record.get(name, LADDER[best], seed) for seed in SEEDS]
        best = top


def row(runs: list[Run]) -> str:
    """Return a method's line of the table."""
    tests, validations = [run["test"] for run in runs], [run["validation"] for run in runs]
    first = runs[0]
    cells = [
        f"`{first['method']}`",
        f"{first['lr']:g}",
        ", ".join(f"{test:.3f}" for test in tests),
        f"{statistics.mean(tests):.3f}",
        f"{statistics.mean(validations):.3f}",
        f"{first['trainable']:,}",
        f"{first['checkpoint_bytes']:,}",
        "" if first["folder_bytes"] is None else f"{first['folder_bytes']:,}",
        f"{statistics.median(run['seconds'] for run in runs):.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def write_page(results: dict[str, list[Run]]) -> None:
    """Write the table, best mean first."""
    import lightning
    import torch

    order = sorted(results.values(), key=lambda runs: -statistics.mean(run["test"] for run in runs))
    lines = [
        "# Every method on the demo's task",
        "",
        "Written by `python benchmarks/methods_on_text.py`, whose head says how learning rates were chosen.",
        "MiniLM (22.7 M parameters), 14 sections, 2,000 rows, 3 epochs of 63 steps, batch 32, AdamW with OneCycle;",
        "accuracy on 1,000 test rows of the checkpoint that is best on 500 validation rows. The standard error of one",
        "accuracy is about 0.013, so neighbours in this table are not told apart by it. What each method was run with",
        "is in `callbacks/` and `examples/debian_sections/methods.yaml`. Seconds are those of the fit on one thread,",
        f"with another run beside it. torch {torch.__version__}, lightning {lightning.__version__}.",
        "",
        "| method | learning rate | test accuracy, seeds 0, 1, 2 | mean | mean validation | trainable | checkpoint "
        "bytes | adapter folder bytes | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
        *map(row, order),
    ]
    PAGE.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Run everything that is not on record yet, two runs at a time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", help="all of methods.yaml if none is named")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--one", nargs=3, metavar=("METHOD", "LR", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, lr, seed = options.one
        print(json.dumps(one_run(name, float(lr), int(seed))))
        return
    RESULTS.mkdir(exist_ok=True)
    record, names = Record(), options.methods or list(METHODS)
    with ThreadPoolExecutor(options.workers) as pool:
        results = dict(zip(names, pool.map(lambda name: climb(record, name), names), strict=True))
    write_page(results)


if __name__ == "__main__":
    main()
