"""Every method on the demo's task: one learning rate each, found alike, then three seeds; writes a table.

Learning rates are rungs of one ladder. Each method starts with seed 0 on the rung nearest to its rate in methods.yaml
and climbs to its better neighbour, by the validation accuracy of the best checkpoint, until both neighbours of the best
rung are worse. Seeds 1 and 2 run at that rung. Runs that are on record are not repeated, so an interrupted benchmark
goes on where it was. Then a step of each is timed, all methods by turns in this process.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from measuring import RESULTS, by_turns, footer, measured_with, quartiles, ratio, table

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "examples/debian_sections"
RECORD = RESULTS / "methods_on_text.jsonl"
PAGE = RESULTS / "methods_on_text.md"
LADDER = [3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]
SEEDS = (0, 1, 2)
BUDGET = ["--trainer.max_epochs=2", "--data.max_tokens=16"]  # of every run, so that all of them fit in an afternoon

sys.path.insert(0, str(DEMO))
from demo import METHODS, arguments  # noqa: E402

Run = dict[str, Any]


def made(name: str, lr: float, seed: int) -> Any:
    """Return the CLI of a run that has not begun."""
    from sections import SectionClassifier, SectionData
    from train import SectionCLI

    quiet = ["--trainer.enable_progress_bar=false", "--trainer.logger.init_args.save_dir=runs/methods_on_text"]
    args = [*arguments(name, lr, seed), *BUDGET, *quiet]
    return SectionCLI(SectionClassifier, SectionData, run=False, args=args)


def one_run(name: str, lr: float, seed: int) -> Run:
    """Train and test in this process, with one thread."""
    import torch

    torch.set_num_threads(1)
    from train import fit_and_test

    cli = made(name, lr, seed)
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


def one_step(name: str) -> Callable[[], None]:
    """Return what runs a training step of a method: forward, backward, AdamW, and what the method does around them."""
    import torch

    from lightning_lora import LoRACallback, inject

    cli = made(name, float(METHODS[name]["lr"]), seed=0)
    model, data = cli.model, cli.datamodule
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    schedules = []
    for callback in cli.trainer.callbacks:
        if isinstance(callback, LoRACallback):
            found = inject(model, callback.method, callback.target_modules, modules_to_save=callback.modules_to_save)
            schedules = callback.method.schedules(found, "default", total_steps=126)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model.log = lambda *args, **kwargs: None

    def step() -> None:
        model.training_step(batch, 0).backward()
        for schedule in schedules:
            schedule.before_step(optimizer)
        optimizer.step()
        for schedule in schedules:
            schedule.after_step(optimizer)
        optimizer.zero_grad()

    return step


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


def row(runs: list[Run], step: list[float]) -> list[str]:
    """Return a method's line of the table."""
    tests, validations = [run["test"] for run in runs], [run["validation"] for run in runs]
    first = runs[0]
    return [
        f"`{first['method']}`",
        f"{first['lr']:g}",
        ", ".join(f"{test:.3f}" for test in tests),
        f"{statistics.mean(tests):.3f}",
        f"{statistics.mean(validations):.3f}",
        f"{first['trainable']:,}",
        f"{first['checkpoint_bytes']:,}",
        "" if first["folder_bytes"] is None else f"{first['folder_bytes']:,}",
        ratio(step),
    ]


HEAD = ["method", "learning rate", "test accuracy, seeds 0, 1, 2", "mean", "mean validation", "trainable"]
HEAD += ["checkpoint bytes", "adapter folder bytes", "step"]


def write_page(results: dict[str, list[Run]], steps: dict[str, list[float]]) -> None:
    """Write the table, best mean first."""
    order = sorted(results.values(), key=lambda runs: -statistics.mean(run["test"] for run in runs))
    rows = [row(runs, steps[runs[0]["method"]]) for runs in order]
    PAGE.write_text(f"""# Every method on the demo's task

Written by `python benchmarks/methods_on_text.py`, whose head says how learning rates were chosen. MiniLM (22.7 M
parameters), 14 sections, 2,000 rows, 2 epochs of 63 steps, batch 32, 16 tokens, AdamW with OneCycle; accuracy on 1,000
test rows of the checkpoint that is best on 500 validation rows. The standard error of one accuracy is about 0.014, that
of a mean over three seeds, which share the test rows, hardly less: most neighbours in this table are not told apart by
it. What each method was run with is in `callbacks/` and `examples/debian_sections/methods.yaml`. A step is forward,
backward, AdamW and what the method does around them: CPU time on one thread, as the median ratio to LoRA's step in the
same round, with quartiles.

{table(HEAD, rows)}
{footer(measured_with())}""")


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
    import torch

    torch.set_num_threads(1)
    write_page(results, quartiles(by_turns({name: one_step(name) for name in results}, rounds=7), to="lora"))


if __name__ == "__main__":
    main()
