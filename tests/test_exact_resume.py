"""A resumed run is the uninterrupted one, bit for bit: in its losses, its weights, and the numbers drawn after it.

Every run that is resumed is built anew and starts from other random numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from conftest import Lit, loader, run_processes
from exact_resumes import BATCHES, LOADERS, RUNS, Noisy, Placed, same, train
from ranks import Resumable
from test_preemption import Told
from torch.utils.data import DataLoader, IterableDataset

from lightning_lora import AdapterEMA, LoRA, PreemptionCheckpoint, known_methods
from lightning_lora.callbacks.random_states import _KEY

pytestmark = [
    pytest.mark.xdist_group("test_exact_resume"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
]

EXACT = {"losses": True, "weights": True, "drawn": True}
BOUNDARY, MIDDLE, LAST_BATCH = "epoch=1.ckpt", "step=6.ckpt", "step=12.ckpt"
DROPOUT = LoRA(r=2, dropout=0.5)
DATA = loader(BATCHES).dataset


def plain(**options: Any) -> DataLoader[Any]:
    return DataLoader(DATA, batch_size=4, **options)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(("dropout", "shuffle"), [(0.0, False), (0.5, False), (0.0, True), (0.5, True)])
def test_with_dropout_shuffling_both_and_neither(dropout: float, shuffle: bool, precision: Any, tmp_path: Path) -> None:
    options = {"method": LoRA(r=2, dropout=dropout), "precision": precision}
    for name, batches, moments in (
        ("plain", lambda: plain(shuffle=shuffle), [BOUNDARY]),
        ("placed", lambda: Placed(DATA, shuffle), [BOUNDARY, MIDDLE, LAST_BATCH]),
    ):
        whole = train(tmp_path / name, batches(), **options)
        for moment in moments:
            assert same(train(tmp_path / name, batches(), moment, **options), whole) == EXACT, (name, moment)


@pytest.mark.parametrize(("dropout", "shuffle"), [(0.5, False), (0.0, True)])
@pytest.mark.parametrize("moment", [BOUNDARY, MIDDLE])
def test_without_the_states_it_would_be_another_run(dropout: float, shuffle: bool, moment: str, tmp_path: Path) -> None:
    method = LoRA(r=2, dropout=dropout)
    whole = train(tmp_path, Placed(DATA, shuffle), method=method)
    checkpoint = torch.load(tmp_path / moment)
    del checkpoint[_KEY]
    torch.save(checkpoint, tmp_path / moment)
    with pytest.warns(UserWarning, match="holds no random states"):
        resumed = train(tmp_path, Placed(DATA, shuffle), moment, method=method)
    assert same(resumed, whole) == dict.fromkeys(EXACT, False)


SHORT = {  # so that what a method does once in a while happens before the break and after it
    "AdaLoRA": {"target_r": 1, "initial_steps": 2, "final_steps": 4},
    "DeltaLoRA": {"start_step": 2},
    "LoRADrop": {"sample_steps": 3, "top_n": 1},
    "ReLoRA": {"restart_every": 3, "warmup": 1},
}
METHODS = {name: cls(r=2, **SHORT.get(name, {})) for name, cls in known_methods().items()}


def with_dropout(method: Any) -> Any:
    """Return a method with dropout, unless it refuses it."""
    try:
        return replace(method, dropout=0.5)
    except ValueError:
        return method


@pytest.mark.filterwarnings("ignore:.*dropout")
@pytest.mark.parametrize("name", METHODS)
def test_every_method(name: str, tmp_path: Path) -> None:
    method = with_dropout(METHODS[name])
    whole = train(tmp_path, plain(shuffle=True), method=method)
    assert same(train(tmp_path, plain(shuffle=True), BOUNDARY, method=method), whole) == EXACT


class Drawing(L.Callback):
    """Draws numbers where the uninterrupted run does, and where a resumed run does before it trains."""

    def draw(self, *_: Any) -> None:
        torch.rand(1)

    on_fit_start = on_train_start = on_train_epoch_start = on_train_epoch_end = draw


class Counts(Lit):
    """Asks for the number of steps, for which Lightning makes the training loader's iterator already."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Loads(Lit):
    """Makes its loader anew, and draws a number then."""

    def train_dataloader(self) -> Any:
        torch.rand(1)
        return plain(shuffle=True)


def own_generator() -> Any:
    return plain(shuffle=True, generator=torch.Generator().manual_seed(torch.initial_seed()))


def workers() -> Any:
    return plain(shuffle=True, num_workers=1, persistent_workers=True)


