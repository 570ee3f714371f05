"""`LoRACallback` beside what users already have: Lightning's callbacks, clipping, module styles, transformers, compile.

One short row each. Whatever else a row shows, the adapters are trained, the base is unchanged bit for bit, and the
checkpoint holds adapters alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import lightning.pytorch as L
import pytest
import torch
import transformers as hf
from conftest import Lit, loader
from lightning.pytorch import callbacks as lc
from lightning.pytorch.loggers.logger import Logger
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim import SGD
from torch.utils.data import DataLoader

from lightning_lora import (
    LoRA,
    LoRACallback,
    inject,
    load_from_checkpoint,
    merge_,
    merged,
    param_groups,
    sites,
    using,
)

METHOD = LoRA(r=2, alpha=4)
RATIO = 4.0
LR = 0.02


def callback(**kwargs: Any) -> LoRACallback:
    return LoRACallback(METHOD, **{"lr_ratio": RATIO} | kwargs)


def sgd(module: nn.Module) -> SGD:
    return SGD(module.parameters(), lr=LR, momentum=0.9)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def adapters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if "adapters" in name}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield every tensor anywhere in a file."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from tensors(inner)


def assert_adapters_alone(path: Path, module: nn.Module) -> None:
    """A checkpoint holds all adapters of a module, and no tensor of its base anywhere."""
    content = torch.load(path, weights_only=True)
    ours = adapters(module.state_dict())
    assert {name for name in content["state_dict"] if "lightning_lora" not in name} == ours.keys()
    base = [tensor for name, tensor in module.state_dict().items() if name not in ours]
    assert not any(one.shape == other.shape and torch.equal(one, other) for one in tensors(content) for other in base)


def assert_composed(module: nn.Module, base: Mapping[str, Tensor], run: L.Trainer, path: Path) -> None:
    """Adapters were trained, nothing else was, and nothing else is saved."""
    state = snapshot(module)
    ours = adapters(state)
    assert ours
    assert [name for name in ours if name.endswith("lora_B") and not ours[name].any()] == []
    assert same({name: tensor for name, tensor in state.items() if name not in ours}, base)
    run.save_checkpoint(path)
    assert_adapters_alone(path, module)


def by_hand(
    module: Any,
    *,
    clip: Callable[[list[Tensor]], Any] = lambda parameters: None,
    accumulate: tuple[int, int] = (1, 1),
    **lora: Any,
) -> Any:
    """Train for two epochs without Trainer and callback: inject, an ordinary optimizer, a loop.

    Args:
        module: Gives the loss of a batch.
        clip: Changes the gradients before each step.
        accumulate: Batches per step, in either epoch.
        lora: What ``inject`` takes.
    """
    inject(module, METHOD, seed=0, **lora)
    optimizer = SGD(param_groups(module, LR, lr_ratio=RATIO), momentum=0.9)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for count in accumulate:
        for index, batch in enumerate(loader()):
            loss = module.loss(batch)
            module.losses.append(loss.item())
            (loss / count).backward()
            if (index + 1) % count == 0:
                clip(parameters)
                optimizer.step()
                optimizer.zero_grad()
    return module


# ---- Lightning's callbacks


class Log(Logger):
    """A logger that keeps what it is given."""

    name = version = "log"

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.seen.append(dict(metrics))

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    def values(self, name: str) -> list[float]:
        return [metrics[name] for metrics in self.seen if name in metrics]


class Records(L.Callback):
    """Keeps the state as epochs start and batches end, and the learning rates before and in every step."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, Tensor]] = []
        self.batches: list[dict[str, Tensor]] = []
        self.rates: list[list[tuple[str | None, float]]] = []
        self.shown: list[list[float]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(self.on_step)

    def on_step(self, optimizer: Any, *_: Any) -> None:
        self.rates.append([(group.get("lora_role"), group["lr"]) for group in optimizer.param_groups])

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.epochs.append(snapshot(pl_module))

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.shown.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.batches.append(snapshot(pl_module))


class Tuned(Lit):
    """Has what Lightning tunes, and data that depend on it."""

    def __init__(self, lr: float = LR, batch_size: int = 2) -> None:
        super().__init__(lambda module: SGD(module.parameters(), lr=module.lr, momentum=0.9))
        self.lr, self.batch_size = lr, batch_size

    def train_dataloader(self) -> Any:
        return loader(32 // self.batch_size, self.batch_size)

    def val_dataloader(self) -> Any:
        return loader()


class Run(NamedTuple):
    """A fit that is over, and how to do others like it."""

    module: Any
    trainer: L.Trainer
    theirs: Any
    records: Records
    fit: Callable[..., Any]
    folder: Path

    @property
    def log(self) -> Log:
        return self.trainer.logger  # type: ignore[return-value]


def changes_nothing(run: Run) -> None:
    """The training is the same, bit for bit, as without it."""
    plain = run.fit([])
    assert run.module.losses == plain.module.losses
    assert same(snapshot(run.module), snapshot(plain.module))


def shows_device_statistics(run: Run) -> None:
    changes_nothing(run)
    assert any("cpu_percent" in name for metrics in run.log.seen for name in metrics)


def shows_throughput(run: Run) -> None:
    changes_nothing(run)
    assert run.log.values("train/samples") == [4 * batch for batch in range(1, 9)]


def measures_time(run: Run) -> None:
    changes_nothing(run)
    assert run.theirs.time_elapsed("train") > 0


def reports_no_spike(run: Run) -> None:
    changes_nothing(run)
    assert run.theirs.bad_batches == []
    assert run.theirs.last_val == run.module.losses[-1]


def stops_after_two_epochs(run: Run) -> None:
    assert len(run.module.losses) == 8
    assert same(snapshot(run.module), snapshot(run.fit([], max_epochs=2).module))


def finds_a_rate_and_trains_at_it(run: Run) -> None:
    assert run.module.lr != LR
    plain = run.fit([], make=lambda: Tuned(lr=run.module.lr))
    assert run.module.losses[-len(plain.module.losses) :] == plain.module.losses
    assert same(snapshot(run.module), snapshot(plain.module))
    assert run.records.rates == [[(None, run.module.lr), ("B", RATIO * run.module.lr)]] * 32


def finds_a_batch_size_and_trains_with_it(run: Run) -> None:
    assert run.module.batch_size == 4
    plain = run.fit([], make=lambda: Tuned(batch_size=4))
    assert run.module.losses[-16:] == plain.module.losses
    assert same(snapshot(run.module), snapshot(plain.module))


def accumulates_as_by_hand(run: Run) -> None:
    reference = by_hand(Lit(), accumulate=(2, 1))
    assert run.module.losses == reference.losses
    assert same(snapshot(run.module), snapshot(reference))


def sees_gradients_of_adapters_alone(run: Run) -> None:
    assert run.theirs.seen == [set(adapters(run.module.state_dict()))] * 8
    changes_nothing(run)


def shows_each_group(run: Run) -> None:
    rates = run.log.values("lr-SGD/pg1")
    assert rates == [LR, LR, LR, LR, LR / 2, LR / 2, LR / 2, LR / 2]
    assert run.log.values("lr-SGD/pg1.lora_B") == [RATIO * rate for rate in rates]


def keeps_the_two_best_and_the_last(run: Run) -> None:
    files = sorted(path.name for path in (run.folder / "saved").iterdir())
    kept = ["epoch=1", "epoch=2", "last"]
    assert files == sorted(f"{name}.{kind}" for name in kept for kind in ("adapter", "ckpt"))
    for name in kept:
        assert_adapters_alone(run.folder / "saved" / f"{name}.ckpt", run.module)
    assert run.theirs.best_model_path == str(run.folder / "saved" / "epoch=2.ckpt")
    assert same(snapshot(load_from_checkpoint(Lit, run.theirs.best_model_path)), snapshot(run.module))


def keeps_every_third_step(run: Run) -> None:
    for step in (3, 6):
        path = run.folder / "saved" / f"step={step}.ckpt"
        assert_adapters_alone(path, run.module)
        assert same(snapshot(load_from_checkpoint(Lit, path)), run.records.batches[step - 1])
        assert path.with_suffix(".adapter").is_dir()
    assert len(list((run.folder / "saved").iterdir())) == 4


def counts_the_adapters(run: Run) -> None:
    trainable, base = 2 * (4 + 8) + 2 * (8 + 3), 4 * 8 + 8 + 8 * 3 + 3
    assert run.theirs.counted == [(trainable, base + trainable)]
    changes_nothing(run)


def saves_what_an_exception_interrupts(run: Run) -> None:
    def stop(*_: Any) -> None:
        raise ArithmeticError("boom")

    path = run.folder / "failed.ckpt"
    theirs = lc.OnExceptionCheckpoint(run.folder, "failed")
    with pytest.raises(ArithmeticError, match="boom"):
        run.fit([theirs, lc.LambdaCallback(on_validation_end=stop)], num_sanity_val_steps=0)
    interrupted = load_from_checkpoint(Lit, path)
    assert_adapters_alone(path, interrupted)
    assert path.with_suffix(".adapter").is_dir()
    assert same(snapshot(interrupted), run.records.batches[3])
    resumed = run.fit([], ckpt_path=path)
    assert run.module.losses[4:] == resumed.module.losses
    assert same(snapshot(resumed.module), snapshot(run.module))


def writes_what_the_adapted_module_predicts(run: Run) -> None:
    run.trainer.predict(run.module, loader(), return_predictions=False)
    run.module.eval()
    with torch.no_grad():
        expected = [run.module(x) for x, _ in loader()]
    assert len(run.theirs.written) == 4
    assert all(torch.equal(one, other) for one, other in zip(run.theirs.written, expected, strict=True))


def averages_exponentially(run: Run) -> None:
    first, *rest = map(adapters, run.records.batches)
    for state in rest:
        first = {name: 0.9 * first[name] + (1 - 0.9) * state[name] for name in first}
    assert same(adapters(snapshot(run.module)), first)


def averages_epochs_in_a_way_of_its_own(run: Run) -> None:
    first, *rest = map(adapters, run.records.epochs)
    for state in rest:
        first = {name: 0.9 * first[name] + 0.1 * state[name] for name in first}
    assert same(adapters(snapshot(run.module)), first)


def averages_equally(run: Run, states: list[dict[str, Tensor]] | None = None) -> None:
    first, *rest = map(adapters, states or run.records.batches)
    for count, state in enumerate(rest, start=1):
        first = {name: first[name] + (state[name] - first[name]) / (count + 1) for name in first}
    assert same(adapters(snapshot(run.module)), first)


def averages_epochs_under_its_own_rates(run: Run) -> None:
    averages_equally(run, run.records.epochs)
    unsplit = run.fit([lc.StochasticWeightAveraging(run.theirs._swa_lrs[:2], 1)], lora={"lr_ratio": 1.0})
    users = [[rate for role, rate in rates if role is None] for rates in run.records.rates]
    derived = [[rate for role, rate in rates if role == "B"] for rates in run.records.rates]
    assert users == [[rate for _, rate in rates] for rates in unsplit.records.rates]
    assert derived == [[RATIO * rate for rate in rates] for rates in users]
    assert max(users[-1]) < 0.99 * LR, "they fall"
    used = [rate for rates in run.records.rates for _, rate in rates]
    assert [rate for rates in run.records.shown for rate in rates] == pytest.approx(used, rel=1e-12)


def watching() -> Any:
    """Return a callback that notes, before every step, which parameters have a gradient."""
    seen: list[set[str]] = []

    def note(trainer: L.Trainer, module: nn.Module, optimizer: Any) -> None:
        seen.append({name for name, parameter in module.named_parameters() if parameter.grad is not None})

    theirs = lc.LambdaCallback(on_before_optimizer_step=note)
    theirs.seen = seen  # type: ignore[attr-defined]
    return theirs


def counting(cls: Any) -> Any:
    """Return a summary that notes what it is to show."""
    counted: list[tuple[int, int]] = []

    def summarize(data: Any, total: int, trainable: int, *rest: Any, **options: Any) -> None:
        counted.append((trainable, total))
        cls.summarize(data, total, trainable, *rest, **options)

    return type(cls.__name__, (cls,), {"summarize": staticmethod(summarize), "counted": counted})(max_depth=-1)


class Writes(lc.BasePredictionWriter):
    def __init__(self) -> None:
        super().__init__("batch")
        self.written: list[Any] = []

    def write_on_batch_end(self, trainer: Any, module: Any, prediction: Any, *_: Any) -> None:
        self.written.append(prediction)


def halved(module: nn.Module) -> Any:
    optimizer = sgd(module)
    return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def by_layer(module: Any) -> SGD:
    return SGD([{"params": layer.parameters()} for layer in (module.net.first, module.net.second)], lr=LR)


class Costs(Lit):
    flops_per_batch = 100


class Row(NamedTuple):
    """A callback of Lightning, and what is to be seen when ``LoRACallback`` runs beside it."""

    theirs: Callable[[Path], Any]
    point: Callable[[Run], None]
    options: Mapping[str, Any] = MappingProxyType({})
    make: Callable[[], Any] = lambda: Lit(sgd)
    data: Callable[[], tuple[Any, ...]] = lambda: (loader(), loader())
    only_first: bool = False


SAVES = MappingProxyType({"enable_checkpointing": True})
LOGS = MappingProxyType({"logger": True, "log_every_n_steps": 1})
SHOWS = MappingProxyType({"enable_progress_bar": True})

ROWS = {
    "BasePredictionWriter": Row(lambda _: Writes(), writes_what_the_adapted_module_predicts),
    "BatchSizeFinder": Row(
        lambda _: lc.BatchSizeFinder(max_trials=2, steps_per_trial=2),
        finds_a_batch_size_and_trains_with_it,
        make=Tuned,
        data=tuple,
    ),
    "DeviceStatsMonitor": Row(lambda _: lc.DeviceStatsMonitor(cpu_stats=True), shows_device_statistics, LOGS),
    "EarlyStopping": Row(
        lambda _: lc.EarlyStopping("val_loss", mode="max", patience=1), stops_after_two_epochs, {"max_epochs": 4}
    ),
    "EMAWeightAveraging": Row(lambda _: lc.EMAWeightAveraging(decay=0.9), averages_exponentially, only_first=True),
    "GradientAccumulationScheduler": Row(
        lambda _: lc.GradientAccumulationScheduler({0: 2, 1: 1}), accumulates_as_by_hand
    ),
    "LambdaCallback": Row(lambda _: watching(), sees_gradients_of_adapters_alone),
    "LearningRateFinder": Row(
        lambda _: lc.LearningRateFinder(1e-4, 1.0, num_training_steps=16, early_stop_threshold=None),
        finds_a_rate_and_trains_at_it,
        make=Tuned,
        data=tuple,
    ),
    "LearningRateMonitor": Row(
        lambda _: lc.LearningRateMonitor("step"), shows_each_group, LOGS, make=lambda: Lit(halved)
    ),
    "ModelCheckpoint: the two best and the last": Row(
        lambda folder: lc.ModelCheckpoint(
            folder / "saved", "{epoch}", monitor="val_loss", save_top_k=2, save_last=True, mode="min"
        ),
        keeps_the_two_best_and_the_last,
        SAVES | {"max_epochs": 3},
    ),
    "ModelCheckpoint: every third step": Row(
        lambda folder: lc.ModelCheckpoint(folder / "saved", "{step}", every_n_train_steps=3, save_top_k=-1),
        keeps_every_third_step,
        SAVES,
    ),
    "ModelSummary": Row(lambda _: counting(lc.ModelSummary), counts_the_adapters),
    "OnExceptionCheckpoint": Row(
        lambda folder: lc.OnExceptionCheckpoint(folder, "none"), saves_what_an_exception_interrupts, SAVES
    ),
    "RichModelSummary": Row(lambda _: counting(lc.RichModelSummary), counts_the_adapters),
    "RichProgressBar": Row(lambda _: lc.RichProgressBar(), changes_nothing, SHOWS),
    "SpikeDetection": Row(lambda _: lc.SpikeDetection(), reports_no_spike),
    "StochasticWeightAveraging: an average of its own": Row(
        lambda _: lc.StochasticWeightAveraging(0.02, 1, avg_fn=lambda one, other, _: 0.9 * one + 0.1 * other),
        averages_epochs_in_a_way_of_its_own,
        {"max_epochs": 3},
        only_first=True,
    ),
    "StochasticWeightAveraging: one rate": Row(
        lambda _: lc.StochasticWeightAveraging(0.01, 1),
        averages_epochs_under_its_own_rates,
        only_first=True,
        make=lambda: Lit(by_layer),
    ),
    "StochasticWeightAveraging: a rate for each of the user's groups": Row(
        lambda _: lc.StochasticWeightAveraging([0.01, 0.005], 1),
        averages_epochs_under_its_own_rates,
        make=lambda: Lit(by_layer),
        only_first=True,
    ),
    "ThroughputMonitor": Row(
        lambda _: lc.ThroughputMonitor(lambda batch: len(batch[0])), shows_throughput, LOGS, make=lambda: Costs(sgd)
    ),
    "Timer": Row(lambda _: lc.Timer("00:01:00:00"), measures_time),
    "TQDMProgressBar": Row(lambda _: lc.TQDMProgressBar(), changes_nothing, SHOWS),
    "WeightAveraging": Row(lambda _: lc.WeightAveraging(), averages_equally, only_first=True),
}


@pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called without a model")  # OnExceptionCheckpoint's
@pytest.mark.filterwarnings("ignore:.fit.ckpt_path=.last.. is set, but there is no last checkpoint")  # likewise
@pytest.mark.parametrize(
    ("name", "first"),
    [(name, first) for name, row in ROWS.items() for first in (True, False) if first or not row.only_first],
)
def test_a_callback_of_lightning_does_what_it_is_for(name: str, first: bool, trainer: Any, tmp_path: Path) -> None:
    row = ROWS[name]

    def fit(theirs: list[Any], make: Any = row.make, lora: Any = None, ckpt_path: Any = None, **options: Any) -> Run:
        torch.manual_seed(0)
        module, records, ours = make(), Records(), callback(**lora or {})
        options = {**row.options, **options}
        if options.get("logger"):
            options["logger"] = Log()
        run = trainer(callbacks=[*([ours, *theirs] if first else [*theirs, ours]), records], **options)
        run.fit(module, *row.data(), ckpt_path=ckpt_path)
        return Run(module, run, theirs[0] if theirs else None, records, fit, tmp_path)

    base = snapshot(row.make())
    done = fit([row.theirs(tmp_path)])
    assert_composed(done.module, base, done.trainer, tmp_path / "end.ckpt")
    row.point(done)


class Refused(NamedTuple):
    """A callback of Lightning that stops the run at once, and a part of the message."""

    theirs: Callable[[], Any]
    message: str
    first: bool = True


REFUSED = {
    "BackboneFinetuning": Refused(
        lambda: lc.BackboneFinetuning(1), r"^BackboneFinetuning freezes and thaws layers.*modules_to_save=\[\.\.\.\]"
    ),
    "BaseFinetuning": Refused(
        lambda: type("Unfreezes", (lc.BaseFinetuning,), {"freeze_before_training": lambda *_: None})(),
        "^Unfreezes freezes and thaws layers, as LoRACallback does",
    ),
    "EMAWeightAveraging": Refused(lc.EMAWeightAveraging, "put LoRACallback before it", first=False),
    "ModelPruning": Refused(
        lambda: lc.ModelPruning("l1_unstructured"),
        r"^ModelPruning .* checkpoints do not hold the base: .* merge_\(model\)",
    ),
    "StochasticWeightAveraging": Refused(
        lambda: lc.StochasticWeightAveraging(0.02), "put LoRACallback before it", first=False
    ),
    "WeightAveraging": Refused(lc.WeightAveraging, "put LoRACallback before it", first=False),
}


class Named(Lit):
    """Has a backbone, as ``BackboneFinetuning`` wants it."""

    @property
    def backbone(self) -> nn.Module:
        return self.net.first


@pytest.mark.parametrize("name", REFUSED)
def test_a_callback_of_lightning_that_would_undo_ours_is_refused(name: str, trainer: Any) -> None:
    row = REFUSED[name]
    for ours_first in {row.first, False}:
        both = [callback(), row.theirs()] if ours_first else [row.theirs(), callback()]
        module = Named()
        with pytest.raises(ValueError, match=row.message):
            trainer(callbacks=both).fit(module, loader())
        assert module.losses == []


def test_every_callback_of_lightning_has_a_row() -> None:
    bases = {"Callback", "Checkpoint", "ProgressBar"}
    assert {name.partition(":")[0] for name in (*ROWS, *REFUSED)} | bases == set(lc.__all__)


class Thaws(Lit):
    """Trains its last layer in full from the second epoch on, in a group of its own."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.thawed = list(self.net.second.requires_grad_(True).parameters())[:2]
            self.trainer.optimizers[0].add_param_group({"params": self.thawed, "lr": LR / 10})


def test_a_group_that_the_module_adds_in_mid_run_keeps_its_place_behind_the_others(trainer: Any) -> None:
    module = Thaws(halved)
    run = trainer(callbacks=[callback()], max_epochs=3)
    run.fit(module, loader())
    groups = run.optimizers[0].param_groups
    assert [group.get("lora_role") for group in groups] == [None, "B", None]
    assert groups[-1]["params"] == module.thawed
    assert [group["lr"] for group in groups] == pytest.approx([LR / 8, RATIO * LR / 8, LR / 10 / 4])


# ---- the Trainer's options, and the module's style


def clip_norm(parameters: list[Tensor]) -> None:
    nn.utils.clip_grad_norm_(parameters, 0.05)


def clip_value(parameters: list[Tensor]) -> None:
    nn.utils.clip_grad_value_(parameters, 0.01)


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clipping by norm": ({"gradient_clip_val": 0.05}, {"clip": clip_norm}),
    "clipping by value": ({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, {"clip": clip_value}),
    "accumulation": ({"accumulate_grad_batches": 2}, {"accumulate": (2, 2)}),
    "accumulation and clipping": (
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
        {"accumulate": (2, 2), "clip": clip_norm},
    ),
    "anomaly detection": ({"detect_anomaly": True}, {}),
    "profiler": ({"profiler": "simple"}, {}),
    "no inference mode": ({"inference_mode": False}, {}),
    "barebones": ({"barebones": True}, {}),
}


@pytest.mark.filterwarnings("ignore:.*barebones=True", "ignore:Anomaly Detection has been enabled")  # they say so
@pytest.mark.parametrize("name", OPTIONS)
def test_a_trainer_with_an_option_trains_as_a_loop_by_hand(name: str, trainer: Any, tmp_path: Path) -> None:
    options, reference = OPTIONS[name]
    module, hand = Lit(sgd), by_hand(Lit(), **reference)
    base = snapshot(module)
    run = trainer(callbacks=[callback()], **options)
    run.fit(module, loader(), loader())
    assert module.losses == hand.losses
    assert same(snapshot(module), snapshot(hand))
    assert not reference or module.losses != by_hand(Lit()).losses, "the option shows"
    assert_composed(module, base, run, tmp_path / "end.ckpt")


class ByHand(Lit):
    """Manual optimization with clipping."""

    def __init__(self) -> None:
        super().__init__(sgd)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
        optimizer.step()


class Distils(Lit):
    """A student that a frozen teacher teaches."""

    def __init__(self) -> None:
        super().__init__(sgd)
        self.teacher = self.build().requires_grad_(False).eval()
        self.student = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        del self.net

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self.student(batch[0]), self.teacher(batch[0]))


class Contrasts(Lit):
    """Two towers that share their encoder, each with a projection of its own."""

    def __init__(self) -> None:
        super().__init__(sgd)
        self.image = nn.Sequential(self.net, nn.Linear(3, 3))
        self.text = nn.Sequential(self.net, nn.Linear(3, 3))
        del self.net

    def loss(self, batch: Any) -> Tensor:
        similar = self.image(batch[0]) @ self.text(batch[0].flip(1)).T
        return nn.functional.cross_entropy(similar, torch.arange(len(similar)))


class Style(NamedTuple):
    """A module in some style, the names of its adapted layers, and what a loop by hand does alike."""

    make: Callable[[], Any]
    names: tuple[str, ...]
    lora: Mapping[str, Any] = MappingProxyType({})
    hand: Mapping[str, Any] = MappingProxyType({})


STYLES = {
    "manual optimization with clipping": Style(ByHand, ("net.first", "net.second"), hand={"clip": clip_norm}),
    "frozen teacher": Style(Distils, ("student.0", "student.2"), {"exclude_modules": ["teacher"]}),
    "two towers, one encoder": Style(Contrasts, ("image.0.first", "image.0.second", "image.1", "text.1")),
}


@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode at the start of training")  # the teacher
@pytest.mark.parametrize("name", STYLES)
def test_a_module_in_a_style_of_its_own_trains_as_a_loop_by_hand(name: str, trainer: Any, tmp_path: Path) -> None:
    style = STYLES[name]

    def make() -> Any:
        torch.manual_seed(0)
        return style.make()

    module, hand = make(), by_hand(make(), **style.hand, **style.lora)
    base = snapshot(module)
    run = trainer(callbacks=[callback(**style.lora)])
    run.fit(module, loader())
    assert [site.name for site in sites(module)] == [f"{layer}.weight" for layer in style.names]
    assert module.losses == hand.losses
    assert same(snapshot(module), snapshot(hand))
    assert_composed(module, base, run, tmp_path / "end.ckpt")
    torch.manual_seed(0)
    assert same(snapshot(load_from_checkpoint(style.make, tmp_path / "end.ckpt")), snapshot(module))


class Adversaries(L.LightningModule):
    """A GAN: two optimizers that are toggled."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 4))
        self.critic = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.losses: list[tuple[float, float]] = []

    def generator_loss(self, x: Tensor) -> Tensor:
        return -self.critic(self.generator(x[:, :2])).mean()

    def critic_loss(self, x: Tensor) -> Tensor:
        return nn.functional.softplus(self.critic(self.generator(x[:, :2]).detach()) - self.critic(x)).mean()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        losses = []
        for optimizer, loss_of in zip(self.optimizers(), (self.generator_loss, self.critic_loss), strict=True):
            self.toggle_optimizer(optimizer)
            loss = loss_of(batch[0])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
            losses.append(loss.item())
        self.losses.append((losses[0], losses[1]))

    def configure_optimizers(self) -> Any:
        return [sgd(self.generator), sgd(self.critic)]


def test_a_gan_with_two_optimizers_trains_as_a_loop_by_hand(trainer: Any, tmp_path: Path) -> None:
    def make() -> Adversaries:
        torch.manual_seed(0)
        return Adversaries()

    module, hand = make(), make()
    base = snapshot(module)
    run = trainer(callbacks=[callback()])
    run.fit(module, loader())
    inject(hand, METHOD, seed=0)
    nets = (hand.generator, hand.critic)
    optimizers = [SGD(param_groups(net, LR, lr_ratio=RATIO), momentum=0.9) for net in nets]
    losses = []
    for _ in range(2):
        for x, _ in loader():
            for optimizer, loss_of in zip(optimizers, (hand.generator_loss, hand.critic_loss), strict=True):
                loss = loss_of(x)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
    assert [loss for both in module.losses for loss in both] == losses
    assert same(snapshot(module), snapshot(hand))
    assert_composed(module, base, run, tmp_path / "end.ckpt")


# ---- models of transformers

SIZES = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IDS = torch.arange(3, 19).repeat(2).view(4, 8)[:, :6]
TEXT = {"input_ids": IDS, "labels": IDS.flip(0)}
CLASSES = torch.tensor([0, 1, 1, 0])
NOISE = torch.linspace(-2, 2, 512).sin()


def bert() -> Any:
    return hf.BertForSequenceClassification(hf.BertConfig(**SIZES))


def gpt2() -> Any:
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=16, **TOKENS))


