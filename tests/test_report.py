"""What was adapted is shown whole, one row per group of like sites."""

import pytest
from torch import nn

from lightning_lora import LoRA, inject
from lightning_lora.report import rows, table, totals


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
