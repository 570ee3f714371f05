"""Jobs as they are started: two nodes under torchrun, two devices by Lightning itself, and the script for SLURM."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import Lit
from launched_job import job
from lightning.pytorch.cli import LightningCLI
from ranks import wait_for

HERE = Path(__file__).parent
ROOT = HERE.parent
VARIABLES = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]), "OMP_NUM_THREADS": "1"}


def started(*command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, *command], env=VARIABLES, stderr=subprocess.DEVNULL)


def one_process(folder: Path) -> Lit:
    """Run the job, or what is left of it, in this process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*no last checkpoint available")
        warnings.filterwarnings("ignore", "the checkpoint holds the random states of 2 processes")
        return job(folder, 1, 1)


def check_that_one_process_can_finish(folder: Path, tmp_path: Path) -> None:
    saved = torch.load(folder / "preempted.ckpt")
    assert 3 <= saved["global_step"] < 40
    whole, rest = one_process(tmp_path / "whole"), one_process(folder)
    assert len(rest.losses) == 40 - saved["global_step"]
    torch.testing.assert_close(rest.losses, whole.losses[saved["global_step"] :], rtol=1e-5, atol=1e-6)


def test_when_one_of_two_nodes_under_torchrun_has_to_go_the_job_is_saved_and_can_go_on_elsewhere(tmp_path):
    folder = tmp_path / "job"
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = ("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test")
    command = ("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *meeting)
    nodes = [started(*command, str(HERE / "launched_job.py"), str(folder), "2", "1") for _ in range(2)]
    try:
        wait_for([folder / f"under-way-{rank}" for rank in range(2)], 120)
        nodes[1].send_signal(signal.SIGTERM)
        codes = [node.wait(60) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
            node.wait()
    assert all(codes), codes
    check_that_one_process_can_finish(folder, tmp_path)


def test_a_job_whose_processes_lightning_starts_ends_with_the_signals_code(tmp_path):
    folder = tmp_path / "job"
    folder.mkdir()
    main = started(str(HERE / "launched_job.py"), str(folder), "1", "2")
    try:
        wait_for([folder / f"under-way-{rank}" for rank in range(2)], 120)
        main.send_signal(signal.SIGTERM)
        assert main.wait(60) == 128 + signal.SIGTERM
    finally:
        main.kill()
        main.wait()
    wait_for([folder / "left-1"])
    assert (folder / "left-1").read_text() == "0"
    check_that_one_process_can_finish(folder, tmp_path)


class Parsed(LightningCLI):
    """Stops where classes would be made."""

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def test_the_script_for_slurm_starts_what_lightning_cli_takes(tmp_path):
    (tmp_path / "srun").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    (tmp_path / "srun").chmod(0o755)
    (tmp_path / "my_run.yaml").write_text("trainer: {max_epochs: 3}\n")
    variables = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "4217"}
    script = ["bash", "configs/slurm.sh", "train.py", str(tmp_path / "my_run.yaml")]
    said = subprocess.run(script, cwd=ROOT, env=variables, check=True, capture_output=True, text=True).stdout
    arguments = said.splitlines()
    assert arguments[:3] == ["--kill-on-bad-exit=1", "python", "train.py"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr("sys.argv", ["train.py"])
        config = Parsed(Lit, args=arguments[3:], save_config_callback=None, seed_everything_default=0).config.fit
    lora, leave = config.trainer.callbacks
    assert lora.class_path == "lightning_lora.LoRACallback"
    assert leave.init_args.dirpath == "checkpoints/4217"
    assert config.ckpt_path == "last"
    assert config.trainer.max_epochs == 3
    assert config.trainer.strategy == "lora_ddp"


def test_the_script_asks_for_as_many_tasks_and_nodes_as_the_config_has():
    text = (ROOT / "configs/slurm.sh").read_text()
    lines = [line.split()[1] for line in text.splitlines() if line.startswith("#SBATCH")]
    asked = dict(line.removeprefix("--").partition("=")[::2] for line in lines)
    config = (ROOT / "configs/slurm.yaml").read_text()
    assert f"num_nodes: {asked['nodes']}\n" in config
    assert f"devices: {asked['ntasks-per-node']}\n" in config
    assert asked["signal"] == "SIGUSR1@90"
    assert "requeue" in asked