def llama() -> Any:
    config = hf.LlamaConfig(**SIZES, **TOKENS, num_key_value_heads=2, tie_word_embeddings=True, attention_dropout=0.1)
    return hf.LlamaForCausalLM(config)


def t5() -> Any:
    config = hf.T5Config(
        vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return hf.T5ForConditionalGeneration(config)


def vit() -> Any:
    config = hf.ViTConfig(**SIZES, image_size=8, patch_size=4, num_channels=1, hidden_dropout_prob=0.1)
    return hf.ViTForImageClassification(config)


def whisper() -> Any:
    layers = {f"{part}_{what}": size for part in ("encoder", "decoder") for what, size in WHISPER.items()}
    config = hf.WhisperConfig(
        vocab_size=20,
        d_model=16,
        num_mel_bins=8,
        max_source_positions=8,
        max_target_positions=16,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        dropout=0.1,
        **layers,
        **TOKENS,
    )
    return hf.WhisperForConditionalGeneration(config)


WHISPER = {"layers": 1, "attention_heads": 2, "ffn_dim": 32}


class Model(NamedTuple):
    """A tiny model with random weights, the layers to adapt, how many there are, and a batch."""

    build: Callable[[], Any]
    layers: list[str]
    count: int
    batch: dict[str, Tensor]

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.batch.items() if name != "labels"}


