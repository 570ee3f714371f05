"""Makes data/{train,validation,test}.tsv from Debian package metadata.

Reads the text of an apt `Packages` index and keeps one binary package per source package, so that no source package
is in two splits:

    apt-get update
    apt-cache dumpavail | python examples/debian_sections/make_data.py

Rows are ordered by a hash of the seed and the source package's name: the same index gives the same files, and a newer
index changes few rows.
"""

import argparse
import csv
import hashlib
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

SECTIONS = (
    "admin",
    "database",
    "editors",
    "electronics",
    "games",
    "graphics",
    "hamradio",
    "mail",
    "math",
    "net",
    "science",
    "sound",
    "text",
    "video",
)
SPLITS = {"train": 2000, "validation": 500, "test": 1000}
PLACEHOLDER = re.compile(r"\b(transitional|dummy|metapackage|meta-package|debug(ging)? symbols)\b", re.IGNORECASE)


def read_index(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """Yields the fields of each paragraph of a `Packages` index (first lines only; that is where a synopsis is)."""
    fields: dict[str, str] = {}
    for line in lines:
        if not line.strip():
            if fields:
                yield fields
            fields = {}
        elif not line[0].isspace():
            name, _, value = line.partition(":")
            fields[name] = value.strip()
    if fields:
        yield fields


def one_per_source(packages: Iterable[dict[str, str]]) -> dict[str, tuple[str, str]]:
    """Picks each source package's main binary package among those of the wanted sections.

    Args:
        packages: Paragraphs of the index.

    Returns:
        Section and synopsis by source package.
    """
    best: dict[str, tuple[tuple, str, str]] = {}
    for package in packages:
        name, section, synopsis = package["Package"], package.get("Section"), package.get("Description", "")
        source = package.get("Source", name).split()[0]
        if section not in SECTIONS or not synopsis or "\t" in synopsis or PLACEHOLDER.search(synopsis):
            continue
        rank = (name != source, len(name), name)  # the namesake of the source, else the shortest name
        if source not in best or rank < best[source][0]:
            best[source] = (rank, section, synopsis)
    return {source: (section, synopsis) for source, (_, section, synopsis) in best.items()}


def same_text(synopsis: str) -> str:
    """Key under which two synopses count as the same: letters and digits only, without parenthesised remarks."""
    return re.sub(r"[\W_]+", "", re.sub(r"\(.*?\)", "", synopsis).casefold()) or synopsis


def select(by_source: dict[str, tuple[str, str]], seed: int) -> list[tuple[str, str, str]]:
    """Orders the rows (section, synopsis, source) by a seeded hash and drops repeated synopses."""
    rows: dict[str, tuple[str, str, str]] = {}
    for source in sorted(by_source, key=lambda s: hashlib.sha256(f"{seed}:{s}".encode()).digest()):
        section, synopsis = by_source[source]
        rows.setdefault(same_text(synopsis), (section, synopsis, source))
    return list(rows.values())


def main() -> None:
    """Reads the index from standard input and writes the three files."""
    parser = argparse.ArgumentParser(description="Makes the Debian sections data from `apt-cache dumpavail`.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rows = select(one_per_source(read_index(sys.stdin)), args.seed)
    if len(rows) < sum(SPLITS.values()):
        parser.error(f"only {len(rows)} usable source packages; was this the index of a whole Debian release?")
    args.out.mkdir(parents=True, exist_ok=True)
    start = 0
    for split, size in SPLITS.items():
        with open(args.out / f"{split}.tsv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None, lineterminator="\n")
            writer.writerow(("section", "synopsis", "source"))
            writer.writerows(sorted(rows[start : start + size], key=lambda row: row[2]))
        start += size


if __name__ == "__main__":
    main()
