"""DDP over real processes: what is sent, resuming with more or fewer of them, ranks that die."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
pytestmark = pytest.mark.xdist_group("test_clusters")  # so that one worker runs the processes, once
IDLE = "net.second.adapters.weight.default.lora_A, net.second.adapters.weight.default.lora_B"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(HERE / "cluster_processes.py"), str(folder)]
    variables = {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    subprocess.run(command, check=True, timeout=400, env=os.environ | variables, capture_output=True)
    return json.loads((folder / "found.json").read_text())


def test_tests_that_share_processes_are_sent_to_one_worker(request: pytest.FixtureRequest) -> None:
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("not by pytest-xdist's --dist loadgroup")
    assert request.node.nodeid.endswith("@test_clusters")


def test_lora_ddp_is_known_by_name_and_keeps_ranks_alike(found):
    name, (first, second) = found["by_name"]
    assert name == "LoRADDPStrategy"
    assert first == second


def test_without_broadcast_base_only_what_is_trained_is_sent(found):
    sent = found["sent"]
    assert sent["ddp"]["bytes"] == sent["lora_ddp"]["bytes"] == 21256
    assert sent["broadcast_base=False"]["bytes"] == 4096
    assert sent["broadcast_base=False"]["losses"] == sent["ddp"]["losses"]


def test_bases_that_differ_are_found_by_the_weight_that_does(found):
    assert found["different"] == (
        "ValueError: broadcast_base=False: 1 of 4 frozen tensors differ between ranks, the first is net.second.weight: "
        "load the same weights on every rank, or leave broadcast_base=False out"
    )


def test_by_default_bases_that_differ_are_made_alike(found):
    first, second = found["made_alike"]
    assert first == second


def test_buffers_are_sent_at_every_forward_only_where_one_may_change(found):
    assert found["buffers"] == {"none": False, "frozen": False, "trained": True, "unknown": True, "asked for": True}


def test_buffers_that_are_not_sent_later_are_sent_at_the_start(found):
    first, second = found["statistics"]
    assert first == second


def test_adapters_that_got_no_gradient_are_named_on_every_rank(found):
    for messages in (found["unused"], found["messages of rank 1"]):
        assert messages["lora_ddp"] == (
            f"RuntimeError: 2 of 4 trained parameters got no gradient from the last batch: {IDLE}. Leave out layers "
            "that no batch uses with LoRACallback(exclude_modules=[...]); if they are used by turns, set "
            "LoRACallback(audit=False) and strategy=LoRADDPStrategy(find_unused_parameters=True)"
        )
        assert "2 of 4 adapter parameters got no gradient in the first batch: net.second.weight" in messages["audit"]
        assert "find_unused_parameters=True" in messages["ddp"]


@pytest.mark.parametrize("way", ["left out", "lora_ddp found", "ddp found"])
def test_the_ways_out_of_it_train(found, way):
    assert found["unused"][way] == found["messages of rank 1"][way] == "no error"


def test_a_run_by_one_two_four_and_one_processes_is_the_run_by_one(found):
    turns, one = found["worlds"]["turns"], found["worlds"]["one"]
    assert turns["step"] == one["step"] == 16
    assert turns["adapters"].keys() == one["adapters"].keys()
    for name, values in one["adapters"].items():
        torch.testing.assert_close(torch.tensor(turns["adapters"][name]), torch.tensor(values), rtol=1e-5, atol=1e-6)
    assert len(turns["moments"]) == len(one["moments"]) == 4
    for ours, theirs in zip(turns["moments"], one["moments"], strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_rank_dies_the_other_ends_with_an_error_and_the_last_checkpoint_is_good(found, victim):
    death = found["deaths"][victim]
    assert death["codes"][victim] == -9
    assert death["codes"][1 - victim] == 1
    assert death["step"] >= 9
    assert death["resumed"] == [0, 0]


def test_two_jobs_in_one_folder_leave_whole_files_of_one_or_the_other(found):
    jobs = found["two_jobs"]
    assert jobs["codes"] == [0, 0]
    assert jobs["torn"] == []
    for values in jobs["seen"].values():
        assert set(values) == {1.0, 2.0}
