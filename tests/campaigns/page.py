"""The page of results, from what the campaigns counted."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections import Counter
from collections.abc import Callable
from typing import Any

from campaigns import cases, kills

Found = dict[str, Any]


def table(head: list[str], rows: list[list[Any]]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines)


def page(found: dict[str, dict[str, Any]]) -> str:
    """Return the page.

    Args:
        found: By part and trial, its size and what it found; parts that are not there are left out.
    """
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
        "## Goals",
        table(["goal", "this library", "others"], goals(found)),
    ]
    for part, write in SECTIONS.items():
        if part in found:
            sizes = {name: one["size"] for name, one in found[part].items()}
            parts += write({name: one["found"] for name, one in found[part].items()}, sizes)
    return "\n\n".join(parts) + "\n"


def goals(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return a row for each goal; what a test shows and no campaign counts names the test."""
    of = {part: {name: one["found"] for name, one in each.items()} for part, each in found.items()}
    rows: list[list[str]] = []
    if "kills" in of:
        lost = {name: (one["lost"] + one["torn"], one["kills"]) for name, one in of["kills"].items()}
        ours = [lost[name] for name in kills.OURS if name in lost]
        others = [f"{name}: {n} of {k} ({n / k:.0%})" for name, (n, k) in lost.items() if name not in kills.OURS and n]
        total = f"{sum(n for n, _ in ours)} of {sum(k for _, k in ours)}"
        rows.append(["killed inside a save: lost or torn", total, "; ".join(others)])
    if "disks" in of:
        kinds = {name.partition(": ")[0] for name in of["disks"]}
        broken = {name for name, (state, _) in of["disks"].items() if state == "lost"}
        mine = [name for name in broken if name.partition(": ")[2] in kills.OURS]
        others = sorted({name.partition(": ")[2] for name in broken} - set(kills.OURS))
        rows.append(["no room: the old copy is lost", f"{len(mine)} on {', '.join(sorted(kinds))}", "; ".join(others)])
    if "mutations" in of:
        cells = []
        for who in ("ours", "PEFT"):
            counted: Counter[str] = Counter()
            for name, one in of["mutations"].items():
                if name.startswith(who) and "signed" not in name:
                    counted.update(one)
            classes = {name for name in counted if name not in ("exact", "silent", "AdapterError")}
            foreign = sum(counted[name] for name in classes)
            cells.append(
                f"{counted['silent']} / {foreign} of {counted.total()}"
                + (f", {len(classes)} classes" if classes else "")
            )
        rows.append(["changed folders: silently wrong / other errors than the documented one", *cells])
    if "cases" in of:
        rows.append(["damage of known kinds, one by one: silently wrong", *_silent_cases(of["cases"])])
    if "flips" in of:
        shares = {who: f"{seen} of {total}" for who, (seen, total) in of["flips"].items()}
        rows.append(["bits flipped in a small adapter: seen", shares.get("ours", ""), shares.get("PEFT", "")])
    if "bases" in of:
        size = sum(one["size"] for one in found["bases"].values())
        seen = {
            reader: sum(one.get(reader, 0) for one in of["bases"].values())
            for reader in next(iter(of["bases"].values()))
        }
        full = seen["ours, fingerprint='full'"]
        mine = f"{seen['ours']} of {size}; with fingerprint='full' {full}"
        rows.append(["other bases of the same shapes: refused", mine, f"PEFT: {seen.get('PEFT', '')}"])
    if "signals" in of:
        cells = []
        for who in ("ours", "Lightning"):
            one = of["signals"].get(who, [])
            good = sum(o["saved"] is not None and o["steps"] == [o["saved"]] * 2 for o in one)
            cells.append(f"{good} of {len(one)}, {sum(None in o['codes'] for o in one)} hung")
        rows.append(["SIGTERM to both ranks, to one: saved, and all gone in time", cells[0], f"Lightning: {cells[1]}"])
    rows.append(
        [
            "a resumed run is bit for bit the uninterrupted one",
            "tests/test_exact_resume.py, test_preempted_ranks.py",
            "",
        ]
    )
    if "merges" in of:
        changed = {who: max(v[0] for k, v in of["merges"].items() if k.startswith(who)) for who in ("ours", "PEFT")}
        rows.append(
            ["100 merges and unmerges: weights changed, at most", *(f"{changed[who]:.1%}" for who in ("ours", "PEFT"))]
        )
    if "kills" in of:
        left = {name: one["left_after"] for name, one in of["kills"].items()}
        others = [f"{name}: {n}" for name, n in left.items() if n and name not in kills.OURS]
        mine = str(sum(left.get(name, 0) for name in kills.OURS))
        rows.append(["files that kills left, after the next save", mine, "; ".join(others)])
    rows.append(
        [
            "adapters that learn nothing without a word",
            "tests/test_callback.py, test_optim.py, test_traps.py: raised",
            "",
        ]
    )
    if "modes" in of:
        modes = of["modes"]["modes"]
        cells = [", ".join(modes[who]) for who in ("ours", "safetensors `save_file`")]
        rows.append([f"mode of a file under umask {', '.join(modes['umask'])}", cells[0], f"safetensors: {cells[1]}"])
    return rows


