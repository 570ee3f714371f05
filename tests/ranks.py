"""Real processes that train together over gloo: forked here, where Lightning is imported already.

They find themselves in the variables that torchrun or SLURM would set. Only to be used from a process that computed
nothing yet, as `preemption_processes.py` and `cluster_processes.py` are: what autograd starts does not survive a fork.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

torch.set_num_threads(1)


def torchrun(rank: int, count: int) -> dict[str, str]:
    return {
        "TORCHELASTIC_RUN_ID": "test",
        "GROUP_RANK": "0",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
    }


def slurm(rank: int, count: int) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "4217",
        "SLURM_JOB_NAME": "train",
        "SLURM_NNODES": "1",
        "SLURM_NTASKS": str(count),
        "SLURM_NTASKS_PER_NODE": str(count),
        "SLURM_NODEID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
    }


def start(
    count: int, run: Callable[..., Any], *arguments: Any, variables: Callable[[int, int], dict[str, str]] = torchrun
) -> list[BaseProcess]:
    """Start processes that call ``run(rank, *arguments)``; SystemExit is their exit code, other exceptions are 1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}

    def process(rank: int) -> None:
        os.environ |= meeting | variables(rank, count)
        run(rank, *arguments)

    processes: list[BaseProcess] = [get_context("fork").Process(target=process, args=(rank,)) for rank in range(count)]
    for one in processes:
        one.start()
    return processes


def wait(processes: Iterable[BaseProcess], seconds: float) -> list[int | None]:
    """Return the exit codes, None of a process that is not gone in time; that one is killed."""
    deadline = time.monotonic() + seconds
    codes: list[int | None] = []
    for one in processes:
        one.join(max(0.0, deadline - time.monotonic()))
        codes.append(one.exitcode)
    for one in processes:
        if one.is_alive():
            one.kill()
            one.join()
    return codes


def wait_for(paths: Iterable[Path], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    for path in paths:
        while not path.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{path} did not come")
            time.sleep(0.005)


def trainer(**options: Any) -> L.Trainer:
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    many = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1)
    quiet |= {"devices": many, "strategy": DDPStrategy(process_group_backend="gloo") if many > 1 else "auto"}
    return L.Trainer(**quiet | options)


class Resumable(DataLoader[Any]):
    """Knows how many batches of the running epoch it gave, and goes on behind them."""

    given = 0
    skipped = 0

    def __iter__(self) -> Any:
        self.given, self.skipped = self.skipped, 0
        for number, batch in enumerate(super().__iter__()):
            if number >= self.given:
                self.given += 1
                yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given % len(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped = state["given"]
