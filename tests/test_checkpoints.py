"""Checkpoints hold our entries only, are written whole, and go on exactly where they were written."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from conftest import Lit, Net, loader
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.callbacks import StochasticWeightAveraging as SWA
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins.io import AsyncCheckpointIO, CheckpointIO
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

import lightning_lora
from lightning_lora import AdapterError, LoRA, LoRACallback, load_adapter, merged, sites
from lightning_lora.checkpoints import AdapterCheckpointIO, tolerate_missing_base
from lightning_lora.layers import AdaptedLayer

METHOD = LoRA(r=2, alpha=4)


def callback(method: LoRA = METHOD, **kwargs: Any) -> LoRACallback:
    return LoRACallback(method, **kwargs)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def pairs(*stems: str) -> list[str]:
    return sorted([f"{stem}.ckpt" for stem in stems] + [f"{stem}.adapter" for stem in stems])


def same(one: Any, other: Any) -> bool:
    """Compare nested containers of tensors and plain values, bit for bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor anywhere in a file, with the names on the way to it."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from tensors(inner, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for key, inner in enumerate(value):
            yield from tensors(inner, f"{name}/{key}")


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def assert_ours_only(path: Path, module: nn.Module, full: set[str] = frozenset()) -> dict[str, Any]:
    """A checkpoint has the adapters and what is trained in full, and no tensor of the base anywhere."""
    content = read(path)
    found = {name for name in content["state_dict"] if "lightning_lora" not in name}
    every = module.state_dict()
    assert found == {name for name in every if "adapters" in name} | full
    base = {name: tensor for name, tensor in every.items() if name not in found}
    assert base
    for name, tensor in tensors(content):
        assert not any(name.endswith(f"{key}") and tensor.shape == value.shape for key, value in base.items()), name
        assert not any(same(tensor, value) for value in base.values() if value.numel() > 1), name
    return content


class Hyper(Lit):
    """A module with hyperparameters.

    Args:
        width: Of the hidden layer.
        lr: Learning rate.
    """

    def __init__(self, width: int = 8, lr: float = 0.01) -> None:
        super().__init__(width=width)
        self.save_hyperparameters()

    def configure_optimizers(self) -> Any:
        return AdamW(self.parameters(), lr=self.hparams.lr)


class HyperInSetup(Hyper):
    def __init__(self, width: int = 8, lr: float = 0.01) -> None:
        super().__init__(width, lr)
        del self.net

    def setup(self, stage: str) -> None:
        if not hasattr(self, "net"):
            self.net = self.build()


class HyperInConfigureModel(Hyper):
    def __init__(self, width: int = 8, lr: float = 0.01) -> None:
        super().__init__(width, lr)
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = self.build()


class HyperOnMeta(HyperInConfigureModel):
    def configure_model(self) -> None:
        if self.net is None:
            with torch.device("meta"):
                self.net = Net(self.width)
            self.net.to_empty(device="cpu").load_state_dict(self.build().state_dict())


STYLES = [Hyper, HyperInSetup, HyperInConfigureModel, HyperOnMeta]


@pytest.fixture
def trained(trainer: Any, tmp_path: Path) -> Any:
    """Return a function that trains a module and returns it with the checkpoint written after."""

    def make(module: L.LightningModule | None = None, ours: LoRACallback | None = None) -> tuple[Any, Path]:
        module = Hyper() if module is None else module
        run = trainer(callbacks=[ours or callback()])
        run.fit(module, loader())
        run.save_checkpoint(tmp_path / "trained.ckpt")
        return module, tmp_path / "trained.ckpt"

    return make


# ---- every way to save


def test_top_k_keeps_that_many_checkpoints_each_with_its_adapter_folder(trainer: Any, tmp_path: Path) -> None:
    module = Lit()
    saver = ModelCheckpoint(tmp_path / "c", "{epoch}", monitor="val_loss", save_top_k=2)
    trainer(callbacks=[callback(), saver], max_epochs=6, enable_checkpointing=True).fit(module, loader(), loader())
    kept = {Path(path).stem for path in saver.best_k_models}
    assert len(kept) == 2
    assert names(tmp_path / "c") == pairs(*kept)
    assert_ours_only(Path(saver.best_model_path), module)


def test_a_hundred_saves_leave_exactly_the_files_that_they_should(trainer: Any, tmp_path: Path) -> None:
    saver = ModelCheckpoint(
        tmp_path / "c", "{step}", monitor="step", mode="max", save_top_k=3, save_last=True, every_n_train_steps=1
    )
    run = trainer(callbacks=[callback(), saver], max_epochs=25, enable_checkpointing=True)
    run.fit(Lit(), loader())
    kept = [Path(path).stem for path in saver.best_k_models]
    assert sorted(kept) == ["step=100", "step=98", "step=99"]
    assert names(tmp_path / "c") == pairs(*kept, "last")


