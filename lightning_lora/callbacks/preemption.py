"""`PreemptionCheckpoint`: a job told to go saves where it is, on all ranks at one step, and can resume there."""

from __future__ import annotations

import math
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override


class PreemptionCheckpoint(OnExceptionCheckpoint):
    """On SIGTERM or SIGUSR1 save a checkpoint after the running optimizer step, and end the job.

    A signal only sets a flag. After each optimizer step the ranks tell each other their flags, so a signal to one of
    them is enough: all save and leave at the same step. The exit code is 128 plus the signal's number, as of a process
    that the signal has killed. Where SLURM says by a signal of its own (``#SBATCH --signal=SIGUSR1@90``) that time is
    up, the job is put back into the queue. Lightning's own handlers, which communicate inside the signal handler and
    can hang there, stay off during the fit.

    ``trainer.fit(..., ckpt_path="last")`` starts afresh if nothing is there, and else goes on from this checkpoint or
    from the last one of ``ModelCheckpoint``, whichever is newer. A fit that reaches its end removes it.

    Args:
        dirpath: Folder of the checkpoint, one for each job, seen by all of its ranks.
        filename: Its name there, without ``.ckpt``.
    """

    def __init__(self, dirpath: str | Path, filename: str = "preempted") -> None:
        super().__init__(dirpath, filename)
        self._received: set[int] = set()
        self._steps = 0
        self._stepped = False
        self._common_batches = 0.0
        self._previous: dict[int, Any] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take signals in from here on; move behind all other callbacks, so that a checkpoint has their last word."""
        if stage != "fit":
            return
        others = [one for one in trainer.callbacks if one is not self]  # type: ignore[attr-defined]
        if not any(isinstance(one, ModelCheckpoint) for one in others):
            rank_zero_warn(
                "PreemptionCheckpoint saves nothing at the end of a fit, and beside it Lightning adds no "
                "ModelCheckpoint by itself: give Trainer(callbacks=[..., ModelCheckpoint()])"
            )
        trainer.callbacks = [*others, self]  # type: ignore[attr-defined]
        self._received.clear()
        self._stepped = False
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        for signum in _signals(trainer):
            self._previous[signum] = signal.signal(signum, self._note)

    def _note(self, signum: int, frame: Any) -> None:
        self._received.add(signum)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count steps from here."""
        self._steps = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave after a step if a rank was told to; within an accumulation gradients would be lost.

        Raises:
            SIGTERMException: To end the process; it is a ``SystemExit``.
        """
        before, self._steps = self._steps, trainer.global_step
        self._stepped = self._steps > before
        if self._stepped and not trainer.is_last_batch:
            self._leave_if_told(trainer, unless=validates_next(trainer))

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Agree on how many batches all ranks have, which need not be as many on each."""
        batches = sum(trainer.num_val_batches)
        if trainer.world_size > 1:
            least = torch.tensor(0 if math.isinf(batches) else batches, device=trainer.strategy.root_device)
            dist.all_reduce(least, dist.ReduceOp.MIN)
            batches = least.item()
        self._common_batches = batches

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Leave in the middle of a validation, which may take longer than there is time; resuming starts it again.

        Raises:
            SIGTERMException: To end the process; it is a ``SystemExit``.
        """
        if trainer.state.fn == "fit" and self._common_batches > 0 and self._stepped:  # no step yet: a sanity check
            self._common_batches -= 1
            self._leave_if_told(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave after an epoch, when its metrics are known and its checkpoints are written.

        Raises:
            SIGTERMException: To end the process; it is a ``SystemExit``.
        """
        self._leave_if_told(trainer)

    def _leave_if_told(self, trainer: Trainer, unless: bool = False) -> None:
        signals = _signals(trainer)
        flags = torch.tensor([unless, *(signum in self._received for signum in signals)], dtype=torch.int32)
        if trainer.world_size > 1:
            flags = flags.to(trainer.strategy.root_device)
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        not_yet, *came = flags.tolist()
        told = [signum for signum, flag in zip(signals, came, strict=True) if flag]
        if not_yet or not told:
            return
        if trainer.validating:
            progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            progress.increment_started()  # what Lightning knows an interrupted validation by
            progress.current.reset()  # it is run again as a whole, as its metrics so far are not in the checkpoint
        trainer.save_checkpoint(self.ckpt_path)
        trainer.strategy.checkpoint_io.teardown()  # an asynchronous writer may still be at it
        rank_zero_info(
            f"{told[0].name} came: step {trainer.global_step} is saved in {self.ckpt_path}, and the job ends; "
            "fit(..., ckpt_path='last') goes on from there"
        )
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if trainer.is_global_zero and _requeues(environment, told[0]):
            _requeue()
        trainer.strategy.barrier("preempted")  # where one rank's exit ends the others, it must not come too early
        raise SIGTERMException(_exit_code(environment, told[0]))

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Hand signals back; after an exception of any other kind nothing is saved."""
        self._hand_back(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hand signals back, and remove what the fit, which has reached its end, was resumed from."""
        if stage == "fit":
            self._hand_back(trainer)
            trainer.strategy.remove_checkpoint(self.ckpt_path)

    def _hand_back(self, trainer: Trainer) -> None:
        trainer._signal_connector.__dict__.pop("register_signal_handlers", None)
        while self._previous:
            signum, handler = self._previous.popitem()
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)


def validates_next(trainer: Trainer) -> bool:
    """Tell whether a validation follows the batch that ran, which a run resumed from here would leave out."""
    fetcher = trainer.fit_loop._data_fetcher
    return (
        fetcher is not None and trainer.enable_validation and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)
    )


def _signals(trainer: Trainer) -> list[signal.Signals]:
    """Return the signals to listen to; the first that came to any rank decides."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    own = environment.requeue_signal if isinstance(environment, SLURMEnvironment) else None
    return [own or signal.SIGUSR1, signal.SIGTERM]


def _requeues(environment: Any, signum: signal.Signals) -> bool:
    """Tell whether SLURM has to be asked: after SIGTERM it requeues by itself, or the job was cancelled."""
    return isinstance(environment, SLURMEnvironment) and environment.auto_requeue and signum != signal.SIGTERM


def _job() -> str:
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def _requeue() -> None:
    job = _job()
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or error
        rank_zero_warn(f"scontrol requeue {job} failed, so submit the job again yourself: {said}")


def _exit_code(environment: Any, signum: signal.Signals) -> int:
    """Return this process's exit code: 0 where Lightning started it, whose other processes would then be killed."""
    started_by_lightning = isinstance(environment, LightningEnvironment) and environment.local_rank() > 0
    return 0 if started_by_lightning else 128 + signum
