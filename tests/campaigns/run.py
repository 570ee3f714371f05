"""Run the campaigns, print their figures, and write ``benchmarks/results/reliability.md``.

``python tests/campaigns/run.py`` takes a few minutes, with ``--long`` half an hour. Each trial is kept when it is done:
 ``--only kills`` measures one part again and keeps the rest of the page, and ``--resume`` goes on after a stop.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from campaigns import cases, disks, kills, merges, mutations  # noqa: E402
from campaigns.page import page  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
SHORT = {"kills": 20, "others' kills": 20, "mutations": 1000, "PEFT's mutations": 100, "flips": 7, "PEFT's flips": 61}
SHORT |= {"cycles": 100, "signals": 2, "others' signals": 1, "bases": 10}
LONG = {"kills": 1000, "others' kills": 200, "mutations": 25000, "PEFT's mutations": 500, "flips": 1, "PEFT's flips": 8}
LONG |= {"cycles": 100, "signals": 20, "others' signals": 5, "bases": 100}


class Trial(NamedTuple):
    """One figure of the page: how large it is, and what measures it in an empty folder; None where it cannot be had."""

    part: str
    name: str
    size: int
    measure: Callable[[Path], Any]


def kill(make: Callable[[], kills.Writer], count: int, where: Path) -> dict[str, Any] | None:
    kills.NUMBERS, before = 2**20, kills.NUMBERS  # 4 MiB
    try:
        writer = make()
        (where / "run").mkdir()
        if writer.elsewhere and kills.other_file_system(where) is None:
            return None
        return {**kills.measure(writer, count, where / "run")._asdict(), "mebibytes": 4}
    finally:
        kills.NUMBERS = before


def fill(kind: str, make: Callable[[], kills.Writer]) -> list[str] | None:
    with disks.mounted(kind) as place:
        return None if place is None else list(disks.measure(make(), place))


def signalled(count: int, stock: bool, where: Path) -> list[dict[str, Any]]:
    command = [sys.executable, str(Path(__file__).with_name("signals.py")), "--signals", str(count)]
    command += ["--json", str(where / "found"), *(["--stock"] if stock else [])]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads((where / "found").read_text())  # type: ignore[no-any-return]


def trials(size: dict[str, int]) -> list[Trial]:
    found = []
    for name, make in {**kills.OURS, **kills.ANCHORS}.items():
        count = size["kills" if name in kills.OURS else "others' kills"]
        found.append(Trial("kills", name, count, lambda where, m=make, c=count: kill(m, c, where)))
    for kind in disks.KINDS:
        for name, make in {**kills.OURS, **kills.ANCHORS}.items():
            found.append(Trial("disks", f"{kind}: {name}", 1, lambda where, k=kind, m=make: fill(k, m)))
    for who, load in {"ours": mutations.ours, "PEFT": mutations.by_peft}.items():
        count = size["mutations" if who == "ours" else "PEFT's mutations"]
        for kind in (*mutations.KINDS, *(["signed values"] if who == "ours" else [])):
            act = lambda where, a=load, k=kind, c=count: mutations.measure(a, k, c, where / "adapter")  # noqa: E731
            found.append(Trial("mutations", f"{who}: {kind}", count, act))
        every = size["flips" if who == "ours" else "PEFT's flips"]
        flips = lambda where, a=load, e=every: mutations.flip(a, e, where / "adapter")  # noqa: E731
        found.append(Trial("flips", who, every, flips))
    for case in (*cases.CASES, cases.OTHER_BASE):
        for name, reader, own in (
            ("ours, of ours", cases.ours, True),
            ("ours, of PEFT's", cases.ours, False),
            ("PEFT", cases.by_peft, False),
        ):
            found.append(
                Trial(
                    "cases", f"{name}: {case}", 1, lambda where, r=reader, c=case, o=own: cases.measure(r, c, o, where)
                )
            )
    for kind in cases.BASES:
        count = size["bases"]
        found.append(Trial("bases", kind, count, lambda where, k=kind, c=count: cases.other_bases(k, c, where)))
    found.append(Trial("modes", "modes", 1, cases.modes))
    for who, cycle in {"ours": merges.ours, "PEFT": merges.by_peft}.items():
        for dtype in merges.DTYPES:
            merge = lambda where, a=cycle, d=dtype: a(d, size["cycles"])  # noqa: E731
            found.append(Trial("merges", f"{who}: {str(dtype).removeprefix('torch.')}", size["cycles"], merge))
    for who, stock in {"ours": False, "Lightning": True}.items():
        count = size["others' signals" if stock else "signals"]
        found.append(Trial("signals", who, count, lambda where, c=count, s=stock: signalled(c, s, where)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--long", action="store_true")
    parts = list(dict.fromkeys(trial.part for trial in trials(SHORT)))
    parser.add_argument("--only", choices=parts, nargs="+", default=parts)
    parser.add_argument("--resume", action="store_true", help="leave out what is there at this size")
    parser.add_argument("--no_page", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable()  # others log the errors that are counted, and warn of them
    warnings.simplefilter("ignore")
    store = RESULTS / "reliability.json"
    chosen = [trial for trial in trials(LONG if options.long else SHORT) if trial.part in options.only]
    began = time.monotonic()
    for number, trial in enumerate(chosen, start=1):
        found = json.loads(store.read_text()) if store.exists() else {}
        if options.resume and found.get(trial.part, {}).get(trial.name, {}).get("size") == trial.size:
            continue
        memory = Path("/dev/shm") if trial.part in ("mutations", "flips", "cases", "bases") else ROOT
        with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else ROOT) as name:
            try:
                measured = trial.measure(Path(name))
            except ImportError as error:
                measured = None
                print(f"left out, {error}")
        minutes = (time.monotonic() - began) / 60
        shown = str(measured)[:300]
        print(f"{number} of {len(chosen)}, {minutes:.1f} min: {trial.part}: {trial.name}: {shown}", flush=True)
        if measured is not None and not options.no_page:
            found.setdefault(trial.part, {})[trial.name] = {"size": trial.size, "found": measured}
            store.write_text(json.dumps(found, indent=1) + "\n")
            (RESULTS / "reliability.md").write_text(page(json.loads(store.read_text())))


if __name__ == "__main__":
    main()
