"""The 25 ways in which LoRA under Lightning trains wrongly without a word: each as it happens, and how it is met here.

In each test the trap springs first: in a naive callback, in a file format or an optimizer used by hand, or with the one
guard taken out. Then the same situation is met with everything in place.

==== ================================================= ===============================================================
trap what goes wrong                                   what meets it
==== ================================================= ===============================================================
01   injection in ``setup`` misses layers built later  injection after ``configure_model``; an error if nothing matches
02   injection after the user shards or wraps          ``inject``, ``check_unwrapped``
03   a plugin replaces adapted layers                  the plugin converts first; ``check_present``
04   reentrant checkpointing of a frozen input         the audit of the first batch; ``check_connected``
05   schedulers undo LoRA+'s ratio                     derived groups that follow their parents
06   an optimizer captured before injection            ``place`` puts the adapters beside the weights that they adapt
07   the head that an optimizer holds is frozen        ``place`` warns
08   frozen parameters stay in the groups              ``place`` drops them
09   frozen BatchNorm drifts                           ``hold_still``; buffers that change are saved
10   the adapters' dropout is off over an eval base    ``LoRACallback`` puts the adapters into training mode
11   spawned processes keep the adapters               ``check_launcher``
12   ``load_from_checkpoint(strict=False)``            a marker in the file, which names our loader
13   adapters on another base                          the base's fingerprint
14   weights-only saves skip callback hooks            the base is dropped in the outermost ``CheckpointIO``
15   averaging callbacks copy the module               the same; ``check_order``
16   sharded checkpoints cannot be read back           ``check_strategy``
17   optimizer state for other groups                  sizes are compared as the user's groups, before the split
18   the last checkpoint, files that come late         said in docs/checkpoints.md; removal waits for the writer
19   tied weights                                      ``tied_to_frozen`` warns; merging refuses; both names are saved
20   updates are rounded away in bf16                  adapters are fp32
21   each rank draws other adapters                    the seed is ``seed_everything``'s or 0, never PyTorch's own
22   tensors cached in inference mode                  nothing is cached
23   the module is built anew for ``test``             a warning
24   ``off`` in YAML is a bool                         no value of ours is a word that YAML reads otherwise
25   DDP without the base, and the bases differ        a choice: the base is left to DDP, whose broadcast makes it equal
==== ================================================= ===============================================================

At the end are the traps that are not of that list: two callbacks, quantized layers, sparse gradients.
"""

from __future__ import annotations

import copy
import inspect
import json
import threading
import typing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import pytest
import torch
import yaml
from conftest import Lit, Net, loader, run_processes
from jsonargparse import ArgumentParser
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.callbacks import StochasticWeightAveraging as SWA
from lightning.pytorch.plugins import Precision
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer, SparseAdam, lr_scheduler
from torch.utils.checkpoint import checkpoint

from lightning_lora import AdapterError, LoRA, LoRACallback, inject, load_from_checkpoint, merge_, merged, sites, using
from lightning_lora.callbacks.audit import Buffers
from lightning_lora.callbacks.guards import check_connected, check_launcher, check_strategy
from lightning_lora.checkpoints import AdapterCheckpointIO
from lightning_lora.gradient_stops import why_no_gradient
from lightning_lora.methods.lora import LoRAAdapter

pytestmark = pytest.mark.xdist_group("test_traps")  # so that one worker runs the processes, once
METHOD = LoRA(r=2, alpha=4)
IN_EVAL_MODE = pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode at the start of training")


def callback(method: LoRA = METHOD, **options: Any) -> LoRACallback:
    return LoRACallback(method, **options)


def state(module: nn.Module, part: str = "") -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items() if part in name}


def base(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state(module).items() if "adapters" not in name}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def learned(module: nn.Module) -> bool:
    """Tell whether there are adapters and every B has left zero."""
    factors = state(module, "lora_B").values()
    return bool(factors) and all(bool(factor.any()) for factor in factors)


def fell(module: Lit) -> bool:
    """Tell whether the loss of the last epoch is below that of the first, which has the same four batches."""
    return sum(module.losses[-4:]) < sum(module.losses[:4])


def predict(module: L.LightningModule) -> Tensor:
    module.eval()
    with torch.no_grad():
        return module(loader().dataset.tensors[0])


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that takes guards of the callback out, by name."""

    def take_out(*names: str, value: Any = None) -> None:
        for name in names:
            monkeypatch.setattr(f"lightning_lora.callbacks.lora.{name}", lambda *_, **__: value)

    return take_out


class InjectsInSetup(L.Callback):
    """LoRA as one would write it first: in the hook that is called ``setup``."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if any(isinstance(module, nn.Linear) for module in pl_module.modules()):
            inject(pl_module, METHOD, seed=0)


class StripsInHook(L.Callback):
    """Checkpoints of the adapters alone as one would write them first: in the hook that is called so."""

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: tensor for name, tensor in state.items() if "adapters" in name}


class Late(Lit):
    """Builds its network in ``configure_model``, as sharded strategies want it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = self.build()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What processes.py found: several processes train together."""
    folder = tmp_path_factory.mktemp("processes")
    run_processes("processes.py", folder, timeout=300)
    return {"forked": json.loads((folder / "forked.json").read_text())} | json.loads(
        (folder / "ranks.json").read_text()
    )


# ---- 1 to 4: adapters that are not there, or that nothing reaches


