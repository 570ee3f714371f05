"""One safetensors file: tensors with a description and a checksum over both, read strictly."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lightning_lora.layout import whole_number

SECTION = "lightning_lora"
SCHEMA = 1
MAX_HEADER_BYTES = 16 * 2**20
_DTYPES = {  # by their names in safetensors files
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


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
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(description, sort_keys=True)
    fields: dict[str, Any] = {}
    end = 0
    in_order = sorted(own, key=lambda name: (-own[name].itemsize, name))  # so that each is aligned
    for name in in_order:
        begin, end = end, end + own[name].nbytes
        fields[name] = {"dtype": _NAMES[own[name].dtype], "shape": list(own[name].shape), "data_offsets": [begin, end]}
    metadata = {"format": "pt", SECTION: text, f"{SECTION}.checksum": _checksum(text, own)}
    header = json.dumps({**fields, "__metadata__": metadata}, sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return b"".join([len(header).to_bytes(8, "little"), header, *(_bytes(own[name]) for name in in_order)])


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
    tensors, metadata = _content(path)
    description = _description(metadata, tensors, path)
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise AdapterError(
                f"{path}: {name} holds values that are not finite; the run that wrote it had diverged: take an earlier "
                "save"
            )
    return tensors, description


def is_finite(tensor: Tensor) -> bool:
    """Tell whether all values of a tensor are finite: if their sum is they are, and if not, each is looked at."""
    if not tensor.is_floating_point():
        return True
    wide = tensor.float() if tensor.itemsize == 1 else tensor
    total = wide.sum(dtype=torch.promote_types(wide.dtype, torch.float32))
    return bool(torch.isfinite(total)) or bool(torch.isfinite(wide).all())


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        AdapterError: If it is no regular file, longer than any of ours, or no JSON object.
    """
    with _regular(path) as file:
        if os.fstat(file.fileno()).st_size > MAX_HEADER_BYTES:
            raise AdapterError(f"{path}: not an adapter's: it is longer than {MAX_HEADER_BYTES} bytes")
        return parse_json(file.read(), path)


def _content(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file and its metadata.

    A file that is longer or shorter than its header says is refused before the rest is read. Each tensor is read into
    memory of its own, so what others do to the file afterwards changes nothing; memory that the file is mapped to would
    change, or end the process, when another program writes over the file.
    """
    with _regular(path) as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise AdapterError(
                f"{path}: not an adapter: its header claims {header_bytes} bytes, at most {MAX_HEADER_BYTES}"
            )
        try:
            header = _object(file.read(header_bytes))
            metadata = {name: str(text) for name, text in (header.pop("__metadata__", None) or {}).items()}
            ends = [entry["data_offsets"][1] for entry in header.values()]
            said, size = 8 + header_bytes + max(ends, default=0), os.fstat(file.fileno()).st_size
            if said != size:
                raise ValueError(f"it has {size} bytes where its header accounts for {said}")
            tensors = {name: _read(file, *place) for name, place in _places(header).items()}
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError) as error:
            raise AdapterError(f"{path}: damaged or not a safetensors file: {error}") from None
    return dict(sorted(tensors.items())), metadata


def _places(header: Mapping[str, Any]) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Return dtype and shape of each tensor in the order in which they lie, one behind the other.

    Args:
        header: Theirs.

    Raises:
        ValueError: If they do not lie so.
    """
    found: dict[str, tuple[torch.dtype, list[int]]] = {}
    reached = 0
    for name, entry in sorted(header.items(), key=lambda one: one[1]["data_offsets"]):
        dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        lies_right = all(whole_number(n) and n >= 0 for n in (begin, end, *shape)) and begin == reached
        if not lies_right or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"its header says {entry} of {name}, which leaves a gap or does not fit")
        found[name], reached = (dtype, shape), end
    return found


def _read(file: BinaryIO, dtype: torch.dtype, shape: list[int]) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    if file.readinto(_bytes(tensor)) != tensor.nbytes:  # type: ignore[attr-defined]
        raise ValueError("it was cut short while it was read")
    return tensor


def _bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


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
        digest.update(_bytes(tensor.contiguous()))
    return digest.hexdigest()
