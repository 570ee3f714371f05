"""What was adapted is shown whole, one row per group of like sites."""

import pytest
import torch
from torch import nn

from lightning_lora import AdaLoRA, LoRA, inject
from lightning_lora.report import plot_ranks, rank_table, ranks, rows, table, totals


@pytest.fixture
def adapted():
    model = nn.ModuleDict(
        {"a_module_of_a_name_that_is_much_longer_than_a_terminal_is_wide_in_most_cases": nn.Sequential()}
    )
    [inner] = model.values()
    for _ in range(3):
        inner.append(nn.Linear(4, 6))
    model["last"] = nn.Linear(6, 2)
    return model, inject(model, LoRA(r=2), rank_pattern={"last": 1})


def test_like_sites_share_a_row_and_a_single_one_keeps_its_number(adapted):
    _, found = adapted
    long, last = rows(found)
    assert long[0].endswith("cases.*.weight")
    assert long[1:] == ("3", "6 x 4", "2", "16", "60")
    assert last == ("last.weight", "1", "2 x 6", "1", "16", "8")


@pytest.mark.parametrize("with_rich", [True, False])
def test_no_name_is_cut_short(adapted, with_rich, monkeypatch):
    _, found = adapted
    if with_rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setattr("lightning_lora.report.find_spec", lambda name: None)
    text = table(found)
    assert "…" not in text
    first_column = "".join(line.strip("│ ").partition(" ")[0].partition("│")[0] for line in text.splitlines())
    for name, *_ in rows(found):
        assert name in first_column


def test_totals_count_what_is_trained(adapted):
    model, _ = adapted
    trainable, total = 60 + 8, 60 + 8 + 3 * 30 + 14
    assert totals(model) == f"{trainable:,} trainable of {total:,} parameters ({100 * trainable / total:.2f} %)"


RANKS = {"blocks.0.q.weight": 3, "blocks.0.v.weight": 0, "blocks.10.q.weight": 2, "head.weight": 1}


def test_ranks_are_shown_by_depth_and_kind_of_matrix():
    assert [line.split() for line in rank_table(RANKS).splitlines()] == [
        ["rank", "at", "depth", "0", "10", "-", "total"],
        ["-" * len("rank at depth  0  10  -  total")],
        ["blocks.*.q", "3", "2", "5"],
        ["blocks.*.v", "0", "0"],
        ["head", "1", "1"],
        ["total", "3", "2", "1", "6"],
    ]
    assert len({len(line) for line in rank_table(RANKS).splitlines()}) == 1


def test_ranks_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    plot_ranks(RANKS, tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")


def test_ranks_in_use_leave_masked_ones_out():
    model = nn.Sequential(nn.Linear(4, 6), nn.Conv1d(4, 4, 1, groups=2))
    found = inject(model, AdaLoRA(r=3), ["0", "1"])
    assert ranks(found) == {"0.weight": 0, "1.weight": 0}
    with torch.no_grad():
        found[0].adapter("default").lora_E[1] = 1
        found[1].adapter("default").lora_E[:, 2] = 1
    assert ranks(found) == {"0.weight": 1, "1.weight": 2}
