"""One safetensors file: tensors with a description and a checksum over both, read strictly."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

SECTION = "lightning_lora"
SCHEMA = 1
MAX_HEADER_BYTES = 16 * 2**20


class AdapterError(ValueError):
    """An adapter file or checkpoint that cannot be used as it is; the message says what, where and what to do."""


def some(names: list[str]) -> str:
    """Return the first five names as text."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def to_bytes(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> bytes:
    """Return a safetensors file that carries a description and a checksum over it and the tensors.

    The same content gives the same bytes: the header is sorted, which the library leaves to chance.

    Args:
        tensors: By name; they may share memory or be strided.
        description: Plain types only.
    """
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(description, sort_keys=True)
    metadata = {"format": "pt", SECTION: text, f"{SECTION}.checksum": _checksum(text, own)}
    content = safetensors.torch.save(own, metadata)
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:start]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[start:]


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Read a safetensors file and, if it is ours, its description, after checking the checksum.

    Args:
        path: A regular file.

    Returns:
        The tensors by name and the description, which is None for a file that another library wrote.

    Raises:
        AdapterError: If the file is damaged, not finite, of another type, or of a newer schema.
    """
    path = Path(path)
    content, header = _content(path)
    try:
        tensors = dict(sorted(safetensors.torch.load(content).items()))
    except (safetensors.SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise AdapterError(f"{path}: damaged or not a safetensors file: {error}") from None
    description = _description(header.get("__metadata__") or {}, tensors, path)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise AdapterError(
                f"{path}: {name} holds values that are not finite; the run that wrote it had diverged: take an earlier "
                "save"
            )
    return tensors, description


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        AdapterError: If it is no regular file, longer than any of ours, or no JSON object.
    """
    with _regular(path) as file:
        if os.fstat(file.fileno()).st_size > MAX_HEADER_BYTES:
            raise AdapterError(f"{path}: not an adapter's: it is longer than {MAX_HEADER_BYTES} bytes")
        return parse_json(file.read(), path)


def _content(path: Path) -> tuple[bytes, dict[str, Any]]:
    """Read a safetensors file, and its header, at once: what others do to it meanwhile changes nothing.

    A file that is longer or shorter than its header says is refused before the rest is read.
    """
    with _regular(path) as file:
        start = file.read(8)
        header_bytes = int.from_bytes(start, "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise AdapterError(
                f"{path}: not an adapter: its header claims {header_bytes} bytes, at most {MAX_HEADER_BYTES}"
            )
        text = file.read(header_bytes)
        try:
            header = _object(text)
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            said, size = 8 + header_bytes + max(ends, default=0), os.fstat(file.fileno()).st_size
            if said != size:
                raise ValueError(f"it has {size} bytes where its header accounts for {said}")
        except (LookupError, TypeError, ValueError, RecursionError) as error:
            raise AdapterError(f"{path}: damaged or not a safetensors file: {error}") from None
        return start + text + file.read(), header


@contextmanager
def _regular(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file; one that is something else, such as a pipe, is not waited for."""
    try:
        with open(path, "rb", opener=lambda path, flags: os.open(path, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise FileNotFoundError
            yield file
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise AdapterError(f"{path}: no such file; an adapter folder holds adapter_model.safetensors") from None
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read: {error.strerror}") from None


def _description(metadata: Mapping[str, str], tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any] | None:
    """Return the description in a header, None if another library wrote it, after checking the checksum."""
    if not any(name.startswith(SECTION) for name in metadata):
        return None
    text = metadata.get(SECTION, f'{{"schema": {SCHEMA}}}')  # a damaged name: the checksum will not fit
    description = parse_json(text, path)
    schema = description.get("schema")
    if isinstance(schema, bool) or not isinstance(schema, int) or schema > SCHEMA:
        raise AdapterError(
            f"{path}: written by a newer lightning_lora (schema {schema}, this version reads up to {SCHEMA}): upgrade"
        )
    if metadata.get(f"{SECTION}.checksum") != _checksum(text, tensors) or metadata.get("format") != "pt":
        raise AdapterError(
            f"{path}: the checksum does not fit: the file was changed or damaged after it was written: copy or save it "
            "again"
        )
    return description


def parse_json(text: str | bytes, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        AdapterError: If the text is no JSON object.
    """
    try:
        return _object(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: not readable as JSON: {error}") from None
    except TypeError as error:
        raise AdapterError(f"{path}: {error}") from None


def _object(text: str | bytes) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a number")

    value = json.loads(text, parse_constant=refuse, object_pairs_hook=_once)
    if not isinstance(value, dict):
        raise TypeError(f"holds a {type(value).__name__} where an object is expected")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # readers differ in which they take
        again = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{again!r} is in it twice")
    return found


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