SETTINGS: dict[str, tuple[Any, list[str], dict[str, Any]]] = {
    "examples with noise": (lambda: DataLoader(Noisy(), 4, shuffle=True), [BOUNDARY], {}),
    "examples with noise, in a loader with a place": (lambda: Placed(Noisy(), True), [BOUNDARY, MIDDLE], {}),
    "a loader that goes to its place late": (lambda: Resumable(DATA, 4), [BOUNDARY, MIDDLE, LAST_BATCH], {}),
    "a loader with a generator of its own": (own_generator, [BOUNDARY], {}),
    "workers that stay": (workers, [BOUNDARY], {}),
    "another callback that draws": (lambda: plain(shuffle=True), [BOUNDARY], {"callbacks": (Drawing(),)}),
    "another callback that draws, and a place": (lambda: Placed(DATA, True), [MIDDLE], {"callbacks": (Drawing(),)}),
    "a count of steps before the fit": (lambda: plain(shuffle=True), [BOUNDARY], {"module": Counts}),
    "an end by steps": (lambda: plain(shuffle=True), [BOUNDARY], {"max_steps": 16, "max_epochs": -1}),
    "accumulated gradients": (lambda: plain(shuffle=True), ["epoch=1.ckpt"], {"accumulate_grad_batches": 2}),
    "a new loader every second epoch": (
        lambda: None,
        [BOUNDARY],
        {"module": Loads, "reload_dataloaders_every_n_epochs": 2},
    ),
    "a moving average": (lambda: Placed(DATA, True), [BOUNDARY, MIDDLE], {"callbacks": (AdapterEMA(0.5),)}),
    "validations": (lambda: Placed(DATA, True), [BOUNDARY, MIDDLE], {"validation": loader(2)}),
    "validations within epochs": (
        lambda: Placed(DATA, True),
        [BOUNDARY, "step=9.ckpt"],
        {"validation": loader(2), "val_check_interval": 2},
    ),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_with(setting: str, tmp_path: Path) -> None:
    batches, moments, options = SETTINGS[setting]
    options = {"method": DROPOUT, **options}
    module = options.pop("module", Lit)
    whole = train(tmp_path, batches(), module=module(), **options)
    for moment in moments:
        assert same(train(tmp_path, batches(), moment, module=module(), **options), whole) == EXACT, moment


@pytest.mark.parametrize("options", [{"max_epochs": 5}, {"max_steps": 20, "max_epochs": -1}])
def test_when_what_was_resumed_is_resumed_again(options: dict[str, Any], tmp_path: Path) -> None:
    whole = train(tmp_path, Placed(DATA, True), method=DROPOUT, **options)
    for moment in ("step=3.ckpt", "step=6-v1.ckpt", "epoch=1-v2.ckpt", "step=12-v3.ckpt", "epoch=3-v4.ckpt"):
        again = train(tmp_path, Placed(DATA, True), moment, method=DROPOUT, again=True, **options)
        assert same(again, whole) == EXACT, moment


@pytest.mark.filterwarnings("ignore:.*was called without a model")
@pytest.mark.parametrize("told", [Told(4), Told(6), Told(6, batch=0), Told(8, batch=1)])
def test_where_a_signal_ended_it(told: Told, tmp_path: Path) -> None:
    options = {"method": DROPOUT, "validation": loader(2), "val_check_interval": 2}
    whole = train(tmp_path / "whole", Placed(DATA, True), **options)
    preempted = PreemptionCheckpoint(tmp_path)
    train(tmp_path, Placed(DATA, True), callbacks=(preempted, told), **options)
    again = train(tmp_path, Placed(DATA, True), "preempted.ckpt", callbacks=(preempted,), **options)
    assert same(again, whole) == EXACT


def test_what_is_saved_is_read_without_running_code(tmp_path: Path) -> None:
    train(tmp_path, own_generator())
    [states] = torch.load(tmp_path / BOUNDARY, weights_only=True)[_KEY]
    assert states.keys() == {"torch", "python", "numpy", "generators", "seeds"}
    assert len(states["generators"]) == 1


class Endless(IterableDataset[Any]):
    """Has no length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(DATA)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (plain, "DataLoader cannot go back to its place, so it starts over"),
        (lambda: WithoutLength(Endless(), 4), "without a length, from which Lightning takes one batch ahead"),
    ],
)
def test_a_run_that_cannot_be_exact_says_so(batches: Any, message: str, tmp_path: Path) -> None:
    whole = train(tmp_path, batches())
    with pytest.warns(UserWarning, match=message):
        resumed = train(tmp_path, batches(), MIDDLE)
    assert resumed.losses != whole.losses[6:]
    assert same(train(tmp_path, batches(), BOUNDARY), whole) == EXACT


class WithoutLength(Resumable):
    """Keeps its place, but does not know how many batches it has."""

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    run_processes("exact_resumes.py", folder, 200)
    return folder


@pytest.mark.parametrize("moment", [LAST_BATCH, MIDDLE])
def test_a_validation_that_lightning_leaves_out_is_said(moment: str, tmp_path: Path) -> None:
    options = {"validation": loader(2), "val_check_interval": 2}
    train(tmp_path, Placed(DATA, True), **options)
    with pytest.warns(UserWarning, match="written before a validation that was due"):
        train(tmp_path, Placed(DATA, True), moment, **options)


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_go_on_each_with_its_own_numbers(run: str, processes: Path) -> None:
    both = [json.loads((processes / f"{rank}.json").read_text())[run] for rank in range(2)]
    first, second = (one.pop("own numbers") for one in both)
    loader_name = RUNS[run][0]
    assert (first == second) is (loader_name == "sampled")  # where a global seed was set
    _, checkpoints = LOADERS[loader_name]
    assert both == [dict.fromkeys(checkpoints, EXACT)] * 2


def test_fewer_processes_say_that_they_cannot(processes: Path) -> None:
    said = json.loads((processes / "alone.json").read_text())
    assert sum("holds the random states of 2 processes and this run has 1" in one for one in said) == 1
