"""Jobs of two ranks that are told to go: by a signal to either of them, by SLURM, in training and in validation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.xdist_group("test_preempted_ranks")  # so that one worker runs the processes, once


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    program = folder / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {folder}/scontrol.log\n')
    program.chmod(0o755)
    command = [sys.executable, str(HERE / "preemption_processes.py"), str(folder)]
    variables = {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    subprocess.run(command, check=True, timeout=240, env=os.environ | variables)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("target", ["both", "rank 0", "rank 1"])
def test_whichever_rank_is_told_all_save_and_leave_at_one_step(found, target):
    [outcome] = [one for one in found["campaign"] if one["target"] == target]
    assert outcome["codes"] == [143, 143]
    assert outcome["steps"] == [outcome["saved"]] * 2


@pytest.mark.parametrize("moment", ["training", "validation", "lora_fsdp", "lora_fsdp2"])
def test_two_ranks_resumed_are_the_run_they_would_have_been(found, moment):
    resumed, whole = found[moment], found["whole"]
    assert resumed["codes"] == [143, 143]
    for rank in range(2):
        assert resumed["first"][rank]["losses"] + resumed["second"][rank]["losses"] == whole[rank]["losses"]
        assert resumed["second"][rank]["adapters"] == whole[rank]["adapters"]
    assert whole[0]["adapters"] == whole[1]["adapters"]
    assert whole[0]["losses"] != whole[1]["losses"]


def test_a_rank_told_in_a_batch_of_a_validation_that_the_other_does_not_have_waits_for_its_end(found):
    assert found["uneven"]["codes"] == [143, 143]
    assert found["uneven"]["steps"] == [4, 4]


def test_slurms_own_signal_puts_the_job_back_once_and_the_next_one_goes_on(found):
    job = found["slurm"]["SIGUSR1"]
    assert job["codes"] == [138, 138]
    assert job["requeued"] == ["requeue 4217"]
    assert job["first"][0]["losses"] + job["second"][0]["losses"] == found["whole"][0]["losses"]


def test_a_cancelled_job_is_not_put_back(found):
    job = found["slurm"]["SIGTERM"]
    assert job["codes"] == [143, 143]
    assert job["requeued"] == []