def test_trap_01_injection_in_setup_fine_tunes_everything_where_layers_are_built_later(trainer: Any) -> None:
    naive, run = Late(), trainer(callbacks=[InjectsInSetup()], max_epochs=4)
    run.fit(naive, loader())
    assert sites(naive) == []
    assert not any(torch.equal(tensor, state(Lit())[name]) for name, tensor in state(naive).items()), "all trained"
    assert fell(naive)

    module = Late()
    trainer(callbacks=[callback()], max_epochs=4).fit(module, loader())
    assert learned(module)
    assert same(base(module), base(Lit()))
    with pytest.raises(ValueError, match=r"'fist' matches nothing. Did you mean 'first'"):
        trainer(callbacks=[callback(target_modules=["fist"])]).fit(Late(), loader())


@pytest.mark.parametrize("how", ["fully_shard", "FullyShardedDataParallel", "DistributedDataParallel"])
def test_trap_02_adapters_that_come_after_the_user_shards_or_wraps_differ_between_ranks(
    how: str, processes: Any
) -> None:
    found = processes["wrapped_before_injection"][how]
    assert found["sites"] == 2
    assert not found["alike"], "no one sent their gradients"

    name = "net.first.weight, a DTensor" if how == "fully_shard" else f"net is a {how}"
    assert found["message"].startswith("ValueError")
    assert name in found["message"]
    assert "every process would train adapters of its own" in found["message"]
    assert ("use strategy='lora_fsdp2'" if how == "fully_shard" else "use strategy='ddp'") in found["message"]


def test_trap_02_adapters_that_are_sharded_with_their_layers_train_as_in_one_process(processes: Any) -> None:
    assert processes["sharded_after_injection"] == {"kinds": ["DTensor"], "like_one_process": True}


class Replacement(nn.Linear):
    """The layer of a precision plugin."""


class Replaces(Precision):
    """A plugin that gives every linear layer another class, with a bias that is new and hence trainable.

    Args:
        again: Replace also what was replaced before.
    """

    def __init__(self, again: bool = False) -> None:
        self.again = again

    def convert_module(self, module: nn.Module) -> nn.Module:
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear) and (self.again or not isinstance(child, Replacement)):
                    new = Replacement(child.in_features, child.out_features)
                    new.weight = child.weight
                    setattr(parent, name, new)
        return module


def test_trap_03_a_plugin_that_replaces_adapted_layers_leaves_the_biases_to_train(trainer: Any, without: Any) -> None:
    naive = Lit()
    trainer(callbacks=[InjectsInSetup()], plugins=[Replaces()], max_epochs=4).fit(naive, loader())
    assert sites(naive) == []
    assert [name for name, p in naive.named_parameters() if p.requires_grad] == ["net.first.bias", "net.second.bias"]
    assert fell(naive)

    module = Lit()
    trainer(callbacks=[callback()], plugins=[Replaces()]).fit(module, loader())
    assert isinstance(module.net.first, Replacement)
    assert learned(module)
    with pytest.raises(RuntimeError, match=r"2 of 2 adapters are gone since they were injected: net.first.weight"):
        trainer(callbacks=[callback()], plugins=[Replaces(again=True)]).fit(Lit(), loader())


