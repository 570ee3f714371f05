"""Damage adapter folders in the ways that happen, load each in a process of its own, and note what comes of it.

There are folders that this library wrote and the same as PEFT writes them, without description and checksum.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from campaigns import mutations
from campaigns.mutations import BASE, CONFIG, WEIGHTS, X
from lightning_lora import LoRA, inject, load_adapter, save_adapter
from lightning_lora.files import read_tensors

SECONDS = 20  # until a load counts as one that hangs
MiB = 2**20


def at(start: int, end: int, name: str = "a") -> str:
    return f'"{name}": ' + json.dumps({"dtype": "F32", "shape": [(end - start) // 4], "data_offsets": [start, end]})


def header(text: str | bytes, tail: bytes = b"", claims: int | None = None) -> bytes:
    text = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(text) if claims is None else claims) + text + tail


def tensors(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], object]:
    """Return what rewrites the tensors of a folder and leaves the header's metadata as they were."""

    def act(folder: Path) -> None:
        with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
            metadata = file.metadata()
        changed = change(safetensors.torch.load_file(folder / WEIGHTS))
        content = safetensors.torch.save({name: value.contiguous() for name, value in changed.items()}, metadata)
        (folder / WEIGHTS).write_bytes(content)

    return act


def config(**fields: Any) -> Callable[[Path], object]:
    """Return what gives the config other fields; None takes one out."""

    def act(folder: Path) -> None:
        held = json.loads((folder / CONFIG).read_text()) | fields
        (folder / CONFIG).write_text(json.dumps({name: value for name, value in held.items() if value is not None}))

    return act


def text(content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / CONFIG).write_text(content)