MODELS = {
    "BERT": Model(bert, ["query", "value"], 4, {"input_ids": IDS, "labels": CLASSES}),
    "GPT-2": Model(gpt2, ["c_attn", "attn.c_proj"], 4, TEXT),
    "Llama with grouped queries and tied embeddings": Model(llama, ["q_proj", "k_proj", "v_proj", "o_proj"], 8, TEXT),
    "T5": Model(t5, ["q", "v"], 6, TEXT),
    "ViT": Model(vit, ["q_proj", "v_proj"], 4, {"pixel_values": NOISE[:256].view(4, 1, 8, 8), "labels": CLASSES}),
    "Whisper": Model(whisper, ["q_proj", "v_proj"], 6, {"input_features": NOISE.view(4, 8, 16), "labels": IDS}),
}


class Wraps(L.LightningModule):
    """A model of transformers in a LightningModule; it counts how often its adapted layers run."""

    def __init__(self, build: Callable[[], Any], checkpointing: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = build()
        if checkpointing:  # its name has changed
            enable = getattr(self.model, "activation_checkpointing_enable", None)
            (enable or self.model.gradient_checkpointing_enable)({"use_reentrant": False})
        self.losses: list[float] = []
        self.runs = 0

    def on_train_start(self) -> None:
        for site in sites(self):
            site.module.register_forward_hook(self.count)

    def count(self, *_: Any) -> None:
        self.runs += 1

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


@pytest.mark.parametrize("name", MODELS)
def test_attention_of_a_model_of_transformers_trains_the_same_with_activation_checkpointing(
    name: str, trainer: Any, tmp_path: Path
) -> None:
    one = MODELS[name]
    rows = [{key: tensor[i] for key, tensor in one.batch.items()} for i in range(4)]
    plain, checkpointed = Wraps(one.build), Wraps(one.build, checkpointing=True)
    for module in (plain, checkpointed):
        base = snapshot(module)
        run = trainer(callbacks=[LoRACallback(LoRA(r=2, dropout=0.1), one.layers)], max_epochs=1)
        torch.manual_seed(1)
        run.fit(module, DataLoader(rows, batch_size=2))
        assert_composed(module, base, run, tmp_path / "end.ckpt")
        assert len(sites(module)) == one.count
    assert checkpointed.losses == plain.losses
    assert same(snapshot(checkpointed), snapshot(plain))
    assert (plain.runs, checkpointed.runs) == (2 * one.count, 4 * one.count)


def adapted(one: Model) -> Any:
    """Return a model with adapters that change what it computes."""
    torch.manual_seed(0)
    model = one.build().eval()
    for site in inject(model, METHOD, one.layers):
        nn.init.normal_(site.adapter("default").lora_B, std=3.0)
    return model


@torch.no_grad()
def logits(model: Any, one: Model) -> Tensor:
    return model(**one.batch).logits


@pytest.mark.parametrize("name", MODELS)
def test_save_pretrained_writes_the_base_under_its_own_names_and_merged_a_plain_model(
    name: str, tmp_path: Path
) -> None:
    one = MODELS[name]
    torch.manual_seed(0)
    plain, model = one.build().eval(), adapted(one)
    plain.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "adapted")
    expected, written = (load_file(tmp_path / folder / "model.safetensors") for folder in ("plain", "adapted"))
    assert same({key: tensor for key, tensor in written.items() if "adapters" not in key}, expected)
    base = type(plain).from_pretrained(tmp_path / "adapted")
    assert same(base.state_dict(), plain.state_dict())
    assert torch.equal(logits(base, one), logits(plain, one))

    before = logits(model, one)
    merge_(model).save_pretrained(tmp_path / "merged")
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == expected.keys()
    again = type(plain).from_pretrained(tmp_path / "merged")
    assert same(again.state_dict(), model.state_dict())
    assert torch.equal(logits(again, one), logits(model, one))
    torch.testing.assert_close(logits(again, one), before, rtol=0, atol=1e-5)
    assert (logits(plain, one) - before).abs().max() > 1e-3, "the adapters show"