class Checkpointed(Lit):
    """Checkpoints its first layer in the way that PyTorch advises against, below a head."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(lambda x: torch.tanh(self.net.first(x)), x, use_reentrant=True)
        return self.net.second(hidden)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # PyTorch's hint at this very fault
def test_trap_04_reentrant_checkpointing_leaves_adapters_where_they_are_while_a_head_trains(trainer: Any) -> None:
    naive, start = Checkpointed(), Lit()
    inject(start, METHOD, seed=0, target_modules=["first"])
    trainer(callbacks=[callback(modules_to_save=["second"], audit=False)], max_epochs=4).fit(naive, loader())
    assert same(state(naive, "lora"), state(start, "lora")), "the adapters are as they were drawn"
    assert not torch.equal(naive.net.second.weight, start.net.second.weight)
    assert fell(naive)

    with pytest.raises(RuntimeError, match=r"2 of 2 adapter parameters got no gradient .* pass use_reentrant=False"):
        trainer(callbacks=[callback(modules_to_save=["second"])]).fit(Checkpointed(), loader())


# ---- 5 to 8: optimizers


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=9),
    "cosine with eta_min": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=8, eta_min=0.005),
    "plateau with min_lr": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, min_lr=0.009),
}


class Rates(L.Callback):
    """Notes the learning rates of A and B at every step."""

    def __init__(self) -> None:
        self.ratios: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        a, b = (group["lr"] for group in trainer.optimizers[0].param_groups)
        self.ratios.append(b / a)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_trap_05_schedulers_undo_the_ratio_of_groups_made_by_hand(schedule: str, trainer: Any) -> None:
    def config(optimizer: Optimizer) -> Any:
        options = {"interval": "step", "monitor": "train_loss", "strict": True}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": SCHEDULES[schedule](optimizer), **options}}

    def by_hand(module: Lit) -> Any:
        named = list(module.named_parameters())
        a, b = ([p for name, p in named if name.endswith(factor)] for factor in ("lora_A", "lora_B"))
        return config(AdamW([{"params": a, "lr": 0.01}, {"params": b, "lr": 0.16}]))

    naive, ours = Rates(), Rates()
    trainer(callbacks=[InjectsInSetup(), naive]).fit(Lit(by_hand), loader())
    assert min(naive.ratios) < 8

    plain = Lit(lambda module: config(AdamW(module.parameters(), lr=0.01)))
    trainer(callbacks=[callback(lr_ratio=16), ours]).fit(plain, loader())
    assert ours.ratios == pytest.approx([16] * 8, rel=1e-12)


class Captured(Lit):
    """Builds its optimizer in ``__init__``, before anything is injected."""

    def __init__(self) -> None:
        super().__init__()
        self.early = AdamW(self.parameters(), lr=0.01)

    def configure_optimizers(self) -> Any:
        return self.early


def test_trap_06_an_optimizer_built_before_injection_holds_no_adapter(trainer: Any, monkeypatch: Any) -> None:
    naive = Captured()
    with monkeypatch.context() as patch:
        patch.setattr("lightning_lora.callbacks.optimizers.place", lambda *_: None)
        trainer(callbacks=[callback()]).fit(naive, loader())
    assert not any(factor.any() for factor in state(naive, "lora_B").values())
    assert naive.losses[4:] == naive.losses[:4]

    module, later = Captured(), Lit()
    for one in (module, later):
        trainer(callbacks=[callback()]).fit(one, loader())
    assert same(state(module), state(later))
    assert learned(module)


def head_in_a_group(module: Lit) -> Optimizer:
    return AdamW([{"params": module.net.first.parameters()}, {"params": module.net.second.parameters(), "lr": 0.1}])


def test_trap_07_a_head_that_has_a_group_of_its_own_is_frozen(trainer: Any, monkeypatch: Any) -> None:
    naive = Lit(head_in_a_group)
    with monkeypatch.context() as patch:
        patch.setattr("lightning_lora.callbacks.optimizers.place", lambda *_: None)
        trainer(callbacks=[callback(target_modules=["first"])], max_epochs=4).fit(naive, loader())
    assert torch.equal(naive.net.second.weight, Lit().net.second.weight), "a new head would stay as it was drawn"
    assert fell(naive)

    words = r"1 of the groups .* frozen parameters only \(first: net.second.weight\), .* list in modules_to_save"
    with pytest.warns(UserWarning, match=words):
        trainer(callbacks=[callback(target_modules=["first"])]).fit(Lit(head_in_a_group), loader())
    module = Lit(head_in_a_group)
    trainer(callbacks=[callback(target_modules=["first"], modules_to_save=["second"])]).fit(module, loader())
    assert not torch.equal(module.net.second.weight, Lit().net.second.weight)


def test_trap_07_a_head_that_has_the_optimizer_to_itself_is_frozen(trainer: Any) -> None:
    module = Lit(lambda module: AdamW(module.net.second.parameters(), lr=0.01))
    with pytest.warns(UserWarning, match=r"What it chose is frozen \(first: net.second.weight\); .* modules_to_save"):
        trainer(callbacks=[callback(target_modules=["first"])]).fit(module, loader())


def test_trap_07_norms_and_biases_that_have_a_group_without_decay_are_frozen_as_they_should_be(trainer: Any) -> None:
    def by_decay(module: Lit) -> Optimizer:
        named = list(module.named_parameters())
        no_decay = [p for name, p in named if name.endswith("bias")]
        rest = [p for name, p in named if not name.endswith("bias")]
        return AdamW([{"params": rest}, {"params": no_decay, "weight_decay": 0.0}], lr=0.01)

    trainer(callbacks=[callback()], max_epochs=1).fit(Lit(by_decay), loader())  # and nothing is said


class DecaysByHand(L.Callback):
    """Weight decay over whatever the optimizer holds."""

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        for parameter in (p for group in trainer.optimizers[0].param_groups for p in group["params"]):
            parameter.mul_(0.9)


def test_trap_08_frozen_parameters_in_the_groups_are_changed_by_what_walks_over_them(
    trainer: Any, monkeypatch: Any
) -> None:
    naive = Lit()
    with monkeypatch.context() as patch:
        patch.setattr("lightning_lora.callbacks.optimizers.place", lambda *_: None)
        trainer(callbacks=[DecaysByHand(), callback(audit=False)]).fit(naive, loader())
    assert not any(torch.equal(tensor, base(Lit())[name]) for name, tensor in base(naive).items())

    module, run = Lit(), trainer(callbacks=[DecaysByHand(), callback()])
    run.fit(module, loader())
    assert same(base(module), base(Lit()))
    held = [parameter for group in run.optimizers[0].param_groups for parameter in group["params"]]
    assert all(parameter.requires_grad for parameter in held)
    assert len(held) == 4


# ---- 9 and 10: modes


class Normed(Lit):
    """Has a norm layer with running statistics."""

    def build(self) -> nn.Module:
        return nn.Sequential(super().build(), nn.BatchNorm1d(3))


@IN_EVAL_MODE
def test_trap_09_running_statistics_of_the_frozen_base_drift_and_are_not_in_the_file(
    trainer: Any, without: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    def trained() -> tuple[Normed, Normed]:
        module, run = Normed(), trainer(callbacks=[callback()])
        run.fit(module, loader())
        run.save_checkpoint(tmp_path / "a.ckpt")
        return module, load_from_checkpoint(Normed, tmp_path / "a.ckpt")

    module, loaded = trained()
    assert torch.equal(predict(module), predict(loaded))
    assert same(base(module), base(Normed()))

    without("frozen_norms", value=[])
    module, loaded = trained()
    assert not same(base(module), base(Normed()))
    assert torch.equal(predict(module), predict(loaded)), "a second guard: what changes in the first batch is saved"

    monkeypatch.setattr(Buffers, "mark_changed", lambda self: None)
    module, loaded = trained()
    assert not torch.allclose(predict(module), predict(loaded), atol=1e-2)


@IN_EVAL_MODE
def test_trap_10_the_adapters_dropout_is_off_over_a_base_in_eval_mode(trainer: Any, monkeypatch: Any) -> None:
    def losses(dropout: float) -> list[float]:
        module = Lit()
        module.net.eval()  # as from_pretrained returns it, and Lightning leaves it
        trainer(callbacks=[callback(LoRA(r=2, dropout=dropout))]).fit(module, loader())
        return module.losses

    with monkeypatch.context() as patch:
        patch.setattr(LoRACallback, "_train_adapters", lambda self: None)
        assert losses(dropout=0.5) == losses(dropout=0.0), "adapters in the mode of their layer"

    assert losses(dropout=0.5) != losses(dropout=0.0)


# ---- 11 to 16: what is kept


def test_trap_11_adapters_trained_in_a_process_of_their_own_stay_there(processes: Any) -> None:
    assert processes["forked"]["sites"] == 0, "the module that fit was called with"
    assert "injected there would stay there: use strategy='ddp'" in processes["forked"]["message"]
    assert processes["forked"]["came_back"] == [True] * 4, "of adapters that were injected before"
    run = L.Trainer(accelerator="cpu", devices=2, strategy="ddp_spawn", barebones=True)
    with pytest.raises(ValueError, match="injected there would stay there: use strategy='ddp'"):
        check_launcher(run.strategy)


@pytest.fixture
def trained(trainer: Any, tmp_path: Path) -> tuple[Lit, Path]:
    """Return a trained module and its checkpoint."""
    module, run = Lit(), trainer(callbacks=[callback()])
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "trained.ckpt")
    return module, tmp_path / "trained.ckpt"


def test_trap_12_a_lenient_load_returns_the_base_without_adapters(trained: Any) -> None:
    module, path = trained
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = Lit.load_from_checkpoint(path, strict=False)
    assert torch.equal(predict(loaded), predict(Lit())), "the untrained base"

    words = "only adapters are in this file, read it with lightning_lora.load_from_checkpoint"
    assert any(words in str(warning.message) for warning in caught)
    with pytest.raises(RuntimeError, match=words):
        Lit.load_from_checkpoint(path)
    assert torch.equal(predict(load_from_checkpoint(Lit, path)), predict(module))


class OtherBase(Lit):
    def build(self) -> nn.Module:
        torch.manual_seed(8)
        return Net()


def test_trap_13_adapters_load_onto_another_base(trained: Any) -> None:
    module, path = trained
    other = OtherBase()
    inject(other, METHOD)
    unexpected = other.load_state_dict(state(module, "lora"), strict=False).unexpected_keys
    assert unexpected == [], "every key fits"
    assert not torch.allclose(predict(other), predict(module), atol=1e-2)

    with pytest.raises(AdapterError, match=r"trained on another base: 2 of 2 adapted weights differ"):
        load_from_checkpoint(OtherBase, path)
    load_from_checkpoint(OtherBase, path, allow_base_mismatch=True)


@pytest.mark.parametrize("ours", [False, True])
def test_trap_14_saves_of_weights_alone_skip_the_hook_that_strips_the_base(
    ours: bool, trainer: Any, tmp_path: Path
) -> None:
    module = Lit()
    run = trainer(callbacks=[callback()] if ours else [InjectsInSetup(), StripsInHook()])
    run.fit(module, loader())
    for weights_only in (False, True):
        run.save_checkpoint(tmp_path / "a.ckpt", weights_only=weights_only)
        names = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"].keys()
        holds_base = bool(names & base(module).keys())
        assert holds_base == (weights_only and not ours)


def values(content: Any) -> list[Tensor]:
    if isinstance(content, Tensor):
        return [content]
    inner = content.values() if isinstance(content, dict) else content if isinstance(content, list | tuple) else ()
    return [tensor for one in inner for tensor in values(one)]


AVERAGING = {"EMA": lambda: EMAWeightAveraging(decay=0.9), "SWA": lambda: SWA(0.01, swa_epoch_start=1)}


@pytest.mark.parametrize("kind", AVERAGING)
@pytest.mark.parametrize("ours", [False, True])
def test_trap_15_averaging_callbacks_write_the_whole_base(ours: bool, kind: str, trainer: Any, tmp_path: Path) -> None:
    class Adapted(Lit):
        def __init__(self) -> None:
            super().__init__()
            inject(self, METHOD, seed=0)

    module = Lit() if ours else Adapted()
    saver = ModelCheckpoint(tmp_path, "a", every_n_epochs=2)
    kept = [callback(), AVERAGING[kind](), saver] if ours else [AVERAGING[kind](), StripsInHook(), saver]
    trainer(callbacks=kept, enable_checkpointing=True, max_epochs=3).fit(module, loader())

    found = values(torch.load(tmp_path / "a.ckpt", weights_only=True))
    holds_base = any(torch.equal(tensor, weight) for tensor in found for weight in base(module).values())
    assert holds_base == (not ours)


def test_trap_15_a_copy_from_before_injection_is_averaged_with_other_parameters(trainer: Any, without: Any) -> None:
    with pytest.raises(ValueError, match=r"EMAWeightAveraging copies the module before .* put LoRACallback before it"):
        trainer(callbacks=[AVERAGING["EMA"](), callback()]).fit(Lit(), loader())

    without("check_order")
    without("averaging_callbacks", value=[])
    with pytest.raises(RuntimeError, match="must match the size"):  # the shapes alone tell
        trainer(callbacks=[AVERAGING["EMA"](), callback()]).fit(Lit(), loader())


def test_trap_16_a_sharded_checkpoint_of_adapters_alone_is_written_and_cannot_be_read(processes: Any) -> None:
    found = processes["sharded_checkpoint"]
    assert ".distcp" in found["written"]
    assert found["message"].startswith("CheckpointException")
    assert "Missing key in checkpoint state_dict: state_dict.net.first.weight" in found["message"]

    assert found["refused"].startswith("ValueError: strategy=ModelParallelStrategy: it would gather the whole base")
    with pytest.raises(ValueError, match="use strategy='lora_fsdp2'"):
        check_strategy(ModelParallelStrategy())


# ---- 17 and 18: resuming


class Square(Lit):
    """Two layers of one size, so that no shape tells their moments apart, nor those of A and B."""

    def build(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


SQUARE = LoRA(r=4)
by_layer = {
    2: lambda module: AdamW([{"params": module.net[0].parameters()}, {"params": module.net[2].parameters()}], lr=0.01),
    1: lambda module: AdamW(module.parameters(), lr=0.01),
}


def moments(optimizer: Optimizer, module: nn.Module) -> dict[str, Tensor]:
    return {name: optimizer.state[p]["exp_avg"].clone() for name, p in module.named_parameters() if p.requires_grad}


def test_trap_17_moments_go_to_other_parameters_where_groups_are_as_many_and_as_large_by_chance(
    trainer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    module, run = Square(by_layer[2]), trainer(callbacks=[callback(SQUARE)])
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    saved = moments(run.optimizers[0], module)

    naive = Square()
    inject(naive, SQUARE, seed=0)
    named = list(naive.named_parameters())
    a, b = ([p for name, p in named if name.endswith(factor)] for factor in ("lora_A", "lora_B"))
    by_role = AdamW([{"params": a}, {"params": b}], lr=0.01)
    by_role.load_state_dict(torch.load(tmp_path / "a.ckpt", weights_only=True)["optimizer_states"][0])
    wrong = [name for name, moment in moments(by_role, naive).items() if not torch.equal(moment, saved[name])]
    assert [name.replace("adapters.weight.default.lora_", "") for name in wrong] == ["net.0.B", "net.2.A"]

    other = trainer(callbacks=[callback(SQUARE, lr_ratio=16)], max_epochs=3)
    with pytest.raises(ValueError, match=r"groups of \[2, 2\] parameters, .* groups of \[4\]: build the groups that"):
        other.fit(Square(by_layer[1]), loader(), ckpt_path=tmp_path / "a.ckpt")


def test_trap_17_moments_find_their_parameters_in_groups_that_were_split_otherwise(
    trainer: Any, tmp_path: Path
) -> None:
    module, run = Square(by_layer[2]), trainer(callbacks=[callback(SQUARE)])
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    again, resumed = Square(by_layer[2]), trainer(callbacks=[callback(SQUARE, lr_ratio=16)], max_epochs=2)
    resumed.fit(again, loader(), ckpt_path=tmp_path / "a.ckpt")
    assert [len(group["params"]) for group in resumed.optimizers[0].param_groups] == [1, 1, 1, 1]
    assert same(moments(resumed.optimizers[0], again), moments(run.optimizers[0], module))


class Worsens(Lit):
    """Logs a score that is best in the first epoch."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("score", float(self.current_epoch))


