"""Looking at batches of the training data in mid-run, or before it, leaves no trace in the run."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from conftest import Lit, loader
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lightning_lora.callbacks.silent_batches import silent_losses


class Noisy(Lit):
    """Has everything that a look could disturb: dropout, batch norm, a metric, logs, shuffled data of its own."""

    def __init__(self, own_generator: bool = False, workers: int = 0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.mean = MeanMetric()
        self.generator = torch.Generator().manual_seed(5) if own_generator else None
        self.workers = workers
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.norm(self.net(x)), 0.3, self.training)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.calls += 1
        self.mean(loss)
        self.log("train_loss", loss)
        self.log_dict({"mean": self.mean}, on_step=True, on_epoch=True)
        return loss

    def train_dataloader(self) -> DataLoader[Any]:
        workers: dict[str, Any] = {"num_workers": self.workers, "persistent_workers": True} if self.workers else {}
        return DataLoader(loader().dataset, batch_size=4, shuffle=True, generator=self.generator, **workers)


class Looks(L.Callback):
    """Looks at batches at one of the two moments.

    Args:
        when: ``"middle"`` of the first epoch, ``"before"`` there are optimizers, or ``"never"``.
        batches: How many.
        left: How many more it asks for, and closes.
    """

    def __init__(self, when: str, batches: int = 3, left: int = 0) -> None:
        self.when = when
        self.left = left
        self.batches = batches
        self.losses: list[float] = []
        self.modes: list[bool] = []
        self.gradient: float | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.when == "before":
            pl_module.__dict__["configure_model"] = lambda: self.look(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if self.when == "middle" and trainer.global_step == 2:
            self.look(trainer, pl_module)

    def look(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.__dict__.pop("configure_model", None)
        losses = silent_losses(trainer, pl_module, self.batches + self.left)
        for loss in islice(losses, self.batches):
            loss.backward()
            self.losses.append(loss.item())
            self.modes.append(pl_module.training)
        losses.close()
        weight = pl_module.net.first.weight
        self.gradient = weight.grad.abs().sum().item()
        pl_module.zero_grad()


@pytest.mark.parametrize("when", ["middle", "before"])
@pytest.mark.parametrize(
    ("own_generator", "workers", "left"), [(False, 0, 0), (True, 0, 0), (False, 1, 0), (True, 0, 1), (False, 1, 1)]
)
def test_the_run_is_bit_for_bit_the_same_as_without_the_look(
    when: str, own_generator: bool, workers: int, left: int, tmp_path: Path, trainer: Callable[..., L.Trainer]
) -> None:
    runs = {}
    for kind in ("never", when):
        torch.manual_seed(1)
        module, looks, logger = Noisy(own_generator, workers), Looks(kind, left=left), CSVLogger(tmp_path, name=kind)
        trainer(callbacks=[looks], logger=logger, log_every_n_steps=1).fit(module)
        logged = (Path(logger.log_dir) / "metrics.csv").read_text()
        runs[kind] = (module.state_dict(), logged, module.calls)
    plain, looked = runs["never"], runs[when]
    assert all(torch.equal(value, looked[0][name]) for name, value in plain[0].items())
    assert plain[1] == looked[1]
    assert looked[2] == plain[2] + 3


@pytest.mark.parametrize("when", ["middle", "before"])
def test_losses_are_those_of_the_training_step_in_eval_mode_with_gradients(
    when: str, trainer: Callable[..., L.Trainer]
) -> None:
    looks = Looks(when, batches=2)
    module = Lit()
    before = module.net.state_dict()
    expected = [module.loss(batch).item() for batch in loader()][:2]
    trainer(callbacks=[looks], max_epochs=1).fit(module, loader())
    assert looks.modes == [False, False]
    assert looks.gradient is not None
    assert looks.gradient > 0
    assert when == "middle" or looks.losses == expected
    assert module.training
    assert before.keys() == module.net.state_dict().keys()


def test_two_looks_at_shuffled_data_see_the_same_batches(trainer: Callable[..., L.Trainer]) -> None:
    seen = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        looks = Looks("before", batches=4)
        module = Lit()
        shuffled = DataLoader(loader().dataset, batch_size=4, shuffle=True)
        trainer(callbacks=[looks], max_epochs=1).fit(module, shuffled)
        seen.append(looks.losses)
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == 4


def test_a_look_is_at_one_epoch_at_most_and_within_the_limit_of_the_run(trainer: Callable[..., L.Trainer]) -> None:
    for limit, expected in ((None, 4), (2, 2), (0, 0)):
        looks = Looks("before", batches=100)
        looks.look = lambda trainer, module, looks=looks: looks.losses.extend(  # type: ignore[method-assign]
            loss.item() for loss in silent_losses(trainer, module, 100)
        )
        trainer(callbacks=[looks], max_epochs=1, limit_train_batches=limit).fit(Lit(), loader())
        assert len(looks.losses) == expected


class Mapped(Lit):
    """Returns a mapping and takes no index; skips every second batch."""

    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return None if len(self.losses) % 2 else {"loss": loss}


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_a_step_may_return_a_mapping_or_nothing(trainer: Callable[..., L.Trainer]) -> None:
    looks = Looks("before", batches=4)
    trainer(callbacks=[looks], max_epochs=1).fit(Mapped(), loader())
    assert len(looks.losses) == 2


def test_compiled_parts_run_as_plain_ones_so_that_hooks_see_them(trainer: Callable[..., L.Trainer]) -> None:
    compiled: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(1)
        return graph.forward

    class Compiled(Lit):
        def loss(self, batch: Any) -> Tensor:
            return nn.functional.cross_entropy(self.fast(batch[0]), batch[1])

    module = Compiled()
    module.__dict__["fast"] = torch.compile(module.net, backend=backend)
    graphs = []
    looks = Looks("before")
    plain_look = looks.look
    looks.look = lambda *args: (plain_look(*args), graphs.append(len(compiled)))[0]  # type: ignore[method-assign]
    trainer(callbacks=[looks], max_epochs=1).fit(module, loader())
    assert graphs == [0]
    assert compiled


class Steps(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Fetches(Lit):
    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        return self.loss(next(dataloader_iter)[0])


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
@pytest.mark.parametrize(
    ("module", "data", "message"),
    [
        (Steps, loader, "Steps has automatic_optimization=False"),
        (Fetches, loader, "training_step of Fetches takes dataloader_iter"),
        (Lit, lambda: iter(loader()), "the training data, a .*, can be iterated over only once"),
    ],
)
def test_what_would_disturb_the_run_is_refused(
    module: type[Lit], data: Callable[[], Any], message: str, trainer: Callable[..., L.Trainer]
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(callbacks=[Looks("before")]).fit(module(), data())


def test_data_of_several_loaders_come_together(trainer: Callable[..., L.Trainer]) -> None:
    class Pairs(Lit):
        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch["a"]) + super().loss(batch["b"])

    other = DataLoader(TensorDataset(torch.randn(8, 4), torch.zeros(8, dtype=torch.long)), batch_size=4)
    looks = Looks("middle", batches=4)
    trainer(callbacks=[looks], max_epochs=1).fit(Pairs(), {"a": loader(), "b": other})
    assert len(looks.losses) == 4