@pytest.mark.parametrize("name", [name for name, one in MODELS.items() if one.build not in (bert, vit)])
def test_generate_gives_the_tokens_of_the_merged_model(name: str) -> None:
    one = MODELS[name]
    model = adapted(one)

    def tokens() -> Any:
        return model.generate(**one.inputs, max_new_tokens=6, do_sample=False).tolist()

    found = tokens()
    with merged(model):
        assert tokens() == found
    with using(model):
        assert tokens() != found


# ---- torch.compile


class Compiles(Lit):
    """Compiles something at some moment: ``__init__`` and ``configure_model`` come before injection, the rest after.

    Args:
        what: Does it.
        moment: The hook.
        backend: For ``torch.compile``.
    """

    def __init__(self, what: Callable[[Any, str], None], moment: str, backend: str) -> None:
        super().__init__(sgd)
        self.what, self.moment, self.backend = what, moment, backend
        self.reach("__init__")

    def reach(self, moment: str) -> None:
        if moment == self.moment:
            self.what(self, self.backend)

    def configure_model(self) -> None:
        self.reach("configure_model")

    def on_fit_start(self) -> None:
        self.reach("on_fit_start")

    def on_train_start(self) -> None:
        self.reach("on_train_start")


def network(module: Any, backend: str) -> None:
    module.net = torch.compile(module.net, backend=backend)


