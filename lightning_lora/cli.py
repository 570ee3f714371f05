"""The command line ``lightning-lora``: inspect, merge, export, methods."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from lightning_lora import offline
from lightning_lora.method import known_methods
from lightning_lora.version import __version__


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: What follows the program's name; None takes it from the system.

    Returns:
        The exit code: 0, 1 for a file or value that cannot be used, 2 (raised by the parser) for a wrong command line.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 2
    try:
        return _COMMANDS[options.command](options[options.command])
    except (ValueError, OSError) as error:
        print(f"lightning-lora {options.command}: {error}", file=sys.stderr)
        return 1


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="lightning-lora",
        description="Look at, merge and export adapters that lightning_lora or PEFT wrote; no model class is needed.",
        version=__version__,
    )
    commands = parser.add_subcommands(required=False, dest="command")
    parsers: dict[str, ArgumentParser] = {}
    for name, text in (
        ("inspect", "show the method, and per matrix its rank, scale, norm of the change and effective rank"),
        ("merge", "write a copy of a base's weights with the adapters merged in"),
        ("export", "write the portable form: one rank, scale folded in, full names; all readers compute it alike"),
        ("methods", "list the known methods with their options"),
    ):
        parsers[name] = ArgumentParser(description=f"{text[0].upper()}{text[1:]}.")
        commands.add_subcommand(name, parsers[name], help=text)
    for name in ("inspect", "merge", "export"):
        parsers[name].add_argument("adapter", type=Path, help="the adapter folder, such as best.adapter")
    parsers["merge"].add_argument(
        "--into",
        type=Path,
        required=True,
        help="the base: a .ckpt, .pt, .bin or .safetensors file, or a folder of these",
    )
    parsers["merge"].add_argument("--out", type=Path, required=True, help="a new file, or a folder to write into")
    parsers["merge"].add_argument(
        "--allow_base_mismatch", action="store_true", help="merge although the base is not the one trained on"
    )
    parsers["export"].add_argument("--out", type=Path, required=True, help="the folder to write; it must not exist")
    return parser


def _inspect(options: Namespace) -> int:
    for file, rows in offline.inspect(options.adapter):
        first = next(iter(file.methods.values()))
        print(f"{file.path}: {type(first).__name__}, {len(rows)} matrices, network {file.root or '(whole model)'}")
        width = max(len(row.site) for row in rows)
        print(f"{'site':{width}}  {'shape':>13}  {'r':>4}  {'alpha':>6}  {'norm':>10}  {'effective rank':>14}")
        for row in rows:
            print(
                f"{row.site:{width}}  {row.shape:>13}  {row.r:>4}  {row.alpha:>6g}  {row.norm:>10.4g}  "
                f"{row.effective_rank:>14.2f}"
            )
        if file.full:
            print(f"trained in full: {', '.join(sorted(file.full))}")
        known = sum(base is not None for base in file.bases.values())
        print(f"base fingerprint: {known} of {len(rows)} matrices; checksum of the file: ", end="")
        print("verified" if file.root is not None else "none, another library wrote it")
    return 0


def _merge(options: Namespace) -> int:
    for path in offline.merge(
        options.adapter, options.into, options.out, allow_base_mismatch=options.allow_base_mismatch
    ):
        print(f"wrote {path}")
    return 0


def _export(options: Namespace) -> int:
    for note in offline.export(options.adapter, options.out):
        print(f"note: {note}", file=sys.stderr)
    print(f"wrote {options.out}")
    return 0


def _methods(options: Namespace) -> int:
    for name, method in known_methods().items():
        print(f"{name}: {(method.__doc__ or '').strip().splitlines()[0]}")
        for field in dataclasses.fields(method):  # type: ignore[arg-type]
            print(f"  {field.name} = {field.default!r}")
    return 0


_COMMANDS = {"inspect": _inspect, "merge": _merge, "export": _export, "methods": _methods}
