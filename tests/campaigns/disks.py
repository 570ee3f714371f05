"""Save over a good artefact where there is no room for the new one, on file systems that are mounted for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from campaigns import kills
from campaigns.kills import Writer

KINDS = ("tmpfs", "ext4", "xfs")
SIZES = {"tmpfs": "28m", "ext4": "32M", "xfs": "320M"}  # room for one artefact of 16 MiB, and not for two


@contextmanager
def mounted(kind: str) -> Iterator[Path | None]:
    """Give a small file system; None where it cannot be had, as without root."""
    with tempfile.TemporaryDirectory() as name:
        place, image = Path(name, "here"), Path(name, "image")
        place.mkdir()
        if kind == "tmpfs":
            commands = [["mount", "-t", "tmpfs", "-o", f"size={SIZES[kind]}", "tmpfs", str(place)]]
        else:
            make = shutil.which(f"mkfs.{kind}") or f"mkfs.{kind}"
            commands = [["truncate", "-s", SIZES[kind], str(image)], [make, "-q", str(image)]]
            commands += [["mount", "-o", "loop", str(image), str(place)]]
        try:
            for command in commands:
                subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            yield None
            return
        try:
            yield place
        finally:
            subprocess.run(["umount", place], check=True)


def measure(writer: Writer, place: Path) -> tuple[str, str]:
    """Return ``kept``, ``lost`` or ``written``, and what was said of a save without room.

    Args:
        writer: What is measured.
        place: A small file system; the one for temporary files is another.
    """
    where = place / "run"
    where.mkdir()
    before, tempfile.tempdir = tempfile.tempdir, "/dev/shm" if writer.elsewhere else str(place)
    said = "nothing"
    try:
        writer.write(where, 1)
        free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
        (place / "others").write_bytes(bytes(max(0, free - 2**20)))
        kills.NUMBERS *= 2  # where that is possible: what is written in place has more room than it needs else
        try:
            writer.write(where, 2)
        except BaseException as error:  # what it says is measured; torch has one that is no Exception
            said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}".replace(str(place), "")
        finally:
            kills.NUMBERS //= 2
        try:
            found = writer.read(where)
        except Exception:
            return "lost", said
        return {frozenset({1.0}): "kept", frozenset({2.0}): "written"}.get(frozenset(found), "lost"), said
    finally:
        tempfile.tempdir = before
        shutil.rmtree(where, ignore_errors=True)
        with suppress(FileNotFoundError):
            (place / "others").unlink()
