"""What one claim is, and the page on which all of them stand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

RESULTS = Path(__file__).parent.parent / "results"
PAGE, MEASURED = RESULTS / "claims.md", RESULTS / "claims.json"
SCRIPTS = (
    "lora_plus_steps",
    "rslora_ranks",
    "merged_latency",
    "dora_separation",
    "dora_detached_norm",
    "adalora_ranks",
    "delta_lora_theorem",
    "vera_economy",
    "lora_fa_memory",
    "lora_fa_floor",
    "lora_fa_eva",
    "lora_drop_selection",
    "svd_starts",
    "preconditioners",
)
Measured = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim and the experiment that tests it; said before anything is measured.

    Attributes:
        title: The claim in a few words.
        says: What its source says.
        source: The paper.
        experiment: What is done here, and how it is smaller than what the paper did.
        criterion: What must come out for the verdict "reproduced"; ``reproduced`` of the script computes it.
    """

    title: str
    says: str
    source: str
    experiment: str
    criterion: str


def verdict(script: ModuleType, measured: Measured) -> str:
    """Return "reproduced" or "not reproduced"."""
    return "reproduced" if script.reproduced(measured) else "not reproduced"


def section(script: ModuleType, measured: Measured, seconds: float) -> str:
    """Return the page's section of one script."""
    claim: Claim = script.CLAIM
    name = script.__name__
    return f"""## {claim.title}

**Claim.** {claim.says} ({claim.source})

**Experiment.** {claim.experiment} `python benchmarks/claims/{name}.py`, {seconds:.0f} s.

**Called reproduced if** {claim.criterion}

{script.table(measured)}

**Verdict: {verdict(script, measured)}.**

![{claim.title}]({name}.png)
"""


def page(scripts: list[ModuleType], record: Mapping[str, Any]) -> str:
    """Return the whole page.

    Args:
        scripts: The scripts, in the order of the page.
        record: What ``run.py`` keeps: the environment, and for each script what it measured and how long it took.
    """
    rows = "".join(
        f"| [{script.CLAIM.title}](#{anchor(script.CLAIM.title)}) | {script.CLAIM.source} "
        f"| {verdict(script, record['scripts'][script.__name__]['measured'])} |\n"
        for script in scripts
    )
    sections = "\n".join(
        section(script, record["scripts"][script.__name__]["measured"], record["scripts"][script.__name__]["seconds"])
        for script in scripts
    )
    return f"""# Claims of the papers, tried on small problems

Each claim is tried with this library's own methods on a problem that takes a CPU core about a minute. The experiments
are far smaller than the papers' own: a claim that is reproduced here holds on this problem, and one that is not need
not be wrong. Verdicts are computed from the numbers by criteria that were written down first; where an experiment or a
criterion was changed after a first try, its section says so. `python benchmarks/claims/run.py` measures all and writes
this page and the plots (`pip install .[plots]`); with names of scripts after it, it measures these only.

Measured with {record["environment"]}. Seconds are processor time; pretraining the tiny
language model that some share takes about one minute more, once.

| claim | source | verdict |
|---|---|---|
{rows}
{sections}"""


def numbers(values: Iterable[float], form: str = ".3f") -> str:
    """Return numbers as text, with commas between them."""
    return ", ".join(format(value, form) for value in values)


def anchor(title: str) -> str:
    """Return the anchor that Markdown viewers make of a heading."""
    kept = "".join(letter for letter in title.lower() if letter.isalnum() or letter in " -_")
    return kept.replace(" ", "-")


def show(script: ModuleType) -> None:
    """Measure one claim and print it: what a script does when it is run alone."""
    torch.set_num_threads(1)
    claim: Claim = script.CLAIM
    print(f"claim: {claim.says} ({claim.source})")
    measured = script.measure()
    print(f"measured:\n{script.table(measured)}\nreproduced if {claim.criterion}\nverdict: {verdict(script, measured)}")
