"""The campaigns in short: nothing of ours is lost, torn, silently wrong, or left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from campaigns import disks, kills, merges, mutations
from lightning_lora.checkpoints import AtomicCheckpointIO


@pytest.mark.parametrize("name", kills.OURS)
def test_a_kill_inside_a_save_loses_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kills, "NUMBERS", 2**18)
    writer = kills.OURS[name]()
    if writer.elsewhere and kills.other_file_system(tmp_path) is None:
        pytest.skip("there is no other file system here")
    (tmp_path / "run").mkdir()
    found = kills.measure(writer, 12, tmp_path / "run")
    assert (found.lost, found.torn, found.left_after) == (0, 0, 0)
    assert found.inside > 0


def test_the_driver_sees_what_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kills, "NUMBERS", 2**20)
    (tmp_path / "run").mkdir()
    assert kills.measure(kills.plain(), 12, tmp_path / "run").lost > 0


@pytest.mark.parametrize("kind", mutations.KINDS)
def test_a_mutated_folder_is_an_adapter_error_or_what_was_saved(kind: str, tmp_path: Path) -> None:
    found = mutations.measure(mutations.ours, kind, 150, tmp_path / "adapter")
    assert found.keys() <= {"AdapterError", "exact"}
    assert found["AdapterError"] > 0 or kind == "config bytes"


def test_odd_values_under_a_right_checksum_end_in_no_other_error(tmp_path: Path) -> None:
    found = mutations.measure(mutations.ours, "signed values", 300, tmp_path / "adapter")
    assert found.keys() <= {"AdapterError", "exact", "silent"}


def test_every_flipped_bit_is_seen(tmp_path: Path) -> None:
    seen, total = mutations.flip(mutations.ours, 23, tmp_path / "adapter")
    assert seen == total > 400


@pytest.mark.parametrize("dtype", merges.DTYPES)
def test_a_hundred_merges_leave_every_bit_of_the_base(dtype: torch.dtype) -> None:
    assert merges.ours(dtype, 100) == (0, 0)


def test_a_full_disk_keeps_what_was_there() -> None:
    with disks.mounted("tmpfs") as place:
        if place is None:
            pytest.skip("no file system can be mounted here")
        kept, said = disks.measure(kills.checkpoint(AtomicCheckpointIO(), False), place)
    assert kept == "kept"
    assert "No space left on device" in said
