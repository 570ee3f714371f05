"""`PreemptionCheckpoint`: a run that is told to go is saved and ends; resumed, it is the run it would have been."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from conftest import Lit, loader
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import Resumable

from lightning_lora import AdapterEMA, LoRA, LoRACallback, PreemptionCheckpoint
from lightning_lora.callbacks.preemption import _exit_code, _requeue
from lightning_lora.files import read_tensors


class Told(L.Callback):
    """Sends this process a signal, at a batch of the training or of a validation.

    Args:
        step: Steps taken before it.
        batch: Of a validation; None for a batch of the training.
        signum: The signal.
    """

    def __init__(self, step: int, batch: int | None = None, signum: int = signal.SIGTERM) -> None:
        self.step = step
        self.batch = batch
        self.signum = signum

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self.batch is None and trainer.global_step == self.step:
            os.kill(os.getpid(), self.signum)

    def on_validation_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        if self.batch == batch_idx and trainer.global_step == self.step and not trainer.sanity_checking:
            os.kill(os.getpid(), self.signum)


class Validations(L.Callback):
    """Notes what each validation came to."""

    def __init__(self, found: list[tuple[int, float]]) -> None:
        self.found = found

    def on_validation_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.found.append((trainer.global_step, trainer.callback_metrics["val_loss"].item()))


def stepped(module: Lit) -> Any:
    """An optimizer with momentum, and a learning rate that falls at every step."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def data(batches: int = 4) -> Resumable:
    return Resumable(loader(batches).dataset, batch_size=4)


@pytest.fixture
def run(trainer: Callable[..., L.Trainer], tmp_path: Path) -> Callable[..., tuple[Lit, list[Any], int | None]]:
    """Fit a new module; return it, what its validations came to, and the exit code of a fit that was told to go."""

    def fit(folder: str, told: Told | None = None, validation: int = 0, **options: Any) -> Any:
        found: list[tuple[int, float]] = []
        module = Lit(stepped)
        saver = ModelCheckpoint(tmp_path / folder / "others", save_top_k=-1)
        callbacks = [LoRACallback(LoRA(r=2)), PreemptionCheckpoint(tmp_path / folder), Validations(found), saver]
        callbacks += options.pop("callbacks", [])
        once = trainer(callbacks=[*callbacks, *([told] if told else [])], enable_checkpointing=True, **options)
        validate = loader(validation) if validation else None
        try:
            once.fit(module, data(), validate, ckpt_path="last")
        except SystemExit as end:
            return module, found, end.code
        return module, found, None

    return fit


def others(folder: Path) -> set[str]:
    return {path.name for path in (folder / "others").glob("*.ckpt")}


MOMENTS = {
    "the first batch": ({}, Told(0)),
    "in the middle of an epoch": ({}, Told(1)),
    "the last batch of an epoch": ({}, Told(3)),
    "the last batch of all": ({}, Told(7)),
    "between two batches that accumulate": ({"accumulate_grad_batches": 2}, Told(2)),
    "before a validation within an epoch": ({"validation": 3, "val_check_interval": 2}, Told(1)),
    "before the validation after an epoch": ({"validation": 3}, Told(3)),
    "the first batch of a validation": ({"validation": 3, "val_check_interval": 2}, Told(2, batch=0)),
    "the last batch of a validation": ({"validation": 3, "val_check_interval": 2}, Told(6, batch=2)),
    "the validation after the last epoch": ({"validation": 3}, Told(8, batch=1)),
    "a validation amid accumulation": (
        {"validation": 3, "val_check_interval": 1, "accumulate_grad_batches": 2},
        Told(0, batch=1),
    ),
    "with a moving average, which is updated after each step": ({"callbacks": [AdapterEMA(0.5)]}, Told(1)),
    "while a moving average is validated": ({"validation": 3, "callbacks": [AdapterEMA(0.5)]}, Told(4, batch=1)),
}