def network_in_place(module: Any, backend: str) -> None:
    module.net.compile(backend=backend)


def layer_in_place(module: Any, backend: str) -> None:
    module.net.first.compile(backend=backend)


def loss_function(module: Any, backend: str) -> None:
    module.loss = torch.compile(module.loss, backend=backend)


COMPILED = [
    (network, "__init__", "aot_eager"),
    (network, "configure_model", "eager"),
    (network, "on_fit_start", "eager"),
    (network, "on_train_start", "aot_eager"),
    (network_in_place, "__init__", "eager"),
    (network_in_place, "on_train_start", "eager"),
    (layer_in_place, "__init__", "eager"),
    (layer_in_place, "on_train_start", "eager"),
    (loss_function, "__init__", "eager"),
    (loss_function, "on_train_start", "eager"),
]


def plainly_named(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}


@pytest.mark.parametrize(("what", "moment", "backend"), COMPILED)
def test_what_is_compiled_before_or_after_injection_trains_in_one_graph_as_what_is_not(
    what: Any, moment: str, backend: str, trainer: Any, tmp_path: Path
) -> None:
    torch._dynamo.reset()
    counters.clear()
    plain, module = Lit(sgd), Compiles(what, moment, backend)
    base = snapshot(plain)
    run = trainer(callbacks=[callback()])
    run.fit(module, loader())
    trainer(callbacks=[callback()]).fit(plain, loader())
    assert counters["stats"]["unique_graphs"] == 1
    assert module.losses == plain.losses
    assert same(plainly_named(snapshot(module)), snapshot(plain))
    wrapped = "_orig_mod" in "".join(module.state_dict())
    assert wrapped == (what is network)
    if wrapped:
        base = {name.replace("net.", "net._orig_mod."): tensor for name, tensor in base.items()}
    assert_composed(module, base, run, tmp_path / "end.ckpt")


class Silent(Lit):
    """Neither keeps nor logs its loss: Lightning cannot log from a compiled step under PyTorch 2.13."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)


@pytest.mark.parametrize("before", [True, False])
def test_a_module_that_is_compiled_as_a_whole_before_or_after_injection_trains_in_one_graph_as_one_that_is_not(
    before: bool, trainer: Any, tmp_path: Path
) -> None:
    torch._dynamo.reset()
    counters.clear()
    plain, module = Silent(sgd), Silent(sgd)
    base = snapshot(plain)
    if not before:
        inject(module, METHOD, seed=0)
    run = trainer(callbacks=[callback()])
    run.fit(torch.compile(module, backend="eager"), loader())
    trainer(callbacks=[callback()]).fit(plain, loader())
    assert counters["stats"]["unique_graphs"] == 1
    assert same(snapshot(module), snapshot(plain))
    assert_composed(module, base, run, tmp_path / "end.ckpt")