def weights(content: Callable[[], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / WEIGHTS).write_bytes(content())


class Evil:
    """Writes a file where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("canary", "w")


def only_a_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil()))


def through_a_link(folder: Path) -> None:
    shutil.move(folder / WEIGHTS, folder.parent / "elsewhere")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere")


CASES: dict[str, Callable[[Path], object]] = {
    "nothing": lambda folder: None,
    "one tensor missing": tensors(lambda t: dict(list(t.items())[1:])),
    "all tensors renamed": tensors(lambda t: {name.replace("model.", "model.inner."): v for name, v in t.items()}),
    "no tensors": tensors(lambda t: {}),
    "a tensor more": tensors(lambda t: t | {"base_model.model.7.lora_A.weight": torch.zeros(2, 4)}),
    "NaN in a tensor": tensors(lambda t: {name: value * float("nan") for name, value in t.items()}),
    "tensors of int8": tensors(lambda t: {name: value.to(torch.int8) for name, value in t.items()}),
    "one value changed": tensors(lambda t: {name: value + 0.1 for name, value in t.items()}),
    "another rank than the config's": tensors(
        lambda t: {name: value[:1] if "_A" in name else value[:, :1] for name, value in t.items()}
    ),
    "alpha changed in the config": config(lora_alpha=64),
    "no alpha in the config": config(lora_alpha=None),
    "alpha is NaN": config(lora_alpha=float("nan")),
    "alpha is text": config(lora_alpha="16"),
    "r is 4.0": config(r=4.0),
    "r is -4": config(r=-4),
    "r is a billion": config(r=10**9),
    "a field of a later version": config(use_quantum=True),
    "an unknown type": config(peft_type="QLORA2"),
    "a pattern of exponential time": config(target_modules="(([a-z0-9])+.)+[A-Z]([a-z])+$|(a+)+b"),
    "a list as config": text("[]"),
    "half a config": text('{"peft_type": "LORA", "r'),
    "a config nested without end": text("[" * 100_000),
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "weights cut short": lambda folder: os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 10),
    "a pickle": only_a_pickle,
    "weights through a link": through_a_link,
    "a header of 2 ** 63 bytes": weights(lambda: header("{}", claims=2**63)),
    "a header of 99 MB": weights(lambda: header(b'{"a":"' + b" " * (99 * 10**6) + b'"}')),
    "a name twice in the header": weights(lambda: header(f"{{{at(0, 4)}, {at(4, 8)}}}", bytes(8))),
    "a hole between tensors": weights(lambda: header(f"{{{at(0, 4)}, {at(8, 12, 'b')}}}", bytes(12))),
    "tensors in one place": weights(lambda: header(f"{{{at(0, 8)}, {at(4, 12, 'b')}}}", bytes(12))),
    "256 MB that belong to nothing": weights(lambda: header(f"{{{at(0, 4)}}}", bytes(2**28))),
    "a config of 99 MB": text('{"r": "' + " " * (99 * 10**6) + '"}'),
}
OTHER_BASE = "another base of the same shapes"
HEADERS = tuple(name for name in CASES if "header" in name or "99 MB" in name or "256" in name or "tensors in" in name)


class Came(NamedTuple):
    """What came of a load."""

    what: str
    milliseconds: float
    mebibytes: float  # by which the process grew


def measure(load: Callable[[nn.Module, Path], Tensor], case: str, ours: bool, where: Path) -> Came:
    """Damage a folder and load it.

    Args:
        load: Puts the folder's adapter into a base and returns its output.
        case: One of the cases.
        ours: Whether the folder has our description and checksum.
        where: An empty folder to work in.
    """
    torch.manual_seed(0)
    folder = where / "adapter"
    expected = mutations.saved(folder)
    if not ours:
        safetensors.torch.save_file(read_tensors(folder / WEIGHTS)[0], folder / WEIGHTS, {"format": "pt"})
    good = shutil.copytree(folder, where / "good")
    load(copy.deepcopy(BASE), good)  # here, so that packages are imported
    CASES.get(case, CASES["nothing"])(folder)
    base = copy.deepcopy(BASE)
    if case == OTHER_BASE:
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.add_(0.1)
    plain = base(X).detach()
    came = [_in_a_child(load, base, folder, good, expected, plain) for _ in range(3)]
    shutil.rmtree(where)
    where.mkdir()
    return Came(came[0].what, min(one.milliseconds for one in came), min(one.mebibytes for one in came))


def _in_a_child(
    load: Callable[[nn.Module, Path], Tensor], base: nn.Module, folder: Path, good: Path, *outputs: Tensor
) -> Came:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        load(copy.deepcopy(BASE), good)  # so that what a fork copies is there
        before, start = _resident(), time.perf_counter()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            what = _outcome(lambda: load(copy.deepcopy(base), folder), *outputs)
        seconds = time.perf_counter() - start
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        what += ", with a warning" if said and not what.startswith(("error", "exact")) else ""
        os.write(writer, json.dumps([what, 1e3 * seconds, max(0, grown) / MiB]).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as file:
        answer = file.read()
    os.waitpid(child, 0)
    return Came(*json.loads(answer)) if answer else Came(f"hangs (stopped after {SECONDS} s)", 1e3 * SECONDS, 0)


def _outcome(load: Callable[[], Tensor], expected: Tensor, plain: Tensor) -> str:
    try:
        output = load()
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        return f"error: {type(error).__name__}"
    if torch.equal(output, expected):
        return "exact"
    if not output.isfinite().all():
        return "silent: NaN"
    return "silent: the base's output" if torch.equal(output, plain) else "silent: another output"


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def ours(base: nn.Module, folder: Path) -> Tensor:
    load_adapter(base, folder)
    return base(X).detach()


def by_peft(base: nn.Module, folder: Path) -> Tensor:
    from peft import PeftModel

    return PeftModel.from_pretrained(base, folder)(X).detach()


# ---- other bases


def larger() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(4, 128), nn.LayerNorm(128), nn.Linear(128, 128), nn.Linear(128, 3))


def noisy(relative: float, names: tuple[str, ...] = ("0.weight", "2.weight")) -> Callable[[nn.Module, int], None]:
    def act(model: nn.Module, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name in names:
            weight = model.get_parameter(name)
            weight.mul_(1 + relative * torch.randn(weight.shape, generator=generator))

    return act


def one_value(name: str) -> Callable[[nn.Module, int], None]:
    def act(model: nn.Module, seed: int) -> None:
        flat = model.get_parameter(name).view(-1)
        flat[seed * 7919 % len(flat)] += 0.1

    return act


BASES: dict[str, Callable[[nn.Module, int], None]] = {
    "drawn anew": noisy(1.0),
    "tuned: each weight by 1 %": noisy(1e-2),
    "tuned: each weight by 0.01 %": noisy(1e-4),
    "one adapted layer by 1 %": noisy(1e-2, ("2.weight",)),
    "a layer without adapters by 1 %": noisy(1e-2, ("3.weight",)),
    "one value of an adapted layer": one_value("2.weight"),
    "one value of another layer": one_value("1.weight"),
}


def other_bases(kind: str, count: int, where: Path) -> dict[str, int]:
    """Return of how many other bases a load was refused, by reader.

    Args:
        kind: How they differ from the base that was trained on.
        count: How many.
        where: An empty folder to work in.
    """
    model = larger()
    inject(model, LoRA(r=2), ["0", "2"], seed=0)
    for fingerprint in ("sampled", "full"):
        save_adapter(model, where / fingerprint, fingerprint=fingerprint)
    readers: dict[str, Callable[[nn.Module], object]] = {
        "ours": lambda base: load_adapter(base, where / "sampled"),
        "ours, fingerprint='full'": lambda base: load_adapter(base, where / "full"),
        "PEFT": lambda base: _peft_model(base, where / "sampled"),
    }
    found = dict.fromkeys(readers, 0)
    for seed in range(count):
        base = larger()
        with torch.no_grad():
            BASES[kind](base, seed)
        for name, read in readers.items():
            try:
                read(copy.deepcopy(base))
            except ImportError:
                found.pop(name, None)
            except Exception:  # it was seen
                found[name] += 1
    return found


def _peft_model(base: nn.Module, folder: Path) -> nn.Module:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base, folder)


def modes(where: Path) -> dict[str, list[str]]:
    """Return the modes of what is written under three umasks, by writer."""
    model = copy.deepcopy(BASE)
    inject(model, LoRA(r=2), ["0"], seed=0)
    found: dict[str, list[str]] = {"umask": [], "ours": [], "safetensors `save_file`": []}
    for umask in (0o022, 0o077, 0o002):
        before = os.umask(umask)
        try:
            save_adapter(model, where / f"{umask}" / "adapter")
            safetensors.torch.save_file({"a": torch.zeros(1)}, where / f"{umask}" / "a.safetensors")
        finally:
            os.umask(before)
        found["umask"].append(f"{umask:04o}")
        paths = (where / f"{umask}" / "adapter" / WEIGHTS, where / f"{umask}" / "a.safetensors")
        for name, path in zip(("ours", "safetensors `save_file`"), paths, strict=True):
            found[name].append(f"{path.stat().st_mode & 0o777:04o}")
    return found
