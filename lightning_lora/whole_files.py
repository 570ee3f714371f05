"""Files and folders that are whole or not there: whatever stops a write, readers find the old content or the new."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import io
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

_UNFINISHED = re.compile(r"\.(unfinished|replaced)-([0-9a-f]{8})-(\d+)-[0-9a-f]{16}")
_DAY = 86400.0  # seconds; no write takes as long
_TRIES = 100
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_REMEDIES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there",
    errno.EFBIG: "raise the limit on the size of files",
}
_writing: set[str] = set()  # the names of what this process has not finished yet


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
    with _said(path), _unfinished(path.parent) as temporary:
        raw = _Raw(temporary, "xb")
        try:
            with io.BufferedWriter(raw) as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
        except Exception:
            if raw.failure is not None:
                raise raw.failure from None  # torch.save says something else of it
            raise
        _keep_mode(path, temporary)
        os.replace(temporary, path)
    _sync_folder(path.parent)


def write_folder(path: str | os.PathLike[str], contents: Mapping[str, bytes]) -> None:
    """Write a folder of small files as a whole: readers find all of the old files or all of the new ones.

    Modes are those of the files and folders that are replaced, or what the umask gives.

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
    with _said(path), _unfinished(path.parent) as temporary:
        for name, content in contents.items():
            target = temporary / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "xb") as file:
                file.write(content)
                file.flush()
                _keep_mode(path / name, target)
                os.fsync(file.fileno())
        for folder in {(temporary / name).parent for name in contents} | {temporary}:
            _keep_mode(path / folder.relative_to(temporary), folder)
            _sync_folder(folder)
        _put(temporary, path)
    _sync_folder(path.parent)


def sweep(folder: Path) -> None:
    """Remove what processes left in a folder that were stopped while they wrote, and put back what they had moved.

    Processes of this machine are known to run or not. What those of another machine or container left, which may be
    running, goes when it is a day old.

    Args:
        folder: The folder; nothing is said if it cannot be read or changed.
    """
    with suppress(OSError):
        for entry in os.scandir(folder):
            if _is_stale(entry):
                with suppress(OSError):
                    _clear(folder / entry.name)


def _put(new: Path, path: Path) -> None:
    """Give a new folder its name; the old one is at the place of the new one afterwards, or gone."""
    for _ in range(_TRIES):  # another process may write the same folder
        try:
            os.rename(new, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return
        if _exchange(new, path):
            return
        with suppress(FileNotFoundError), _unfinished(path.parent, "replaced") as aside:
            aside.mkdir()
            os.rename(path, aside / path.name)
            os.rename(new, path)
            return
    raise FileExistsError(errno.EEXIST, "others write the same folder all the time")


@contextmanager
def _unfinished(folder: Path, kind: str = "unfinished") -> Iterator[Path]:
    """Give a temporary path in a folder, and clear what is there in the end.

    Its name does not hold that of the target, by which others look for files, as Lightning does on SLURM.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    name = f".{kind}-{_here()}-{os.getpid()}-{secrets.token_hex(8)}"
    _writing.add(name)
    try:
        yield folder / name
    finally:
        _clear(folder / name)
        _writing.discard(name)


def _is_stale(entry: os.DirEntry[str]) -> bool:
    found = _UNFINISHED.fullmatch(entry.name)
    if found is None or entry.name in _writing:
        return False
    here, pid = found[2] == _here(), int(found[3])
    old = time.time() - entry.stat(follow_symlinks=False).st_mtime > _DAY
    return old or (here and (pid == os.getpid() or not _runs(pid)))


def _clear(temporary: Path) -> None:
    if not temporary.is_dir():
        temporary.unlink(missing_ok=True)
        return
    for old in temporary.iterdir() if temporary.name.startswith(".replaced") else ():
        if not os.path.lexists(temporary.parent / old.name):  # stopped before the new one took its place
            os.rename(old, temporary.parent / old.name)
    shutil.rmtree(temporary, ignore_errors=True)


@cache
def _here() -> str:
    """Return a name for the processes among which a process's number is its own: a machine's, or a container's."""
    namespace = ""
    with suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(f"{socket.gethostname()} {namespace}".encode()).hexdigest()[:8]


def _runs(pid: int) -> bool:
    if os.name != "posix":  # where a signal of 0 would end the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


@contextmanager
def _said(path: Path) -> Iterator[None]:
    """Say of an error of the system which file was not written, how much room there is, and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        free = ""
        with suppress(OSError):
            free = f" ({shutil.disk_usage(path.parent).free / 2**20:.1f} MiB are free in {path.parent})"
        remedy = _REMEDIES.get(error.errno, "give a folder that can be written to")
        raise OSError(
            error.errno,
            f"{path} was not written, and what was there before is as it was: {error.strerror}{free}: {remedy}",
        ) from error


class _Raw(io.FileIO):
    """A file that remembers why a write failed."""

    failure: OSError | None = None

    def write(self, data: Any) -> int | None:  # type: ignore[override]
        """Write, and note the error if there is one."""
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise


def _keep_mode(old: Path, new: Path) -> None:
    """Give what is to take a place the mode of what is there, if anything is."""
    with suppress(FileNotFoundError, NotADirectoryError):
        os.chmod(new, stat.S_IMODE(old.stat().st_mode))


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
