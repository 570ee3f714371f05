"""Strategies that divide the base: the same numbers as on one device, and nothing of the base moves for a checkpoint.

Each stage of sharded_processes.py runs in real processes over gloo; the tests here read what they found.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from conftest import run_processes
from sharded_processes import CASES, METHODS, SHARDED, STAGES, STEPS

from lightning_lora import AdapterError

Found = dict[str, Any]
pytestmark = pytest.mark.xdist_group("test_sharded")  # so that one worker runs the processes, once
# Divisions by small numbers at the first steps let these show how sums over processes are rounded.
TOLERANCES = {"EVA": 1e-5, "LoRA-Pro": 1e-3, "llama": 1e-4}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """What processes found, by stage."""
    folder = tmp_path_factory.mktemp("sharded")
    run_processes("sharded_processes.py", folder, timeout=900)
    return {stage: json.loads((folder / f"{stage}.json").read_text()) for stage in STAGES}


def same(one: Found, other: Found, tolerance: float = 1e-6) -> None:
    """Check that two runs had the same losses and came to the same values."""
    assert one["losses"] == pytest.approx(other["losses"], abs=tolerance)
    assert one["trained"].keys() == other["trained"].keys()
    for name, values in one["trained"].items():
        assert values == pytest.approx(other["trained"][name], abs=10 * tolerance), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strategy", ["ddp", *SHARDED])
class TestEveryMethod:
    def test_trains_on_two_processes_as_on_one(self, strategy: str, method: str, found: Any) -> None:
        one, two = found["one"]["auto"][method], found["two"][strategy][method]
        assert len(one["losses"]) == STEPS
        assert one["losses"][0] != one["losses"][1]
        same(two, one, TOLERANCES.get(method, 1e-6))

    def test_trains_over_a_divided_base_as_over_a_whole_one_bit_for_bit(
        self, strategy: str, method: str, found: Any
    ) -> None:
        ours, ddp = found["two"][strategy][method], found["two"]["ddp"][method]
        assert ours["losses"] == ddp["losses"]
        assert list(ours["trained"].values()) == list(ddp["trained"].values())

    def test_leaves_all_processes_with_the_same_values(self, strategy: str, method: str, found: Any) -> None:
        assert found["two"][strategy][method]["alike"]

    def test_is_tested_on_the_same_module_after_training(self, strategy: str, method: str, found: Any) -> None:
        tested = found["two"][strategy][method]["tested"]
        assert tested == pytest.approx(found["one"]["auto"][method]["tested"], abs=TOLERANCES.get(method, 1e-6))

    def test_resumes_exactly(self, strategy: str, method: str, found: Any) -> None:
        assert found["two"][strategy][method]["resumed"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("strategy", SHARDED)
def test_what_a_run_has_besides_gives_the_numbers_of_one_device(strategy: str, case: str, found: Any) -> None:
    same(found["two"][f"{strategy} cases"][case], found["one"]["cases"][case], TOLERANCES.get(case, 1e-6))


@pytest.mark.parametrize("strategy", SHARDED)
def test_gradients_are_sent_once_for_accumulated_batches(strategy: str, found: Any) -> None:
    case = found["two"][f"{strategy} cases"]["accumulate"]
    trained = sum(len(values) for values in case["trained"].values())
    sent = 2 * 4 * (trained + len(case["trained"]))  # what goes in and comes out, one number more for each parameter
    assert case["reduced"] == [0, 0, sent] * 2


@pytest.mark.parametrize("strategy", SHARDED)
def test_adapters_in_fp32_train_over_a_base_in_bf16_as_under_ddp(strategy: str, found: Any) -> None:
    ours, ddp = found["two"][f"{strategy} low precision"], found["two"]["ddp low precision"]
    assert ours["kinds"] == ["torch.float32", "torch.bfloat16"]
    assert ours["losses"] == ddp["losses"]


@pytest.mark.parametrize("strategy", SHARDED)
class TestMemoryAndMessages:
    def test_a_process_holds_its_share_of_the_base_and_gradients_of_the_adapters_alone(
        self, strategy: str, found: Any
    ) -> None:
        for run in found["two"][f"{strategy} messages"].values():
            base = run["base"]
            assert base / 2 <= run["held"] <= base / 2 * 1.02  # rows that do not divide evenly are padded
            assert run["gradients"] == run["trained"] < base / 3

    def test_a_checkpoint_sends_its_name_and_random_states_and_nothing_of_the_base_or_the_adapters(
        self, strategy: str, found: Any
    ) -> None:
        for run in found["two"][f"{strategy} messages"].values():
            assert set(run["saving"]) <= {"broadcast_", "barrier", "allgather_", "gather_"}
            assert set(run["loading"]) <= {"broadcast_"}
            assert run["saving"]["broadcast_"] + run["loading"]["broadcast_"] < 1000  # two paths
            assert run["saving"]["allgather_"] + run["saving"]["gather_"] < 100_000  # random states

    def test_a_base_ten_times_as_large_has_the_same_checkpoint_and_the_same_messages(
        self, strategy: str, found: Any
    ) -> None:
        small, large = found["two"][f"{strategy} messages"].values()
        assert large["base"] > 8 * small["base"]
        assert large["file"] == small["file"]
        for kind in ("saving", "loading"):
            assert large[kind].keys() == small[kind].keys()


@pytest.mark.parametrize("name", ["ddp from one", "lora_fsdp from one", "lora_fsdp2 from one", "ddp from lora_fsdp2"])
def test_a_run_goes_on_from_the_checkpoint_of_another_strategy(name: str, found: Any) -> None:
    whole = found["one"]["auto"]["LoRA"]
    same(found["two"][name], whole | {"losses": whole["losses"][STEPS // 2 :]})


def test_a_run_is_handed_from_one_process_to_two_to_four_and_back(found: Any) -> None:
    losses = [loss for stage in STAGES for loss in found[stage]["handed over"]["losses"]]
    same(found["one again"]["handed over"] | {"losses": losses}, found["one"]["four epochs"])


@pytest.mark.parametrize("how", ["in __init__", "assigned first", "assigned last"])
class TestUserDivides:
    def test_adapters_of_a_module_that_calls_fully_shard_stay_alike(self, how: str, found: Any) -> None:
        run = found["two"]["divided by the user"][how]
        assert run["alike"]
        assert run["base"] == ["DTensor"]
        same(run, found["one"]["auto"]["LoRA"])

    def test_what_is_trained_in_full_stays_divided_and_is_saved_whole(self, how: str, found: Any) -> None:
        run = found["two"]["divided by the user"][how]["saved"]
        expected = found["one"]["head trained too"]
        same(run, expected)
        assert any(name.startswith("net.head.weight") for name in run["trained"])


@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
def test_a_base_without_memory_is_read_from_files_shard_by_shard(method: str, found: Any) -> None:
    same(found["two"]["from files"][method], found["one"]["auto"][method])


def test_a_base_without_memory_resumes(found: Any) -> None:
    whole = found["one"]["auto"]["LoRA"]
    same(found["two"]["from files"]["resumed"], whole | {"losses": whole["losses"][STEPS // 2 :]})


def test_a_base_of_another_kind_is_refused_when_it_has_been_read(found: Any) -> None:
    assert found["two"]["from files"]["other base"].startswith(AdapterError.__name__)
    assert "trained on another base" in found["two"]["from files"]["other base"]


def test_copies_of_a_divided_base_train_as_one_device(found: Any) -> None:
    run = found["four"]["hybrid"]
    assert run["placements"] == ["R", "S(0)"]
    assert run["held"] == 8, "half of 16 rows: each copy is divided over two of the four processes"
    same(run, found["one"]["auto"]["LoRA"])


@pytest.mark.parametrize("strategy", SHARDED)
def test_nothing_is_merged_into_a_divided_base(strategy: str, found: Any) -> None:
    merging = found["two"][f"{strategy} by turns"]["merging"]
    assert merging.startswith("RuntimeError: cannot merge into net.entry.weight: each process holds a part of it")


@pytest.mark.parametrize("strategy", SHARDED)
def test_an_optimizer_that_was_built_before_lets_the_base_go(strategy: str, found: Any) -> None:
    case = found["two"][f"{strategy} cases"]["captured"]
    assert case["held"] == sum(len(values) for values in case["trained"].values())


@pytest.mark.parametrize("strategy", SHARDED)
def test_adapters_that_only_some_processes_use_stay_alike(strategy: str, found: Any) -> None:
    run = found["two"][f"{strategy} by turns"]
    assert run["alike"]
    used = {name.partition(".adapters")[0] for name, held in run["gradients"].items() if held}
    assert "net.extra" in used
    assert "net.unused" not in used
    assert math.isfinite(run["loss"])