def test_trap_18_the_last_checkpoint_is_as_old_as_the_best_and_a_second_saver_has_the_last_step(
    trainer: Any, tmp_path: Path
) -> None:
    best = ModelCheckpoint(tmp_path / "best", monitor="score", save_top_k=1, save_last=True)
    newest = ModelCheckpoint(tmp_path / "newest", "last")
    module = Worsens()
    trainer(callbacks=[callback(), best, newest], max_epochs=3, enable_checkpointing=True).fit(
        module, loader(), loader()
    )
    assert torch.load(tmp_path / "best" / "last.ckpt", weights_only=True)["global_step"] == 4, "Lightning's choice"

    assert torch.load(tmp_path / "newest" / "last.ckpt", weights_only=True)["global_step"] == 12
    assert same(state(load_from_checkpoint(Worsens, tmp_path / "newest" / "last.ckpt")), state(module))
    said = (Path(__file__).parent.parent / "docs" / "checkpoints.md").read_text()
    assert "`last.ckpt` is the last step only" in said


class Waits(TorchCheckpointIO):
    """A writer on a slow disk: it writes when it is told to."""

    def __init__(self) -> None:
        self.ready = threading.Event()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        assert self.ready.wait(60)
        super().save_checkpoint(checkpoint, path, storage_options)


