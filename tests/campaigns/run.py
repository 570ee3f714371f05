"""Run the campaigns, print their figures, and write ``benchmarks/results/reliability.md``.

``python tests/campaigns/run.py`` takes a few minutes, with ``--long`` about an hour; ``--only kills`` measures one part
and keeps the rest of the page.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import platform
import sys
import tempfile
import time
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from campaigns import disks, kills, merges, mutations  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
SHORT = {"kills": 20, "mutations": 1000, "peft mutations": 100, "flips": 7, "peft flips": 61, "cycles": 100}
LONG = {"kills": 1000, "mutations": 25000, "peft mutations": 1000, "flips": 1, "peft flips": 8, "cycles": 100}


def run_kills(size: dict[str, int], base: Path) -> dict[str, Any]:
    found = {}
    for name, make in {**kills.OURS, **kills.ANCHORS}.items():
        start = time.perf_counter()
        try:
            writer = make()
        except ImportError as error:
            print(f"kills: {name}: left out, {error}")
            continue
        where = base / "run"
        where.mkdir()
        if writer.elsewhere and kills.other_file_system(where) is None:
            print(f"kills: {name}: left out, there is no other file system")
            continue
        counted = kills.measure(writer, size["kills"], where)
        found[name] = {**counted._asdict(), "seconds": round(time.perf_counter() - start)}
        print(f"kills: {name}: {found[name]}", flush=True)
        for path in sorted(where.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        where.rmdir()
    return found


def run_disks(size: dict[str, int], base: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in disks.KINDS:
        for name, make in {**kills.OURS, **kills.ANCHORS}.items():
            with disks.mounted(kind) as place:
                if place is None:
                    print(f"disks: {kind}: left out, it cannot be mounted here")
                    break
                try:
                    found.setdefault(name, {})[kind] = disks.measure(make(), place)
                except ImportError:
                    continue
            print(f"disks: {kind}: {name}: {found[name][kind]}", flush=True)
    return found


def run_mutations(size: dict[str, int], base: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"ours": {}, "PEFT": {}}
    for kind in mutations.KINDS:
        found["ours"][kind] = mutations.measure(mutations.ours, kind, size["mutations"], base / "adapter")
        print(f"mutations: ours: {kind}: {dict(found['ours'][kind])}", flush=True)
    signed = mutations.measure(mutations.ours, "signed values", size["mutations"], base / "adapter")
    print(f"mutations: ours: signed values: {dict(signed)}", flush=True)
    found["signed"] = signed
    for kind in mutations.KINDS:
        try:
            found["PEFT"][kind] = mutations.measure(mutations.by_peft, kind, size["peft mutations"], base / "adapter")
        except ImportError:
            break
        print(f"mutations: PEFT: {kind}: {dict(found['PEFT'][kind])}", flush=True)
    return found


def run_flips(size: dict[str, int], base: Path) -> dict[str, Any]:
    found = {"ours": mutations.flip(mutations.ours, size["flips"], base / "adapter")}
    with suppress(ImportError):
        found["PEFT"] = mutations.flip(mutations.by_peft, size["peft flips"], base / "adapter")
    print(f"flips: {found}", flush=True)
    return found


def run_merges(size: dict[str, int], base: Path) -> dict[str, Any]:
    found = {}
    for name, cycle in {"ours": merges.ours, "PEFT": merges.by_peft}.items():
        try:
            found[name] = {str(dtype).removeprefix("torch."): cycle(dtype, size["cycles"]) for dtype in merges.DTYPES}
        except ImportError:
            continue
        print(f"merges: {name}: {found[name]}", flush=True)
    return found


PARTS = {"kills": run_kills, "disks": run_disks, "mutations": run_mutations, "flips": run_flips, "merges": run_merges}


def table(head: list[str], rows: list[list[Any]]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines)


def page(found: dict[str, Any]) -> str:
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("torch", "lightning", "safetensors", "peft", "transformers")
        if any(one.metadata["Name"] == name for one in importlib.metadata.distributions())
    )
    parts = [
        "# Reliability, measured",
        "What is promised is in [docs/reliability.md](../../docs/reliability.md). These are counts of the campaigns in "
        "`tests/campaigns/`, which measure this library and others with the same driver; `python "
        "tests/campaigns/run.py --long` writes this page. Moments and changes are drawn from fixed seeds, but what a "
        "kill hits depends on the machine.",
        f"Measured with Python {platform.python_version()}, {versions}, on {os.cpu_count()} cores "
        f"({platform.machine()}) that other work shared.",
    ]
    if "kills" in found:
        rows = [
            [name, f"{one['kills']} ({one['inside']})", one["lost"], one["torn"], one["left"], one["left_after"]]
            for name, one in found["kills"].items()
        ]
        head = ["writer", "kills (inside a save)", "lost", "torn", "left behind", "after the next save"]
        parts += [
            "## Killed inside a save",
            "SIGKILL at a random moment of a save of 16 MiB over a good artefact. Each save writes its number into all "
            "tensors and, where there is one, into the config: *lost* cannot be read, *torn* has two numbers. *Left "
            "behind* counts temporary files and folders of killed saves, and *after the next save* those that one more "
            "save did not sweep. Power loss is not simulated.",
            table(head, rows),
        ]
    if "disks" in found:
        kinds = [kind for kind in disks.KINDS if any(kind in one for one in found["disks"].values())]
        rows = [
            [name, *(one.get(kind, ["", ""])[0] for kind in kinds), one[kinds[0]][1].replace("|", " ")[:160]]
            for name, one in found["disks"].items()
        ]
        parts += [
            "## No room",
            "A save over a good artefact of 16 MiB where 1 MiB is free, of 32 MiB where the content can grow: is "
            f"the old one still there, and what is said (on {kinds[0]})?",
            table(["writer", *kinds, "said"], rows),
        ]
    if "mutations" in found:
        rows = []
        for who in ("ours", "PEFT"):
            for kind, one in found["mutations"][who].items():
                known = {"AdapterError"} if who == "ours" else set()
                others = {name: n for name, n in one.items() if name not in ("exact", "silent", *known)}
                classes = ", ".join(f"{name} {n}" for name, n in Counter(others).most_common())
                rows.append(
                    [
                        kind,
                        who,
                        sum(one.values()),
                        one.get("AdapterError", 0),
                        one.get("exact", 0),
                        one.get("silent", 0),
                        f"{sum(others.values())}" + (f" ({classes})" if classes else ""),
                    ]
                )
        signed = found["mutations"]["signed"]
        foreign = sum(n for name, n in signed.items() if name not in ("AdapterError", "exact", "silent"))
        parts += [
            "## Changed folders",
            "A small adapter folder with bytes or values changed at random. *Exact*: it loads and gives the output "
            "that was saved, bit for bit. *Silent*: it loads and gives another.",
            table(["changed", "reader", "folders", "AdapterError", "exact", "silent", "other errors"], rows),
            f"Of {sum(signed.values())} more whose description was changed and signed anew, so that the "
            "checksum is right and other outputs are what the file says, "
            f"{foreign} ended in another error than AdapterError.",
        ]
    if "flips" in found:
        rows = [[who, total, seen, f"{seen / total:.2%}"] for who, (seen, total) in found["flips"].items()]
        parts += [
            "## Flipped bits",
            "Single bits of a small adapter's weights file.",
            table(["reader", "flipped", "seen", "share"], rows),
        ]
    if "merges" in found:
        rows = [
            [who, dtype, f"{one[0]:.2%}", f"{one[1]:.1e}" if one[1] else "0"]
            for who, each in found["merges"].items()
            for dtype, one in each.items()
        ]
        parts += [
            "## Merged and unmerged a hundred times",
            "Weights of the base that are not what they were, and the error relative to their norm.",
            table(["library", "dtype", "changed", "error"], rows),
        ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--kills", type=int, help="of each writer")
    parser.add_argument("--no_page", action="store_true", help="print only")
    options = parser.parse_args()
    size = (LONG if options.long else SHORT) | ({"kills": options.kills} if options.kills else {})
    torch.set_num_threads(1)
    logging.disable()  # others log the errors that are counted, and warn of them
    warnings.simplefilter("ignore")
    store = RESULTS / "reliability.json"
    for part in options.only:
        memory = Path("/dev/shm") if part in ("mutations", "flips") else ROOT
        with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else ROOT) as name:
            measured = PARTS[part](size, Path(name))
        if not options.no_page:
            found = (json.loads(store.read_text()) if store.exists() else {}) | {part: measured}
            store.write_text(json.dumps(found, indent=1) + "\n")
            (RESULTS / "reliability.md").write_text(page(json.loads(store.read_text())))


if __name__ == "__main__":
    main()