def _silent_cases(of: Found) -> list[str]:
    cells = []
    for who in ("ours, of ours", "PEFT"):
        mine = [one[0] for name, one in of.items() if name.startswith(f"{who}: ")]
        silent, hung = (sum(what.startswith(kind) for what in mine) for kind in ("silent", "hangs"))
        classes = len({what for what in mine if what.startswith("error")})
        cells.append(f"{silent} of {len(mine)}, {hung} hang, errors of {classes} classes")
    return cells


def _kills(found: Found, sizes: dict[str, int]) -> list[str]:
    columns = ("mebibytes", "lost", "torn", "left", "left_after")
    rows = [[name, f"{one['kills']} ({one['inside']})", *(one[c] for c in columns)] for name, one in found.items()]
    return [
        "## Killed inside a save",
        "SIGKILL at a random moment of a save over a good artefact. Each save writes its number into all tensors and, "
        "where there is one, into the config: *lost* cannot be read, *torn* has two numbers. *Left behind* counts "
        "temporary files and folders of killed saves, and *after the next save* those that one more save did not "
        "sweep. Power loss is not simulated.",
        table(["writer", "kills (inside a save)", "MiB", "lost", "torn", "left behind", "after the next save"], rows),
    ]


def _disks(found: Found, sizes: dict[str, int]) -> list[str]:
    kinds = list(dict.fromkeys(name.partition(": ")[0] for name in found))
    writers = dict.fromkeys(name.partition(": ")[2] for name in found)
    rows = []
    for writer in writers:
        each = [found.get(f"{kind}: {writer}", ["", ""]) for kind in kinds]
        rows.append([writer, *(one[0] for one in each), each[0][1].replace("|", " ")[:160]])
    return [
        "## No room",
        "A save over a good artefact of 16 MiB where 1 MiB is free, of 32 MiB where the content can grow: is the old "
        f"one still there, and what is said (on {kinds[0]})?",
        table(["writer", *kinds, "said"], rows),
    ]