@pytest.mark.parametrize("ours", [False, True])
def test_trap_18_a_checkpoint_that_is_removed_before_it_is_written_stays(ours: bool, trained: Any) -> None:
    module, path = trained
    target = path.with_name("slow.ckpt")
    inner = Waits()
    writer: Any = AsyncCheckpointIO(inner)
    if ours:
        writer = AdapterCheckpointIO(writer, module)
    writer.save_checkpoint({"state_dict": module.state_dict()}, target)
    writer.remove_checkpoint(target)
    inner.ready.set()
    writer.teardown()
    assert target.exists() == (not ours)


# ---- 19 to 22: numbers


class Tied(Lit):
    """Embeds a number, and scores the numbers by the same weight."""

    def build(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            net = nn.ModuleDict({"embed": nn.Embedding(3, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 3)})
        net["head"].weight = net["embed"].weight
        return net

    def forward(self, x: Tensor) -> Tensor:
        return self.net["head"](self.net["body"](self.net["embed"](x[:, :3].argmax(1))))


def test_trap_19_a_tied_head_that_is_trained_in_full_changes_the_embedding(
    trainer: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"target_modules": ["body"], "modules_to_save": ["head"]}
    naive = Tied()
    with monkeypatch.context() as patch:
        patch.setattr("lightning_lora.callbacks.injection.tied_to_frozen", lambda _: None)
        trainer(callbacks=[callback(**options)]).fit(naive, loader())
    assert not torch.equal(naive.net["embed"].weight, Tied().net["embed"].weight)

    module, run = Tied(), trainer(callbacks=[callback(**options)])
    with pytest.warns(UserWarning, match=r"net.head.weight is net.embed.weight too \(tied weights\), so both layers"):
        run.fit(module, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    names = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"].keys()
    assert {"net.embed.weight", "net.head.weight"} <= names, "by both names, so that it fits untied models too"
    loaded = load_from_checkpoint(Tied, tmp_path / "a.ckpt")
    assert loaded.net["head"].weight is loaded.net["embed"].weight
    assert torch.equal(predict(loaded), predict(module))


@pytest.mark.parametrize("tied", [True, False])
def test_trap_19_merging_into_a_tied_head_changes_the_embedding(tied: bool, trainer: Any) -> None:
    module = Tied()
    if not tied:
        module.net["head"].weight = nn.Parameter(module.net["head"].weight.detach().clone())
    trainer(callbacks=[callback(target_modules=["head"])]).fit(module, loader())
    naive, expected = copy.deepcopy(module), predict(module)
    [site] = sites(naive)
    with torch.no_grad(), using(naive):
        site.module.weight.add_(site.adapter("default").delta())
        assert torch.allclose(predict(naive), expected, atol=1e-6) != tied

    if tied:
        with pytest.raises(ValueError, match=r"cannot merge into net.head.weight: it is tied to net.embed.weight"):
            merge_(module)
    else:
        merge_(module)
    assert torch.allclose(predict(module), expected, atol=1e-6)


def test_trap_20_small_updates_are_rounded_away_in_bf16(trainer: Any) -> None:
    def moved(**options: Any) -> float:
        module = Lit(lambda module: SGD(module.parameters(), lr=1e-3))
        run = trainer(callbacks=[callback(**options)], precision="bf16-true", max_epochs=1)
        run.validate(module, loader(), verbose=False)
        before = torch.cat([tensor.flatten() for tensor in state(module, "lora_A").values()])
        run.fit(module, loader())
        after = torch.cat([tensor.flatten() for tensor in state(module, "lora_A").values()])
        return float((after != before).float().mean())

    assert moved(dtype="bfloat16") < 0.1
    assert moved() > 0.9


def test_trap_21_every_rank_draws_adapters_of_its_own_where_the_seed_is_pytorchs(trainer: Any) -> None:
    def drawn(rank: int, adapt: Callable[[Lit], Any]) -> dict[str, Tensor]:
        module = Lit()
        torch.manual_seed(rank)  # an unseeded process starts from a seed of its own
        adapt(module)
        return state(module, "lora_A")

    first, second = (drawn(rank, lambda module: inject(module, METHOD)) for rank in (0, 1))
    assert not any(torch.equal(first[name], second[name]) for name in first)

    def fitted(module: Lit) -> None:
        trainer(callbacks=[callback()]).validate(module, loader(), verbose=False)

    assert same(drawn(0, fitted), drawn(1, fitted))


class Attends(Lit):
    """Has attention, whose adapted weights are made anew for every forward, and validates on merged weights."""

    def build(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2, batch_first=True), "net": Net()})

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None]
        return self.net["net"](self.net["attention"](x, x, x)[0][:, 0])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)
        with merged(self):
            self.loss(batch)