@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_told_to_go_and_resumed_is_the_run_it_would_have_been(run, moment, tmp_path):
    options, told = MOMENTS[moment]
    whole, whole_validations, _ = run("whole", **options)
    first, validations, code = run("resumed", told, **options)
    assert code == 128 + signal.SIGTERM
    second, more, code = run("resumed", **options)
    assert code is None
    assert first.losses + second.losses == whole.losses
    assert validations + more == whole_validations
    assert all(map(torch.equal, second.state_dict().values(), whole.state_dict().values()))
    assert others(tmp_path / "resumed") == others(tmp_path / "whole")


@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")
def test_the_checkpoint_is_whole_and_goes_when_the_fit_ends(run, tmp_path):
    file, folder = tmp_path / "a/preempted.ckpt", tmp_path / "a/preempted.adapter"
    run("a", Told(2))
    assert torch.load(file)["global_step"] == 3
    assert read_tensors(folder / "adapter_model.safetensors")
    run("a")
    assert not file.exists()
    assert not folder.exists()


@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")
def test_sigusr1_is_heard_too(run):
    assert run("a", Told(2, signum=signal.SIGUSR1))[2] == 128 + signal.SIGUSR1


class Handlers(L.Callback):
    """Notes who handles SIGTERM at each stage."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def setup(self, *_: Any, **__: Any) -> None:
        self.seen.append(signal.getsignal(signal.SIGTERM))

    on_fit_start = on_sanity_check_start = on_train_start = on_train_batch_end = on_train_end = setup


@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")
def test_lightnings_own_handler_is_never_in_place(run):
    handlers = Handlers()
    run("a", validation=1, callbacks=[handlers])
    assert len(handlers.seen) == 13
    assert {one.__func__ for one in handlers.seen[1:]} == {PreemptionCheckpoint._note}


def fails(*_: Any) -> None:
    raise ArithmeticError


@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")
def test_signals_are_handed_back_however_the_fit_ends(run, trainer, tmp_path):
    heard: list[int] = []
    before = {one: signal.signal(one, lambda signum, _: heard.append(signum)) for one in (10, 15)}
    handlers = [signal.getsignal(one) for one in (10, 15)]
    try:
        for told in (None, Told(1)):
            run("a", told)
            assert [signal.getsignal(one) for one in (10, 15)] == handlers
        module = Lit()
        module.training_step = fails
        callbacks = [LoRACallback(), PreemptionCheckpoint(tmp_path), ModelCheckpoint(tmp_path)]
        with pytest.raises(ArithmeticError):
            trainer(callbacks=callbacks, enable_checkpointing=True).fit(module, loader(), ckpt_path="last")
        assert [signal.getsignal(one) for one in (10, 15)] == handlers
        assert not (tmp_path / "preempted.ckpt").exists()
        assert not heard
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")
def test_a_test_run_leaves_the_checkpoint_where_it_is(run, trainer, tmp_path):
    run("a", Told(2))
    callbacks = [
        LoRACallback(LoRA(r=2)),
        PreemptionCheckpoint(tmp_path / "a"),
        ModelCheckpoint(tmp_path / "a/others", save_top_k=-1),
    ]
    saved = tmp_path / "a/preempted.ckpt"
    trainer(callbacks=callbacks, enable_checkpointing=True).test(Lit(), loader(), ckpt_path=saved, verbose=False)
    assert saved.exists()


def test_what_lightning_started_leaves_with_zero_as_its_parent_takes_other_codes_for_crashes(monkeypatch):
    from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment

    monkeypatch.setenv("LOCAL_RANK", "1")
    assert _exit_code(LightningEnvironment(), signal.SIGTERM) == 0
    assert _exit_code(TorchElasticEnvironment(), signal.SIGTERM) == 143
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert _exit_code(LightningEnvironment(), signal.SIGTERM) == 143


def scontrol(folder: Path, code: int) -> Path:
    """Put a program there that notes how it was called."""
    program = folder / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {folder}/scontrol.log\necho Invalid job id >&2\nexit {code}\n')
    program.chmod(0o755)
    return folder / "scontrol.log"


def test_a_job_of_an_array_is_requeued_by_its_own_number(tmp_path, monkeypatch):
    log = scontrol(tmp_path, 0)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_JOB_ID", "4219")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4217")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    _requeue()
    assert log.read_text() == "requeue 4217_2\n"