def _mutations(found: Found, sizes: dict[str, int]) -> list[str]:
    rows = []
    for name, one in found.items():
        who, _, kind = name.partition(": ")
        if kind == "signed values":
            continue
        known = {"exact", "silent"} | ({"AdapterError"} if who == "ours" else set())
        others = {error: n for error, n in one.items() if error not in known}
        classes = ", ".join(f"{error} {n}" for error, n in Counter(others).most_common())
        counts = [one.get(what, 0) for what in ("AdapterError", "exact", "silent")]
        rows.append(
            [kind, who, sum(one.values()), *counts, f"{sum(others.values())}" + (f" ({classes})" if classes else "")]
        )
    signed = found.get("ours: signed values", {})
    foreign = sum(n for name, n in signed.items() if name not in ("AdapterError", "exact", "silent"))
    return [
        "## Changed folders",
        "A small adapter folder with bytes or values changed at random. *Exact*: it loads and gives the output that "
        "was saved, bit for bit. *Silent*: it loads and gives another.",
        table(["changed", "reader", "folders", "AdapterError", "exact", "silent", "other errors"], rows),
        f"Of {sum(signed.values())} more whose description was changed and signed anew, so that the checksum is right "
        f"and other outputs are what the file says, {foreign} ended in another error than AdapterError.",
    ]


def _cases(found: Found, sizes: dict[str, int]) -> list[str]:
    readers = ("ours, of ours", "ours, of PEFT's", "PEFT")
    rows, bounds = [], []
    for case in (*cases.CASES, cases.OTHER_BASE):
        each = [found.get(f"{reader}: {case}", ["", 0.0, 0.0]) for reader in readers]
        rows.append([case, *(one[0] for one in each)])
        if case in cases.HEADERS:
            bounds.append([case, *(f"{one[1]:.0f} ms, {one[2]:.1f} MiB" for one in each[1:])])
    return [
        "## Damage of known kinds",
        "What comes of a load: of a folder that this library wrote, and of one without description and checksum, as "
        "PEFT writes them, which cannot show all of it.",
        table(["damage", *readers], rows),
        "How long it takes until a file that cannot be is refused, and by how much the process grows, best of three:",
        table(["damage", "ours", "PEFT"], bounds),
    ]


def _bases(found: Found, sizes: dict[str, int]) -> list[str]:
    readers = list(next(iter(found.values())))
    return [
        "## Other bases of the same shapes",
        "How many of them are refused. By default 4,096 values of each adapted weight are looked at, rounded to bf16.",
        table(
            ["base", "bases", *readers], [[k, sizes[k], *(one.get(r, "") for r in readers)] for k, one in found.items()]
        ),
    ]


def _flips(found: Found, sizes: dict[str, int]) -> list[str]:
    rows = [[who, total, seen, f"{seen / total:.2%}"] for who, (seen, total) in found.items()]
    text = "Single bits of a small adapter's weights file."
    return ["## Flipped bits", text, table(["reader", "flipped", "seen", "share"], rows)]


def _merges(found: Found, sizes: dict[str, int]) -> list[str]:
    rows = [[*name.split(": "), f"{one[0]:.2%}", f"{one[1]:.1e}" if one[1] else "0"] for name, one in found.items()]
    text = "Weights of the base that are not what they were, and the error relative to their norm."
    return ["## Merged and unmerged a hundred times", text, table(["library", "dtype", "changed", "error"], rows)]


def _signals(found: Found, sizes: dict[str, int]) -> list[str]:
    rows = []
    for who, outcomes in found.items():
        for target in dict.fromkeys(one["target"] for one in outcomes):
            some = [one for one in outcomes if one["target"] == target]
            good = sum(o["saved"] is not None and o["steps"] == [o["saved"]] * 2 for o in some)
            hung, none = sum(None in o["codes"] for o in some), sum(o["saved"] is None for o in some)
            rows.append([who, target, len(some), good, hung, none])
    head = ["handler", "target", "signals", "saved, and both ranks left at that step", "hung", "nothing saved"]
    text = (
        "SIGTERM at a random moment to two ranks under DDP; 30 seconds later those that are there still count as hung."
    )
    return ["## Signals", text, table(head, rows)]


SECTIONS: dict[str, Callable[[Found, dict[str, int]], list[str]]] = {
    "kills": _kills,
    "disks": _disks,
    "mutations": _mutations,
    "cases": _cases,
    "bases": _bases,
    "flips": _flips,
    "merges": _merges,
    "signals": _signals,
}