def cache_factors(self: LoRAAdapter) -> tuple[Tensor, Tensor]:
    """Compute the factors once in eval mode, as one would to save work."""
    if "cached" in self.__dict__:
        return self.__dict__["cached"]
    factors = self.lora_B * 1, self.lora_A * 1
    if not self.training:
        self.__dict__["cached"] = factors
    return factors


@pytest.mark.parametrize("inference_mode", [True, False])
def test_trap_22_what_is_cached_in_validation_is_cut_off_from_the_training_that_follows(
    inference_mode: bool, trainer: Any, monkeypatch: Any
) -> None:
    options: dict[str, Any] = {"modules_to_save": ["second"]}
    with monkeypatch.context() as patch:
        patch.setattr(LoRAAdapter, "factors", cache_factors)
        naive = Lit()
        run = trainer(callbacks=[callback(**options, audit=False)], inference_mode=inference_mode, max_epochs=4)
        run.fit(naive, loader(), loader())
        assert not any(factor.any() for factor in state(naive, "lora_B").values())
        assert fell(naive)
        with pytest.raises(RuntimeError, match="2 of 2 adapter parameters got no gradient"):
            trainer(callbacks=[callback(**options)]).fit(Lit(), loader(), loader())


def test_trap_22_nothing_is_cached_in_validation(trainer: Any) -> None:
    validated, plain = Attends(), Attends()
    trainer(callbacks=[callback()]).fit(validated, loader(), loader())
    trainer(callbacks=[callback()]).fit(plain, loader())
    assert validated.losses == plain.losses
    assert same(state(validated), state(plain))
    assert not any(tensor.is_inference() for tensor in validated.state_dict().values())
    held = [value for module in validated.modules() for value in values(list(module.__dict__.values()))]
    assert not any(value.is_inference() for value in held)