@pytest.mark.parametrize("save_last", [True, "link"])
def test_the_last_checkpoint_can_be_resumed_as_a_copy_and_as_a_link(
    save_last: Any, trainer: Any, tmp_path: Path
) -> None:
    def saver() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / "c", "{epoch}", save_top_k=-1, save_last=save_last)

    whole, first, second = Lit(), Lit(), Lit()
    trainer(callbacks=[callback()], max_epochs=3).fit(whole, loader())
    trainer(callbacks=[callback(), saver()], max_epochs=2, enable_checkpointing=True).fit(first, loader())
    expected = pairs("epoch=0", "epoch=1", "last")
    assert names(tmp_path / "c") == (expected if save_last is True else [e for e in expected if e != "last.adapter"])
    assert os.path.islink(tmp_path / "c" / "last.ckpt") == (save_last == "link")
    assert_ours_only(tmp_path / "c" / "last.ckpt", first)
    run = trainer(callbacks=[callback(), saver()], max_epochs=3, enable_checkpointing=True)
    run.fit(second, loader(), ckpt_path="last")
    assert same(state(second), state(whole))


def test_a_copy_of_the_last_checkpoint_replaces_a_link_and_not_what_it_points_to(trainer: Any, tmp_path: Path) -> None:
    first = ModelCheckpoint(tmp_path / "c", "{epoch}", save_top_k=-1, save_last="link")
    trainer(callbacks=[callback(), first], max_epochs=1, enable_checkpointing=True).fit(Lit(), loader())
    old = {path: path.read_bytes() for path in (tmp_path / "c").rglob("epoch=0*/**/*") if path.is_file()}
    old[tmp_path / "c" / "epoch=0.ckpt"] = (tmp_path / "c" / "epoch=0.ckpt").read_bytes()
    run = trainer(callbacks=[callback()])
    run.fit(Lit(), loader())
    run.save_checkpoint(tmp_path / "c" / "last.ckpt")
    assert not os.path.islink(tmp_path / "c" / "last.ckpt")
    assert {path: path.read_bytes() for path in old} == old
    assert names(tmp_path / "c") == pairs("epoch=0", "last")


def test_removing_a_link_leaves_the_folder_of_its_target(trainer: Any, tmp_path: Path) -> None:
    run = trainer(callbacks=[callback()])
    run.fit(Lit(), loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    (tmp_path / "last.ckpt").symlink_to("a.ckpt")
    run.strategy.remove_checkpoint(tmp_path / "last.ckpt")
    assert names(tmp_path) == pairs("a")


@pytest.mark.parametrize("options", [{"save_weights_only": True}, {"every_n_train_steps": 3}, {}])
def test_every_kind_of_saving_writes_our_entries_only(options: dict[str, Any], trainer: Any, tmp_path: Path) -> None:
    module = Lit()
    saver = ModelCheckpoint(tmp_path / "c", save_top_k=-1, **options)
    trainer(callbacks=[callback(lr_ratio=4), saver], enable_checkpointing=True).fit(module, loader(), loader())
    files = list((tmp_path / "c").glob("*.ckpt"))
    assert len(files) == 2
    for path in files:
        content = assert_ours_only(path, module)
        assert content["lightning_lora"]["hyperparameters"] == dataclasses.asdict(METHOD)
        assert ("optimizer_states" in content) is not options.get("save_weights_only", False)
        assert path.with_suffix(".adapter").is_dir()


def test_saves_during_and_after_fit_and_after_test_are_alike(trainer: Any, tmp_path: Path) -> None:
    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            trainer.save_checkpoint(tmp_path / "during.ckpt")

    module = Lit()
    run = trainer(callbacks=[callback(), Saves()])
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "after.ckpt")
    run.test(module, loader(), verbose=False)
    run.save_checkpoint(tmp_path / "tested.ckpt", weights_only=True)
    contents = [assert_ours_only(tmp_path / f"{name}.ckpt", module) for name in ("during", "after", "tested")]
    assert same(contents[0]["state_dict"], contents[1]["state_dict"])
    assert same(contents[0]["state_dict"], contents[2]["state_dict"])
    assert names(tmp_path) == pairs("during", "after", "tested")


def test_the_adapter_folder_holds_what_the_checkpoint_holds(trained: Any) -> None:
    module, path = trained(ours=callback(modules_to_save=["second"]))
    assert_ours_only(path, module, {"net.second.weight", "net.second.bias"})
    fresh = Hyper()
    load_adapter(fresh, path.with_suffix(".adapter"))
    assert same(state(fresh), state(module))


def test_a_merged_model_is_not_saved(trained: Any, trainer: Any, tmp_path: Path) -> None:
    module, _ = trained()
    with merged(module), pytest.raises(RuntimeError, match="cannot save a checkpoint while the adapters are merged"):
        module.trainer.save_checkpoint(tmp_path / "b.ckpt")
    assert names(tmp_path) == pairs("trained")


