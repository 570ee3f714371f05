"""Files that are whole or not there: atomic, durable writes, and a strict reader of safetensors with a checksum."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

SECTION = "lightning_lora"
SCHEMA = 1
MAX_HEADER_BYTES = 16 * 2**20
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


class AdapterError(ValueError):
    """An adapter file or checkpoint that cannot be used as it is; the message says what, where and what to do."""


def some(names: list[str]) -> str:
    """Return the first five names as text."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def write_file(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that a reader, or a crash at any moment, finds the old content or the new, never a part.

    The content goes to a temporary file in the same folder (a rename is atomic only within one file system), is
    synced, takes the place of the old file, and then the folder is synced. Its mode is that of the file it replaces,
    or what the umask gives.

    Args:
        path: The file's path; its folder is made if it is missing.
        write: Called with the open temporary file.

    Raises:
        OSError: If it could not be written; the old file is then still there.
    """
    path = Path(path)
    path = path.resolve() if path.is_symlink() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.chmod(temporary, stat.S_IMODE(path.stat().st_mode))
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_folder(path: str | os.PathLike[str], contents: Mapping[str, bytes]) -> None:
    """Write a folder of small files as a whole: readers find all of the old files or all of the new ones.

    Args:
        path: The folder's path; an existing folder is replaced with everything in it.
        contents: Bytes by path relative to the folder.

    Raises:
        OSError: If it could not be written; the old folder is then still there.
        ValueError: If a path leads out of the folder.
    """
    path = Path(path)
    path = path.resolve() if path.is_symlink() else path
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file: give the name of a folder")
    for name in contents:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{name!r} is no name inside the folder {path}: names are relative and without '..'")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        for name, content in contents.items():
            target = temporary / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for folder in {(temporary / name).parent for name in contents} | {temporary}:
            _sync_folder(folder)
        if not path.exists():
            os.rename(temporary, path)
        elif not _exchange(temporary, path):
            aside = _temporary(path, "old")
            os.rename(path, aside)
            try:
                os.rename(temporary, path)
            except BaseException:
                os.rename(aside, path)
                raise
            temporary = aside
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync_folder(path.parent)


def _temporary(path: Path, what: str = "tmp") -> Path:
    return path.with_name(f".{path.name}.{what}-{secrets.token_hex(8)}")  # process ids come again, in containers soon


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # other systems cannot open a folder
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step, where the system can."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


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
    if not path.is_file():
        raise AdapterError(f"{path}: no such file; an adapter folder holds adapter_model.safetensors")
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise AdapterError(
            f"{path}: not an adapter: its header claims {header_bytes} bytes, at most {MAX_HEADER_BYTES}"
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{path}: damaged or not a safetensors file: {error}") from None
    description = _description(metadata, tensors, path)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise AdapterError(
                f"{path}: {name} holds values that are not finite; the run that wrote it had diverged: take an earlier "
                "save"
            )
    return tensors, description


def _description(metadata: Mapping[str, str], tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any] | None:
    """Return the description in a header, None if another library wrote it, after checking the checksum."""
    if not any(name.startswith(SECTION) for name in metadata):
        return None
    text = metadata.get(SECTION, f'{{"schema": {SCHEMA}}}')  # a damaged name: the checksum will not fit
    description = parse_json(text, path)
    schema = description.get("schema")
    if not isinstance(schema, int) or schema > SCHEMA:
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

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a number")

    try:
        value = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise AdapterError(f"{path}: holds a {type(value).__name__} where an object is expected")
    return value


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
