"""One training step beside PEFT's on every kind of model, in every regime, from little to much of everything.

One axis is varied at a time around a centre (LoRA of rank 16, 2 x 256 tokens): not the product of all axes.
"""

from __future__ import annotations

import json
from typing import Any

from bases import bert, convolutions, encoder, gpt2, llama, vit
from contenders import REGIMES, W16, W32, Case, compare
from measuring import RESULTS, draw_ratios, footer, measured_with, options, ratio, table, write
from peers import installed

LAYERS, HIDDEN, HEADS = 2, 256, 8
BASES = {
    "Llama-like, grouped-query": llama(LAYERS, HIDDEN, 688, HEADS, key_heads=2),
    "Llama-like, tied": llama(LAYERS, HIDDEN, 688, HEADS, key_heads=HEADS, tied=True),
    "GPT-2-like": gpt2(LAYERS, HIDDEN, HEADS),
    "BERT-like": bert(LAYERS, HIDDEN, HEADS),
    "ViT-like": vit(LAYERS, HIDDEN, HEADS, patches=256),
    "nn.TransformerEncoder": encoder(LAYERS, HIDDEN, HEADS),
    "convolutions": convolutions(LAYERS, channels=64),
}
CENTRE = "Llama-like, grouped-query"


def on(base: str = CENTRE, **varied: Any) -> Case:
    return Case(base, **{"batch": 2, **varied})


SECTIONS = {
    "Kinds of models and regimes": [on(base, regime=regime) for base in BASES for regime in REGIMES],
    "With dropout 0.1": [on(base, regime=regime, dropout=0.1) for base in BASES for regime in (W32, W16)],
    "Ranks": [on(regime=regime, rank=rank) for regime in (W32, W16) for rank in (4, 16, 64, 256)],
    "Tokens": [
        on(regime=regime, batch=max(1, tokens // 1024), tokens=min(tokens, 1024))
        for regime in (W32, W16)
        for tokens in (16, 64, 256, 1024, 2048, 8192)
    ],
}


def seconds_of(found: dict[str, Any], who: str) -> str:
    """Return a median ratio, or that there is none."""
    return f"{found['ratios'][who][1]:.2f}" if who in found["ratios"] else "does not run"


def page(record: dict[str, Any], asked_for: int) -> str:
    """Return the page of what was measured.

    Args:
        record: What is kept.
        asked_for: How many cases are to be measured in all.
    """
    parts = []
    for title, cases in record["sections"].items():
        rows = []
        for found in cases:
            asked = [found["base"], found["regime"], found["rank"], f"{found['batch']} x {found['tokens']}"]
            who = [one for one in ("floor", "PEFT", "ours") if one in found["counted"]]
            counted = [found["counted"][one] for one in who]
            rows.append(
                [
                    *asked,
                    seconds_of(found, "floor"),
                    ratio(found["ratios"]["ours"], best=True),
                    " / ".join(f"{one['forward']}+{one['backward']}" for one in counted),
                    *(
                        " / ".join(f"{one[what] / 2**20:.1f}" for one in counted)
                        for what in ("kept", "peak", "traffic")
                    ),
                ]
            )
        head = ["model", "regime", "r", "batch x tokens", "floor's time", "our time"]
        head += ["launches", "MiB kept", "MiB at the peak", "MiB of traffic"]
        if rows:
            parts.append(f"## {title}\n\n{table(head, rows)}")
    ran = [found for cases in record["sections"].values() for found in cases if found["failed"]]
    failed = "".join(
        f"- {found['base']}, {found['regime']}: {who}, {error}\n"
        for found in ran
        for who, error in found["failed"].items()
    )
    measured = sum(map(len, record["sections"].values())) + len(record["peers"])
    return f"""# Steps of other models, sizes and regimes beside PEFT's

LoRA on all layers of {LAYERS} blocks of width {HIDDEN} (convolutions: 64 channels). One axis is varied at a time
around a centre of rank 16 and 2 x 256 tokens; the columns are those of [step.md](step.md), and counts stand as floor /
PEFT / ours. Pixels and patches count as tokens. `python benchmarks/models.py` writes this page; {measured} of
{asked_for} cases are on it{", and `--resume` goes on" * (measured < asked_for)}. In half precision the floor of
`nn.TransformerEncoder` is slow because PyTorch's backward copies a frozen matrix for each example there.

![Time of a step beside PEFT's](models.png)

{chr(10).join(parts)}
## Linear layers of other libraries

The same Llama-like model with their layers in the place of PEFT's, all in the same rounds.

{peers_table(record)}
{"Contenders that do not run:" + chr(10) + chr(10) + failed if failed else ""}
{footer(record)}"""


def peers_table(record: dict[str, Any]) -> str:
    """Return the section on other libraries."""
    if all(record["installed"].values()):
        missing = "; ".join(f"{name}: {why}" for name, why in record["installed"].items())
        return f"None is installed here ({missing}).\n"
    names = [name for name, why in record["installed"].items() if not why]
    rows = [
        [found["regime"], *(seconds_of(found, who) for who in ("floor", "ours", *names))] for found in record["peers"]
    ]
    return table(["regime", "floor", "ours", *names], rows)


def main() -> None:
    given = options(
        __doc__, rounds=7, resume={"action": "store_true", "help": "go on behind the last case that is on record"}
    )
    there = installed()
    names = [name for name, why in there.items() if not why]
    record: dict[str, Any] = {"sections": {title: [] for title in SECTIONS}, "peers": [], "installed": there}
    if given.resume:
        record = json.loads((RESULTS / "models.json").read_text())
    todo = [(record["sections"][title], asked, ()) for title, cases in SECTIONS.items() for asked in cases]
    todo += [(record["peers"], on(regime=regime), names) for regime in REGIMES if names]
    done = sum(map(len, record["sections"].values())) + len(record["peers"])
    for into, asked, peers in todo[done:]:
        rounds = min(given.rounds, 3) if asked.batch * asked.tokens > 4096 else given.rounds
        into.append(compare(BASES[asked.base], asked, rounds, peers))
        print(f"{asked.base}, {asked}: {seconds_of(into[-1], 'ours')}", flush=True)
        record |= measured_with(given.remark)
        write("models", record, page(record, len(todo)))
    found = [one for cases in record["sections"].values() for one in cases if one["ratios to"] == "PEFT"]
    draw_ratios("models", {f"{one['base']}, {one['case']}": one["ratios"] for one in found})


if __name__ == "__main__":
    main()