# ---- 23 to 25


class Forgets(Lit):
    """Builds its network anew for every stage."""

    def setup(self, stage: str) -> None:
        self.net = self.build()


def test_trap_23_a_module_that_is_built_anew_is_tested_without_its_training(
    trainer: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    module, run = Forgets(), trainer(callbacks=[callback()])
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    adapted = predict(module)
    untrained = trainer().test(Lit(), loader(), verbose=False)
    with monkeypatch.context() as patch:
        patch.setattr("lightning_lora.callbacks.injection.rank_zero_warn", lambda _: None)
        assert run.test(module, loader(), verbose=False) == untrained

    with pytest.warns(UserWarning, match=r"Forgets built its layers anew, .* its adapters are fresh: pass ckpt_path"):
        run.test(module, loader(), verbose=False)
    with pytest.warns(UserWarning, match="Forgets built its layers anew"):
        assert run.test(module, loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False) != untrained
    assert torch.equal(predict(module), adapted)


def literals(annotation: Any) -> list[str]:
    """Return every word that an annotation allows."""
    if typing.get_origin(annotation) is Literal:
        return [word for word in typing.get_args(annotation) if isinstance(word, str)]
    return [word for inner in typing.get_args(annotation) for word in literals(inner)]


def test_trap_24_off_in_yaml_is_a_bool_and_no_word_of_ours_is(trainer: Any) -> None:
    class Switch:
        def __init__(self, mode: Literal["on", "off"] = "on", kind: Any = "on") -> None:
            self.mode, self.kind = mode, kind

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Switch, "switch")
    assert parser.parse_string("switch: {kind: off}").switch.kind is False, "another value, and nothing is said"
    with pytest.raises(Exception, match=r"Expected a typing.Literal"):
        parser.parse_string("switch: {mode: off}")

    words = [
        word
        for function in (LoRACallback, LoRA)
        for annotation in typing.get_type_hints(function.__init__).values()
        for word in literals(annotation)
    ]
    assert {"none", "lora_only", "all", "linear", "rsqrt", "float32", "A", "B"} <= set(words)
    words += [p.default for p in inspect.signature(LoRACallback).parameters.values() if isinstance(p.default, str)]
    assert [word for word in words if yaml.safe_load(f"value: {word}") != {"value": word}] == []
    with pytest.raises(ValueError, match="bias=False: must be 'none', 'lora_only' or 'all'"):
        trainer(callbacks=[callback(bias=False)]).fit(Lit(), loader())


def test_trap_25_bases_that_differ_between_ranks_stay_different_where_ddp_is_told_to_ignore_them(
    processes: Any,
) -> None:
    found = processes["different_bases"]
    assert found["ignored"] == {"before": False, "after": False, "adapters": True}

    assert found["ours"] == {"before": False, "after": True, "adapters": True}, "DDP sent the base of rank 0"


# ---- beyond the list


def test_two_callbacks_would_train_what_neither_says(trainer: Any, monkeypatch: Any) -> None:
    def two(other: type[LoRACallback] = LoRACallback) -> list[L.Callback]:
        return [callback(exclude_modules=["second"], lr_ratio=16), other(METHOD, exclude_modules=["first"])]

    with monkeypatch.context() as patch:
        patch.setattr(LoRACallback, "state_dict", L.Callback.state_dict)
        patch.setattr("lightning_lora.callbacks.lora.check_conflicts", lambda _: None)
        module, run = Lit(), trainer(callbacks=two())
        run.fit(module, loader())
    assert len(sites(module)) == 2
    assert len(run.optimizers[0].param_groups) == 1, "the ratio of one is gone"

    with pytest.raises(RuntimeError, match="more than one stateful callback of type `LoRACallback`"):
        trainer(callbacks=two())

    class Own(LoRACallback):
        """Has a state key of its own, so that Lightning takes it for another callback."""

    with pytest.raises(ValueError, match="this Trainer has LoRACallback and Own: give it one"):
        trainer(callbacks=two(Own)).fit(Lit(), loader())


def quantizes(test: Any) -> Any:
    """Mark a test that quantizes dynamically."""
    for message in ("torch.ao.quantization is deprecated", "torch.quantize_per_tensor", "quantized..linear_dynamic"):
        test = pytest.mark.filterwarnings(f"ignore:{message}")(test)  # the last is PyTorch's hint at this very fault
    reason = "this build of torch cannot quantize"
    return pytest.mark.skipif(torch.backends.quantized.engine == "none", reason=reason)(test)