@pytest.mark.filterwarnings("ignore:the checkpoint was written in the middle of an epoch and DataLoader")
@pytest.mark.filterwarnings(  # Lightning, where this callback is
    "ignore:`.fit.ckpt_path=None.` was called without a model",
    "ignore:.fit.ckpt_path=.last.. is set, but there is no last checkpoint",
)
@pytest.mark.parametrize("first", [True, False])
def test_a_run_that_failed_goes_on_from_the_checkpoint_that_was_written_because_of_it(
    first: bool, trainer: Any, tmp_path: Path
) -> None:
    class Fails(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.global_step == 8:
                raise ArithmeticError("boom")
            return super().training_step(batch, batch_idx)

    def run() -> L.Trainer:
        ours, saver = callback(), OnExceptionCheckpoint(tmp_path, "failed")
        callbacks = [saver, ours] if first else [ours, saver]
        return trainer(callbacks=callbacks, enable_checkpointing=True, max_epochs=3)

    whole, part, rest = Lit(), Fails(), Lit()
    trainer(callbacks=[callback()], max_epochs=3).fit(whole, loader())
    with pytest.raises(ArithmeticError, match="boom"):
        run().fit(part, loader())
    assert names(tmp_path) == pairs("failed")
    assert_ours_only(tmp_path / "failed.ckpt", part)
    run().fit(rest, loader())
    assert part.losses + rest.losses == whole.losses


def test_a_place_that_is_no_local_file_gets_the_checkpoint_and_a_warning_about_the_folder(trainer: Any) -> None:
    whole, part, rest = Lit(), Lit(), Lit()
    trainer(callbacks=[callback()], max_epochs=3).fit(whole, loader())
    run = trainer(callbacks=[callback()])
    run.fit(part, loader())
    with pytest.warns(UserWarning, match=r"memory://a.ckpt is not a local file: its adapter folder is not written"):
        run.save_checkpoint("memory://a.ckpt")
    trainer(callbacks=[callback()], max_epochs=3).fit(rest, loader(), ckpt_path="memory://a.ckpt")
    assert same(state(rest), state(whole))
    assert same(state(lightning_lora.load_from_checkpoint(Lit, "memory://a.ckpt")), state(part))
    run.strategy.remove_checkpoint("memory://a.ckpt")


# ---- other writers inside, and other callbacks' copies


class Own(CheckpointIO):
    """A user's own reader and writer."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.calls.append(("save", Path(path).name))
        Path(path).parent.mkdir(exist_ok=True)
        torch.save(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        self.calls.append(("load", Path(path).name))
        return torch.load(path, weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        self.calls.append(("remove", Path(path).name))
        os.remove(path)

    def teardown(self) -> None:
        self.calls.append(("teardown", ""))


def test_a_users_own_writer_stays_inside_and_gets_every_call(trainer: Any, tmp_path: Path) -> None:
    own, module = Own(), Lit()
    saver = ModelCheckpoint(tmp_path / "c", "{epoch}", save_top_k=1, monitor="step", mode="max")
    run = trainer(callbacks=[callback(), saver], plugins=[own], enable_checkpointing=True)
    run.fit(module, loader())
    run.test(module, loader(), ckpt_path="best", verbose=False)
    assert own.calls == [
        ("save", "epoch=0.ckpt"),
        ("save", "epoch=1.ckpt"),
        ("remove", "epoch=0.ckpt"),
        ("teardown", ""),
        ("load", "epoch=1.ckpt"),
        ("teardown", ""),
    ]
    assert_ours_only(tmp_path / "c" / "epoch=1.ckpt", module)
    assert names(tmp_path / "c") == pairs("epoch=1")


class Slow(TorchCheckpointIO):
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        time.sleep(0.05)
        super().save_checkpoint(checkpoint, path, storage_options)


@pytest.mark.parametrize("inner", [None, Slow])
def test_an_asynchronous_writer_inside_leaves_no_removed_checkpoint_behind(
    inner: Any, trainer: Any, tmp_path: Path
) -> None:
    module = Lit()
    saver = ModelCheckpoint(tmp_path / "c", "{epoch}", save_top_k=1, monitor="step", mode="max")
    plugin = AsyncCheckpointIO(inner() if inner else None)
    run = trainer(callbacks=[callback(), saver], plugins=[plugin], max_epochs=5, enable_checkpointing=True)
    run.fit(module, loader())
    assert plugin._executor is None, "it was waited for"
    assert names(tmp_path / "c") == pairs("epoch=4")
    content = assert_ours_only(tmp_path / "c" / "epoch=4.ckpt", module)
    assert content["global_step"] == 20
    second = Lit()
    again = trainer(
        callbacks=[callback(), saver], plugins=[AsyncCheckpointIO()], max_epochs=6, enable_checkpointing=True
    )
    again.fit(second, loader(), ckpt_path=tmp_path / "c" / "epoch=4.ckpt")
    assert len(second.losses) == 4


def test_fitting_twice_wraps_the_writer_once(trainer: Any) -> None:
    own, run = Own(), None
    run = trainer(callbacks=[callback()], plugins=[own])
    for _ in range(3):
        run.fit(Lit(), loader())
    assert isinstance(run.strategy.checkpoint_io, AdapterCheckpointIO)
    assert run.strategy.checkpoint_io.checkpoint_io is own


def averaging(kind: str) -> L.Callback:
    return EMAWeightAveraging(decay=0.9) if kind == "EMA" else SWA(swa_lrs=0.01, swa_epoch_start=1)


@pytest.mark.parametrize("kind", ["EMA", "SWA"])
def test_a_callback_that_keeps_a_copy_of_the_module_puts_no_base_into_the_file(
    kind: str, trainer: Any, tmp_path: Path
) -> None:
    module = Lit()
    saver = ModelCheckpoint(tmp_path / "c", "{epoch}", save_top_k=-1)
    run = trainer(callbacks=[callback(), averaging(kind), saver], max_epochs=3, enable_checkpointing=True)
    run.fit(module, loader(), loader())
    for path in (tmp_path / "c").glob("*.ckpt"):
        content = assert_ours_only(path, module)
        averaged = (
            content["callbacks"]
            .get("StochasticWeightAveraging", content)
            .get(
                "current_model_state",
                content["callbacks"].get("StochasticWeightAveraging", {}).get("average_model_state"),
            )
        )
        assert averaged, "the copy of the adapters is there"


@pytest.mark.parametrize("kind", ["EMA", "SWA"])
def test_averaging_goes_on_exactly_through_a_resume(kind: str, trainer: Any, tmp_path: Path) -> None:
    def run(epochs: int, module: Lit, **options: Any) -> None:
        saver = ModelCheckpoint(tmp_path / f"{epochs}", "{epoch}", save_top_k=-1)
        callbacks = [callback(lr_ratio=4), averaging(kind), saver]
        trainer(callbacks=callbacks, max_epochs=epochs, enable_checkpointing=True).fit(module, loader(), **options)

    whole, second = Lit(), Lit()
    run(4, whole)
    run(4, second, ckpt_path=tmp_path / "4" / "epoch=2.ckpt")
    assert whole.losses[-4:] == second.losses
    assert same(state(whole), state(second))


def test_a_tensor_of_another_callback_that_only_shares_a_name_stays_in_the_file(trainer: Any, tmp_path: Path) -> None:
    class Keeps(L.Callback):
        def state_dict(self) -> dict[str, Any]:
            weights = {"net.first.weight": torch.ones(3), "module.net.first.weight": torch.ones(8, 4)}
            return {"list": [weights, torch.ones(2)], "weight": torch.ones(8, 4)}

    keeps = Keeps()
    run = trainer(callbacks=[callback(), keeps])
    run.fit(Lit(), loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    kept = dict(tensors(read(tmp_path / "a.ckpt")["callbacks"][keeps.state_key]))
    assert sorted(kept) == ["/list/0/net.first.weight", "/list/1", "/weight"]


class Doubled(Lit):
    """Has a layer in the base and one that is trained, whose name ends like the other's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"net": self.build()})

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.inner["net"](x)


def test_a_trained_layer_whose_name_ends_like_one_of_the_base_is_ours(trainer: Any, tmp_path: Path) -> None:
    class Keeps(L.Callback):
        def state_dict(self) -> dict[str, Any]:
            return dict.fromkeys(
                ("inner.net.second.weight", "net.second.weight", "a.net.second.weight"), torch.ones(3, 8)
            )

    module, keeps = Doubled(), Keeps()
    ours = callback(target_modules=["net.first"], modules_to_save=["inner.net.second"])
    run = trainer(callbacks=[ours, keeps])
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert list(read(tmp_path / "a.ckpt")["callbacks"][keeps.state_key]) == ["inner.net.second.weight"]
    missing = SimpleNamespace(missing_keys=["inner.net.second.weight", "net.second.weight", "a.net.second.weight"])
    tolerate_missing_base(module, missing)
    assert missing.missing_keys == ["inner.net.second.weight"]


# ---- written whole


@pytest.mark.parametrize("plugins", [[], [AsyncCheckpointIO]])
def test_nothing_is_written_to_another_file_system_first(
    plugins: list[Any], trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = ModelCheckpoint(tmp_path / "c", "one")
    run = trainer(callbacks=[callback(), saver], plugins=[one() for one in plugins], enable_checkpointing=True)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "there is no such folder"))
    run.fit(Lit(), loader())
    assert names(tmp_path / "c") == pairs("one")


