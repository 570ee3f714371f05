"""The campaigns in short: nothing of ours is lost, torn, silently wrong, or left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from campaigns import cases, disks, kills, merges, mutations
from campaigns.page import page
from campaigns.run import LONG, trials
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


@pytest.mark.parametrize("case", [*cases.CASES, cases.OTHER_BASE])
def test_known_damage_of_a_folder_of_ours_is_an_adapter_error_or_leaves_the_output(case: str, tmp_path: Path) -> None:
    what, _, grown = cases.measure(cases.ours, case, True, tmp_path)
    assert what in ("exact", "error: AdapterError")
    assert grown < 10


def test_other_bases_are_refused_all_of_them_with_the_full_fingerprint(tmp_path: Path) -> None:
    for kind in cases.BASES:
        found = cases.other_bases(kind, 2, tmp_path)
        assert found["ours, fingerprint='full'"] == 2
        assert found["ours"] == 2 or "one value" in kind or "without adapters" in kind


def test_at_full_size_the_campaigns_are_as_large_as_promised() -> None:
    sizes = {(one.part, one.name): one.size for one in trials(LONG)}
    assert [sizes["kills", name] for name in kills.OURS] == [1000] * 3
    assert sum(sizes["mutations", f"ours: {kind}"] for kind in mutations.KINDS) == 100_000
    assert sizes["flips", "ours"] == 1
    assert sizes["signals", "ours"] == 20
    assert {sizes["merges", f"ours: {dtype}"] for dtype in ("float32", "bfloat16", "float16")} == {100}


def test_the_page_is_written_from_what_is_there() -> None:
    found = {"flips": {"ours": {"size": 1, "found": [8, 8]}}, "modes": {"modes": {"size": 1, "found": MODES}}}
    written = page(found)
    assert "| bits flipped in a small adapter: seen | 8 of 8 |" in written
    assert "0644" in written
    assert "Killed" not in written


MODES = {"umask": ["0022"], "ours": ["0644"], "safetensors `save_file`": ["0600"]}