def quantized(*names: str, build: Callable[[], nn.Module]) -> nn.Module:
    quantization = pytest.importorskip("torch.ao.quantization", reason="torch.ao may be gone from later versions")
    return quantization.quantize_dynamic(build(), set(names), dtype=torch.qint8)


class PartlyQuantized(Lit):
    """An encoder whose last layer is quantized, below a head."""

    def build(self) -> nn.Module:
        def encoder() -> nn.Module:
            return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8))

        with torch.random.fork_rng():
            torch.manual_seed(7)
            return nn.ModuleDict({"encoder": quantized("2", build=encoder), "head": nn.Linear(8, 3)})

    def forward(self, x: Tensor) -> Tensor:
        return self.net["head"](torch.tanh(self.net["encoder"](x)))


STOP = "net.encoder.2 is a dynamically quantized Linear of torch.ao, through which no gradient passes"


@quantizes
@IN_EVAL_MODE
def test_adapters_below_a_quantized_layer_learn_nothing_while_a_head_above_trains(trainer: Any) -> None:
    options: dict[str, Any] = {"target_modules": ["encoder.0"], "modules_to_save": ["head"]}
    naive = PartlyQuantized()
    trainer(callbacks=[callback(**options, audit=False)], max_epochs=4).fit(naive, loader())
    assert not naive.net["encoder"][0].adapters["weight"]["default"].lora_B.any()
    assert fell(naive)

    with pytest.raises(RuntimeError, match=f"2 of 2 adapter parameters got no gradient .* {STOP}: adapters before it"):
        trainer(callbacks=[callback(**options)]).fit(PartlyQuantized(), loader())
    module = PartlyQuantized()
    trainer(callbacks=[callback(target_modules=["head"])]).fit(module, loader())
    assert learned(module), "above it they learn"


class Rounds(torch.autograd.Function):
    """Rounds, and says that there is no gradient, as kernels without a backward do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (8 * x).round() / 8

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        return None


def test_adapters_below_any_function_without_a_gradient_learn_nothing_while_a_head_above_trains(trainer: Any) -> None:
    class RoundsBelow(Lit):
        def forward(self, x: Tensor) -> Tensor:
            return self.net.second(Rounds.apply(torch.tanh(self.net.first(x))))

    naive = RoundsBelow()
    trainer(callbacks=[callback(modules_to_save=["second"], audit=False)], max_epochs=4).fit(naive, loader())
    assert not naive.net.first.adapters["weight"]["default"].lora_B.any()
    assert fell(naive)

    with pytest.raises(RuntimeError, match="2 of 2 adapter parameters got no gradient"):
        trainer(callbacks=[callback(modules_to_save=["second"])]).fit(RoundsBelow(), loader())


@quantizes
def test_a_quantized_layer_is_known_and_no_target() -> None:
    module = PartlyQuantized()
    with pytest.raises(RuntimeError, match=f"the loss depends on no adapter. {STOP}"):
        check_connected(torch.zeros(()), module)
    for target in (["encoder.2"], "all-linear"):
        with pytest.raises(ValueError, match=r"net.encoder.2, a dynamically quantized Linear of torch.ao, through"):
            inject(module, METHOD, target)
    stops = {name for name, inner in module.named_modules() if why_no_gradient(inner) is not None}
    assert "net.encoder.2" in stops
    assert not stops & {"", "net", "net.encoder", "net.encoder.0", "net.encoder.1", "net.head"}
    lstm = quantized("0", build=lambda: nn.Sequential(nn.LSTM(2, 2)))[0]
    assert why_no_gradient(lstm) == "a dynamically quantized LSTM of torch.ao, through which no gradient passes"
    floating = torch.ao.nn.quantized.FloatFunctional()
    assert why_no_gradient(floating) is None
    x = torch.ones(2, requires_grad=True)
    floating.add(x, x).sum().backward()
    assert x.grad is not None


class Sparse(Lit):
    """Has a sparse embedding with an optimizer of its own, as large vocabularies do, and steps by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def build(self) -> nn.Module:
        return nn.ModuleDict({"embed": nn.Embedding(3, 4, sparse=True), "head": nn.Linear(4, 3)})

    def forward(self, x: Tensor) -> Tensor:
        return self.net["head"](self.net["embed"](x[:, :3].argmax(1)))

    def configure_optimizers(self) -> Any:
        return SparseAdam(list(self.net["embed"].parameters())), AdamW(self.net["head"].parameters())

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for optimizer in optimizers:
            optimizer.step()


def test_adapters_in_an_optimizer_for_sparse_gradients_are_refused_before_the_first_step(
    trainer: Any, monkeypatch: Any
) -> None:
    targets = ["embed", "head"]
    with monkeypatch.context() as patch:
        patch.setattr("lightning_lora.optim._check_dense", lambda *_: None)
        with pytest.raises(RuntimeError, match="SparseAdam does not support dense gradients"):
            trainer(callbacks=[callback(target_modules=targets)]).fit(Sparse(), loader())

    words = r"net.embed.adapters.weight.default.lora_A is in SparseAdam, .* those of adapters are dense"
    with pytest.raises(ValueError, match=words):
        trainer(callbacks=[callback(target_modules=targets)]).fit(Sparse(), loader())
    trainer(callbacks=[callback(target_modules=["head"], modules_to_save=["embed"])]).fit(Sparse(), loader())