@pytest.mark.parametrize("kill", [False, True], ids=["an exception", "a kill"])
def test_a_save_that_stops_anywhere_leaves_a_whole_checkpoint_and_a_whole_folder(
    kill: bool, trained: Any, trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, path = trained()
    run, old = module.trainer, (read(path)["state_dict"], state(module))
    original, folder = tmp_path, tmp_path / "again"
    path = folder / path.name
    with torch.no_grad():
        for factor in (p for p in module.parameters() if p.requires_grad):
            factor.add_(1)

    class Stop(BaseException):
        """What no code is prepared for."""

    stopped = 0
    for moment in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copy(original / "trained.ckpt", folder)
        shutil.copytree(original / "trained.adapter", folder / "trained.adapter")
        calls = 0
        with monkeypatch.context() as patch:

            def counted(real: Any) -> Any:
                def call(*arguments: Any, **options: Any) -> Any:
                    nonlocal calls
                    calls += 1
                    if calls == moment + 1:  # noqa: B023 - called within this turn
                        raise Stop
                    return real(*arguments, **options)

                return call

            for name in ("fsync", "replace", "rename", "chmod"):
                patch.setattr(os, name, counted(getattr(os, name)))
            patch.setattr(torch, "save", half_of(torch.save, counted))
            if kill:  # nobody cleans up
                patch.setattr(Path, "unlink", lambda *_, **__: None)
                patch.setattr(shutil, "rmtree", lambda *_, **__: None)
            try:
                run.save_checkpoint(path)
            except Stop:
                stopped += 1
            else:
                break
        content = read(path)["state_dict"]
        assert same(content, old[0]) or same(content, read_new(module, content))
        fresh = Hyper()
        load_adapter(fresh, path.with_suffix(".adapter"))
        assert same(state(fresh), old[1]) or same(state(fresh), state(module))
        if not kill:
            assert names(folder) == pairs("trained")
    assert stopped >= 6
    assert same(read(path)["state_dict"], read_new(module, read(path)["state_dict"]))


def half_of(save: Any, counted: Any) -> Any:
    """Return a ``torch.save`` that may stop after half of the bytes."""

    def write(content: Any, file: Any) -> None:
        import io

        buffer = io.BytesIO()
        save(content, buffer)
        whole = buffer.getvalue()
        file.write(whole[: len(whole) // 2])
        counted(file.flush)()
        file.write(whole[len(whole) // 2 :])

    return write


def read_new(module: nn.Module, like: dict[str, Tensor]) -> dict[str, Tensor]:
    now = module.state_dict()
    return {name: now.get(name, tensor) for name, tensor in like.items()}


# ---- resume


class Stateful:
    """A loader that stores its position, as torchdata's does."""

    def __init__(self, batches: int = 6) -> None:
        self.batches, self.position = list(loader(batches)), 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Log(Logger):
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int | None, dict[str, float]]] = []

    name = version = "log"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.seen.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


def one_cycle(module: Lit) -> Any:
    optimizer = AdamW(
        [{"params": module.net.first.parameters()}, {"params": module.net.second.parameters(), "lr": 0.02}], lr=0.01
    )
    return [optimizer], [{"scheduler": OneCycleLR(optimizer, [0.1, 0.2], total_steps=20), "interval": "step"}]


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Any]] = {
    "plain": ({}, {}, None),
    "accumulate 2": ({}, {"accumulate_grad_batches": 2}, None),
    "bf16-mixed": ({}, {"precision": "bf16-mixed"}, None),
    "bf16-true": ({}, {"precision": "bf16-true"}, None),
    "bf16-true, bf16 adapters": ({"dtype": "bfloat16"}, {"precision": "bf16-true"}, None),
    "ratio and OneCycle": ({"lr_ratio": 16}, {}, one_cycle),
    "ratio, OneCycle, accumulate 2": ({"lr_ratio": 16}, {"accumulate_grad_batches": 2}, one_cycle),
    "head, biases, clipping": (
        {"modules_to_save": ["second"], "bias": "all", "weight_decay": {"B": 0.1}},
        {"gradient_clip_val": 0.1},
        None,
    ),
}


@pytest.mark.filterwarnings("ignore:the checkpoint was written before a validation that was due")
@pytest.mark.parametrize("where", ["at an epoch's end", "in the middle of an epoch"])
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    case: str, where: str, trainer: Any, tmp_path: Path
) -> None:
    ours, options, configure = CASES[case]
    steps = 2 if where == "in the middle of an epoch" else 6 // options.get("accumulate_grad_batches", 1)

    def run(module: Lit, ckpt_path: Any = None) -> tuple[L.Trainer, Log]:
        saver = ModelCheckpoint(tmp_path / "c", "{step}", save_top_k=-1, every_n_train_steps=steps)
        log = Log()
        trainer_ = trainer(
            callbacks=[callback(**ours), saver],
            max_epochs=3,
            enable_checkpointing=True,
            logger=log,
            log_every_n_steps=1,
            **options,
        )
        trainer_.fit(module, Stateful(), Stateful(), ckpt_path=ckpt_path)
        return trainer_, log

    whole, rest = Lit(configure), Lit(configure)
    first, seen = run(whole)
    files = sorted((tmp_path / "c").glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    assert len(files) >= 2
    path = files[-2]
    done = read(path)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
    assert (done % 6 == 0) == (where == "at an epoch's end")
    second, seen_again = run(rest, path)
    assert rest.losses == whole.losses[done:]
    assert same(state(rest), state(whole))
    assert same(second.optimizers[0].state_dict(), first.optimizers[0].state_dict())
    assert [c.scheduler.state_dict() for c in second.lr_scheduler_configs] == [
        c.scheduler.state_dict() for c in first.lr_scheduler_configs
    ]
    assert seen_again.seen == seen.seen[-len(seen_again.seen) :]
    assert len(seen_again.seen) > 2


def test_an_optimizer_and_scheduler_built_before_injection_resume_exactly(trainer: Any, tmp_path: Path) -> None:
    def captured() -> Lit:
        module = Lit()
        built = one_cycle(module)
        module.configure = lambda _: built
        return module

    whole, part, rest = captured(), captured(), captured()
    first = trainer(callbacks=[callback(lr_ratio=16)], max_epochs=3)
    first.fit(whole, loader())
    run = trainer(callbacks=[callback(lr_ratio=16)], max_epochs=2)
    run.fit(part, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    second = trainer(callbacks=[callback(lr_ratio=16)], max_epochs=3)
    second.fit(rest, loader(), ckpt_path=tmp_path / "a.ckpt")
    assert part.losses + rest.losses == whole.losses
    assert same(state(rest), state(whole))
    assert same(second.optimizers[0].state_dict(), first.optimizers[0].state_dict())


@pytest.mark.parametrize("which", ["last", "best", "path"])
@pytest.mark.parametrize("style", STYLES)
def test_last_best_and_a_path_resume_every_style_of_module(
    style: Any, which: str, trainer: Any, tmp_path: Path
) -> None:
    def run(epochs: int) -> L.Trainer:
        saver = ModelCheckpoint(tmp_path / "c", "{epoch}", save_top_k=1, monitor="step", mode="max", save_last=True)
        return trainer(callbacks=[callback(), saver], max_epochs=epochs, enable_checkpointing=True)

    whole, part, rest = style(), style(), style()
    trainer(callbacks=[callback()], max_epochs=3).fit(whole, loader())
    first = run(2)
    first.fit(part, loader())
    if which == "best":  # Lightning finds the best in the run that wrote it
        first.fit_loop.max_epochs = 3
        first.fit(rest, loader(), ckpt_path="best", weights_only=True)
    else:
        run(3).fit(rest, loader(), ckpt_path="last" if which == "last" else tmp_path / "c" / "epoch=1.ckpt")
    assert part.losses + rest.losses == whole.losses
    assert same(state(rest), state(whole))


@pytest.mark.parametrize("style", STYLES)
def test_validate_test_and_predict_take_a_checkpoint_with_a_new_trainer_and_a_fresh_module(
    style: Any, trainer: Any, trained: Any
) -> None:
    module, path = trained(style())
    expected = {
        "validate": module.trainer.validate(module, loader(), verbose=False),
        "test": module.trainer.test(module, loader(), verbose=False),
        "predict": module.trainer.predict(module, loader()),
    }
    assert not same(expected["predict"], trainer().predict(style(), loader()))
    for stage, values in expected.items():
        assert same(getattr(trainer(callbacks=[callback()]), stage)(style(), loader(), ckpt_path=path), values)


def test_the_best_checkpoint_is_tested_in_the_run_that_wrote_it(trainer: Any, tmp_path: Path) -> None:
    module = Lit()
    saver = ModelCheckpoint(tmp_path / "c", "{epoch}", monitor="step", mode="min", save_weights_only=True)
    run = trainer(callbacks=[callback(), saver], max_epochs=3, enable_checkpointing=True)
    run.fit(module, loader())
    run.test(module, loader(), ckpt_path="best", verbose=False)
    once = Lit()
    trainer(callbacks=[callback()], max_epochs=1).fit(once, loader())
    assert same(state(module), state(once))


def test_a_compiled_run_and_a_plain_one_resume_each_other(trainer: Any, tmp_path: Path) -> None:
    class Compiled(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.compile(self.net, backend="eager")

    whole = Lit()
    trainer(callbacks=[callback()], max_epochs=3).fit(whole, loader())
    for first, second in ((Lit(), Compiled()), (Compiled(), Lit())):
        run = trainer(callbacks=[callback()], max_epochs=2)
        run.fit(first, loader())
        run.save_checkpoint(tmp_path / "a.ckpt")
        trainer(callbacks=[callback()], max_epochs=3).fit(second, loader(), ckpt_path=tmp_path / "a.ckpt")
        assert first.losses + second.losses == whole.losses


class Counts(nn.Linear):
    """A layer of the base with state that is no tensor."""

    seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += self.training
        return super().forward(x)

    def get_extra_state(self) -> Any:
        return {"seen": self.seen}

    def set_extra_state(self, state: Any) -> None:
        self.seen = state["seen"]


def test_extra_state_of_a_frozen_layer_is_saved_and_resumed(trainer: Any, trained: Any) -> None:
    def build() -> Lit:
        module = Lit()
        plain, module.net.first = module.net.first, Counts(4, 8)
        module.net.first.load_state_dict({**plain.state_dict(), "_extra_state": {"seen": 0}})
        return module

    module, path = trained(build())
    assert module.net.first.seen == 8
    fresh = build()
    trainer(callbacks=[callback()]).test(fresh, loader(), ckpt_path=path, verbose=False)
    assert fresh.net.first.seen == 8


def base(module: nn.Module) -> dict[str, Tensor]:
    return {n: t for n, t in module.state_dict().items() if "adapters" not in n and isinstance(t, Tensor)}


# ---- norm layers


class Norms(Lit):
    def build(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode at the start of training")  # frozen norms
def test_running_statistics_of_a_frozen_norm_are_neither_changed_nor_saved(trained: Any) -> None:
    module, path = trained(Norms())
    assert_ours_only(path, module)
    assert same(base(module), base(Norms()))


def test_a_trained_norm_is_saved_with_its_statistics_and_resumes_exactly(trainer: Any, tmp_path: Path) -> None:
    whole, part, rest = Norms(), Norms(), Norms()
    ours = {"modules_to_save": ["net.1"]}
    trainer(callbacks=[callback(**ours)], max_epochs=3).fit(whole, loader())
    run = trainer(callbacks=[callback(**ours)], max_epochs=2)
    run.fit(part, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    entries = {f"net.1.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    assert_ours_only(tmp_path / "a.ckpt", part, entries)
    trainer(callbacks=[callback(**ours)], max_epochs=3).fit(rest, loader(), ckpt_path=tmp_path / "a.ckpt")
    assert part.losses + rest.losses == whole.losses
    assert same(state(rest), state(whole))


def test_a_buffer_of_the_base_that_training_changes_is_saved_and_resumes_exactly(trainer: Any, tmp_path: Path) -> None:
    class Codebook(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.net.register_buffer("scale", torch.ones(()))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.net.scale *= 0.9
            return super().training_step(batch, batch_idx) * self.net.scale

    whole, part, rest = Codebook(), Codebook(), Codebook()
    trainer(callbacks=[callback()], max_epochs=3).fit(whole, loader())
    run = trainer(callbacks=[callback()], max_epochs=2)
    run.fit(part, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    trainer(callbacks=[callback()], max_epochs=3).fit(rest, loader(), ckpt_path=tmp_path / "a.ckpt")
    assert same(state(rest), state(whole))


# ---- strictness


class Deeper(Hyper):
    def build(self) -> nn.Module:
        net = super().build()
        net.third = nn.Linear(3, 3)
        return net

    def forward(self, x: Tensor) -> Tensor:
        return self.net.third(self.net(x))


class OtherBase(Hyper):
    def build(self) -> nn.Module:
        net = super().build()
        with torch.no_grad():
            net.second.weight.mul_(1.5)
        return net


@pytest.mark.parametrize(
    ("ours", "module", "says"),
    [
        (
            callback(LoRA(r=3, alpha=4)),
            Hyper,
            r"net.first.weight was trained with LoRA\(r=2, .* LoRA\(r=3",
        ),
        (callback(LoRA(r=2, alpha=8)), Hyper, r"net.first.weight was trained with LoRA\(r=2, alpha=4, .* alpha=8"),
        (callback(rank_pattern={"second": 1}), Hyper, r"net.second.weight was trained with LoRA\(r=2, .* LoRA\(r=1"),
        (callback(exclude_modules=["second"]), Hyper, r"only in the checkpoint: net.second.weight; only here: none"),
        (callback(), Deeper, r"only in the checkpoint: none; only here: net.third.weight"),
        (callback(), OtherBase, r"trained on another base: 1 of 2 adapted weights differ \(net.second.weight\)"),
        (callback(bias="all"), Hyper, r"net.first.bias, net.second.bias is missing, which this run trains"),
    ],
)
@pytest.mark.parametrize("stage", ["fit", "test"])
def test_a_checkpoint_of_another_run_is_refused_with_what_differs(
    stage: str, ours: LoRACallback, module: Any, says: str, trainer: Any, trained: Any
) -> None:
    _, path = trained()
    with pytest.raises(AdapterError, match=says) as raised:
        getattr(trainer(callbacks=[ours], max_epochs=3), stage)(module(), loader(), ckpt_path=path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_checkpoint_with_more_trained_in_full_than_this_run_is_refused(trainer: Any, trained: Any) -> None:
    _, path = trained(ours=callback(modules_to_save=["second"]))
    with pytest.raises(AdapterError, match=r"only in the checkpoint: none; only here: net.second.weight"):
        trainer(callbacks=[callback()], max_epochs=3).fit(Hyper(), loader(), ckpt_path=path)
    _, path = trained(ours=callback(bias="all"))
    with pytest.raises(AdapterError, match=r"it holds net.first.bias, net.second.bias, which this run does not train"):
        trainer(callbacks=[callback()], max_epochs=3).fit(Hyper(), loader(), ckpt_path=path)


@pytest.mark.parametrize("style", [Hyper, HyperInConfigureModel])
def test_another_base_is_accepted_on_request(style: Any, trainer: Any, trained: Any) -> None:
    module, path = trained()
    other = OtherBase()
    trainer(callbacks=[callback(allow_base_mismatch=True)]).test(other, loader(), ckpt_path=path, verbose=False)
    ours = {name: t for name, t in state(module).items() if "adapters" in name}
    assert same({name: t for name, t in state(other).items() if "adapters" in name}, ours)
    with pytest.raises(AdapterError, match="another base"):
        lightning_lora.load_from_checkpoint(OtherBase, path)
    assert same(state(lightning_lora.load_from_checkpoint(OtherBase, path, allow_base_mismatch=True)), state(other))


def test_a_refused_checkpoint_leaves_the_module_as_it_was(trainer: Any, trained: Any) -> None:
    _, path = trained(ours=callback(bias="all"))
    module, fresh = Hyper(), Hyper()
    with pytest.raises(AdapterError):
        trainer(callbacks=[callback()]).test(module, loader(), ckpt_path=path, verbose=False)
    trainer(callbacks=[callback()]).validate(fresh, loader(), verbose=False)
    assert same(state(module), state(fresh))
    assert {n for n, p in module.named_parameters() if p.requires_grad} == {
        n for n, p in fresh.named_parameters() if p.requires_grad
    }


def test_a_checkpoint_written_without_the_callback_is_refused_with_what_to_do(trainer: Any, tmp_path: Path) -> None:
    run = trainer()
    run.fit(Hyper(), loader())
    run.save_checkpoint(tmp_path / "full.ckpt")
    with pytest.raises(AdapterError, match=r"was not written with LoRACallback, .* start without ckpt_path"):
        trainer(callbacks=[callback()]).fit(Hyper(), loader(), ckpt_path=tmp_path / "full.ckpt")
    with pytest.raises(AdapterError, match=r"use Hyper.load_from_checkpoint instead"):
        lightning_lora.load_from_checkpoint(Hyper, tmp_path / "full.ckpt")


def test_resuming_without_the_callback_names_it(trainer: Any, trained: Any) -> None:
    _, path = trained()
    run = trainer(max_epochs=3)
    with pytest.raises(RuntimeError, match=r"only adapters are in this file, read it with .* LoRACallback"):
        run.test(Hyper(), loader(), ckpt_path=path, verbose=False)


# ---- without a Trainer


def test_the_classes_own_loader_raises_and_names_ours(trained: Any) -> None:
    _, path = trained()
    with pytest.raises(RuntimeError, match=r"only adapters are in this file, .* lightning_lora.load_from_checkpoint"):
        Hyper.load_from_checkpoint(path)


def test_the_classes_own_loader_warns_with_the_same_words_where_it_is_not_strict(trained: Any) -> None:
    _, path = trained()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Hyper.load_from_checkpoint(path, strict=False)
    assert any("lightning_lora.load_from_checkpoint" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("ours", [{}, {"modules_to_save": ["second"], "bias": "all"}])
def test_our_loader_returns_the_trained_module_with_its_hyperparameters(
    style: Any, ours: dict[str, Any], trained: Any
) -> None:
    module, path = trained(style(width=5, lr=0.03), callback(**ours))
    stage = {"setup_stage": "predict"} if style is HyperInSetup else {}
    loaded = lightning_lora.load_from_checkpoint(style, path, **stage)
    assert type(loaded) is style
    assert same(state(loaded), state(module))
    assert dict(loaded.hparams) == {"width": 5, "lr": 0.03}
    assert [site.name for site in sites(loaded)] == [site.name for site in sites(module)]
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in module.named_parameters() if p.requires_grad
    }
    assert not loaded._load_state_dict_post_hooks
    assert not any("load_state_dict" in name for name in loaded.__dict__ if name not in nn.Module().__dict__)


@pytest.mark.parametrize("style", [Hyper, HyperInSetup])
def test_our_loader_can_merge(style: Any, trained: Any) -> None:
    module, path = trained(style())
    stage = {"setup_stage": "predict"} if style is HyperInSetup else {}
    loaded = lightning_lora.load_from_checkpoint(style, path, merge=True, **stage)
    assert not any(isinstance(inner, AdaptedLayer) for inner in loaded.modules())
    assert state(loaded).keys() == base(module).keys()
    x = next(iter(loader()))[0]
    torch.testing.assert_close(loaded(x), module(x))


def test_our_loader_takes_other_hyperparameters_as_arguments(trained: Any) -> None:
    _, path = trained()
    assert lightning_lora.load_from_checkpoint(Hyper, path, lr=0.5).hparams.lr == 0.5


def test_a_module_that_builds_in_setup_is_told_about_the_stage(trained: Any) -> None:
    _, path = trained(HyperInSetup())
    with pytest.raises(AdapterError, match="setup_stage"):
        lightning_lora.load_from_checkpoint(HyperInSetup, path)


def test_what_our_loader_returns_can_be_trained_on(trainer: Any, trained: Any) -> None:
    module, path = trained()
    loaded = lightning_lora.load_from_checkpoint(Hyper, path)
    for one in (module, loaded):
        one.losses = []
        trainer(callbacks=[callback()]).fit(one, loader())
    assert loaded.losses == module.losses


@pytest.mark.parametrize("subclass", [False, True])
def test_a_module_that_lightning_cli_built_is_loaded(
    subclass: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Data(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader()

    arguments = ["fit", "--model.width=5"]
    if subclass:
        arguments = ["fit", f"--model={__name__}.Hyper", "--model.width=5"]
    defaults = {
        "logger": False, "accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False,
        "enable_model_summary": False, "default_root_dir": str(tmp_path),
        "callbacks": [callback(), ModelCheckpoint(tmp_path / "c", "one")],
    }  # fmt: skip
    monkeypatch.setattr("sys.argv", ["train.py", *arguments])
    cli = LightningCLI(
        L.LightningModule if subclass else Hyper, Data, subclass_mode_model=subclass, trainer_defaults=defaults,
        save_config_callback=None, seed_everything_default=False,
    )  # fmt: skip
    path = tmp_path / "c" / "one.ckpt"
    assert "_instantiator" in read(path)["hyper_parameters"]
    assert_ours_only(path, cli.model)
    loaded = lightning_lora.load_from_checkpoint(Hyper, path)
    assert same(state(loaded), state(cli.model))
    assert loaded.hparams.width == 5
