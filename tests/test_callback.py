"""`LoRACallback` in a Trainer: when it injects, what it leaves behind, and what it stops."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from conftest import Lit, Net, loader
from lightning.pytorch.callbacks import BatchSizeFinder, EMAWeightAveraging, LearningRateFinder
from lightning.pytorch.callbacks import StochasticWeightAveraging as SWA
from lightning.pytorch.plugins import Precision
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRA, LoRACallback, inject, load_from_checkpoint, merged, sites

METHOD = LoRA(r=2, alpha=4)
NAMES = ["net.first.weight", "net.second.weight"]


def callback(**kwargs: Any) -> LoRACallback:
    return LoRACallback(METHOD, **kwargs)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def base(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in snapshot(module).items() if "adapters" not in name}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def moved(module: nn.Module) -> bool:
    """Tell whether there are adapters and every B has left zero."""
    factors = [parameter for name, parameter in module.named_parameters() if name.endswith("lora_B")]
    return bool(factors) and all(bool(factor.any()) for factor in factors)


# ---- when it injects


class InSetup(Lit):
    """Builds its network in ``setup``."""

    def __init__(self) -> None:
        super().__init__()
        del self.net

    def setup(self, stage: str) -> None:
        if not hasattr(self, "net"):
            self.net = self.build()


class InConfigureModel(Lit):
    """Builds its network in ``configure_model``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = self.build()


class OnMeta(InConfigureModel):
    """Builds its network on the meta device, and fills it itself."""

    def configure_model(self) -> None:
        if self.net is None:
            with torch.device("meta"):
                self.net = Net()
            self.net.to_empty(device="cpu").load_state_dict(self.build().state_dict())


STYLES = [Lit, InSetup, InConfigureModel, OnMeta]


@pytest.mark.parametrize("style", STYLES)
def test_adapters_train_wherever_the_module_builds_its_layers(style: Any, trainer: Any) -> None:
    module = style()
    trainer(callbacks=[callback()]).fit(module, loader())
    assert [site.name for site in sites(module)] == NAMES
    assert moved(module)
    assert same(base(module), base(Lit()))
    assert {name for name, p in module.named_parameters() if p.requires_grad} == {
        name for name in module.state_dict() if "adapters" in name
    }


@pytest.mark.parametrize("style", STYLES)
def test_every_style_of_building_trains_bit_for_bit_the_same(style: Any, trainer: Any) -> None:
    module, reference = style(), Lit()
    for one in (module, reference):
        trainer(callbacks=[callback()]).fit(one, loader())
    assert module.losses == reference.losses
    assert same(snapshot(module), snapshot(reference))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("first", ["fit", "validate", "test", "predict"])
def test_it_injects_once_whatever_runs_first_and_after(style: Any, first: str, trainer: Any) -> None:
    module = style()
    getattr(trainer(callbacks=[callback()]), first)(module, loader())
    adapters = [site.adapter("default") for site in sites(module)]
    assert len(adapters) == 2
    for then in ("fit", "fit", "validate", "test", "predict"):
        getattr(trainer(callbacks=[callback()]), then)(module, loader())
        assert all(site.adapter("default") is one for site, one in zip(sites(module), adapters, strict=True))
    assert moved(module)


def test_a_module_that_builds_its_layers_anew_for_every_stage_is_told_that_its_training_is_gone(trainer: Any) -> None:
    class Forgets(InSetup):
        def setup(self, stage: str) -> None:
            self.net = self.build()

    module, run = Forgets(), trainer(callbacks=[callback()])
    run.fit(module, loader())
    assert moved(module)
    with pytest.warns(UserWarning, match=r"Forgets built its layers anew, .* its adapters are fresh: pass ckpt_path"):
        run.test(module, loader(), verbose=False)
    assert not moved(module)


def test_one_trainer_fits_and_tests_again_with_what_it_has_trained(trainer: Any) -> None:
    module, run = Lit(), trainer(callbacks=[callback()], max_epochs=1)
    run.fit(module, loader())
    after_one = snapshot(module)
    run.fit_loop.max_epochs = 2
    run.fit(module, loader())
    once = Lit()
    trainer(callbacks=[callback()], max_epochs=1).fit(once, loader())
    assert same(after_one, snapshot(once))
    assert len(module.losses) == 8
    assert not same(after_one, snapshot(module))
    before = snapshot(module)
    run.test(module, loader())
    assert same(before, snapshot(module))


def test_validate_before_fit_measures_the_base_bit_for_bit(trainer: Any) -> None:
    plain = trainer().validate(Lit(), loader(), verbose=False)
    adapted = trainer(callbacks=[callback()]).validate(Lit(), loader(), verbose=False)
    assert adapted == plain
    ours = trainer(callbacks=[callback()]).predict(Lit(), loader())
    assert all(torch.equal(one, two) for one, two in zip(ours, trainer().predict(Lit(), loader()), strict=True))


def test_fast_dev_run_trains_one_batch(trainer: Any) -> None:
    module = Lit()
    trainer(callbacks=[callback()], fast_dev_run=True).fit(module, loader(), loader())
    assert len(module.losses) == 1
    assert moved(module)


def test_a_callback_that_the_module_brings_itself_works_in_every_run(trainer: Any) -> None:
    class Brings(Lit):
        def configure_callbacks(self) -> list[L.Callback]:
            return [callback()]

    module = Brings()
    for _ in range(2):
        trainer().fit(module, loader())
    assert len(module.losses) == 16
    assert moved(module)
    trainer().test(module, loader())
    assert_clean(module)


class Tuned(Lit):
    """A module with the attributes that Lightning tunes, and a norm layer whose statistics a tuner could change."""

    def __init__(self) -> None:
        super().__init__()
        self.lr, self.batch_size = 0.01, 2
        self.net = nn.Sequential(self.net, nn.BatchNorm1d(3))
        self.tuned_batches = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.tuned_batches += 1
        return super().training_step(batch, batch_idx)

    def train_dataloader(self) -> Any:
        return loader(32 // self.batch_size, self.batch_size)

    def val_dataloader(self) -> Any:
        return loader()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


MEANT = pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode at the start of training")  # it is meant


@MEANT
@pytest.mark.parametrize("what", ["lr_find", "scale_batch_size"])
def test_tuners_leave_the_module_as_the_base_with_fresh_adapters(what: str, trainer: Any, tmp_path: Path) -> None:
    module, fresh = Tuned(), Tuned()
    trainer(callbacks=[callback()]).validate(fresh, loader(), verbose=False)
    options = {"num_training": 8} if what == "lr_find" else {"max_trials": 2, "steps_per_trial": 2}
    getattr(Tuner(trainer(callbacks=[callback()])), what)(module, **options)
    assert module.tuned_batches >= 4
    assert same(snapshot(module), snapshot(fresh))
    assert_clean(module)
    assert list(tmp_path.iterdir()) == [], "its temporary checkpoint and adapter folder are gone"


@MEANT
@pytest.mark.parametrize(
    "build",
    [
        lambda: LearningRateFinder(num_training_steps=8, update_attr=False),
        lambda: BatchSizeFinder(max_trials=2, steps_per_trial=2),
    ],
)
@pytest.mark.parametrize("first", ["ours", "finder"])
def test_finders_as_callbacks_do_not_change_the_training_that_follows(
    first: str, build: Any, trainer: Any, tmp_path: Path
) -> None:
    module, plain = Tuned(), Tuned()
    ours, finder = callback(), build()
    trainer(callbacks=[ours, finder] if first == "ours" else [finder, ours]).fit(module)
    plain.batch_size = module.batch_size
    trainer(callbacks=[callback()]).fit(plain)
    assert module.tuned_batches > plain.tuned_batches
    assert same(snapshot(module), snapshot(plain))
    assert list(tmp_path.iterdir()) == []


# ---- what it leaves behind


def hooks(module: nn.Module) -> list[str]:
    return [
        f"{name}.{kind}"
        for name, inner in module.named_modules()
        for kind, registered in inner.__dict__.items()
        if "hooks" in kind and isinstance(registered, dict) and registered
    ] + [name for name, p in module.named_parameters() if p._backward_hooks]


def assert_clean(module: nn.Module) -> None:
    """Nothing of ours is on the module but the adapters."""
    ours = {"configure_model", "configure_optimizers", "train", "training_step"}
    assert [name for name, inner in module.named_modules() if ours & inner.__dict__.keys()] == []
    assert hooks(module) == []


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_patches_and_hooks_are_gone_after_a_run(style: Any, stage: str, trainer: Any) -> None:
    module = style()
    getattr(trainer(callbacks=[callback()]), stage)(module, loader())
    assert_clean(module)
    assert "configure_optimizers" not in module.__dict__


@MEANT
@pytest.mark.parametrize(
    "where", ["setup", "configure_model", "configure_optimizers", "on_fit_start", "training_step", "validation_step"]
)
def test_patches_and_hooks_are_gone_after_an_exception(where: str, trainer: Any) -> None:
    def boom(*_: Any, **__: Any) -> None:
        raise ArithmeticError("boom")

    module = type("Fails", (Tuned,), {where: boom})()
    run = trainer(callbacks=[callback()], num_sanity_val_steps=0)
    with pytest.raises(ArithmeticError, match="boom"):
        run.fit(module, loader(), loader())
    assert_clean(module)


def test_a_method_that_the_user_put_on_the_instance_is_there_again_after_the_run(trainer: Any) -> None:
    module = Lit()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.01)  # type: ignore[method-assign]
    own = module.__dict__["configure_optimizers"]
    run = trainer(callbacks=[callback()])
    run.fit(module, loader())
    assert module.__dict__["configure_optimizers"] is own
    assert isinstance(run.optimizers[0], torch.optim.SGD)


@pytest.mark.parametrize("name", ["configure_model", "configure_optimizers"])
def test_a_method_that_setup_replaces_stops_the_run_because_ours_is_lost(name: str, trainer: Any) -> None:
    class Replaces(Lit):
        def setup(self, stage: str) -> None:
            setattr(self, name, self.own)

        def own(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1) if name == "configure_optimizers" else None

    module = Replaces()
    with pytest.raises(RuntimeError, match=f"{name} of Replaces was replaced in its setup, .* replace it in __init__"):
        trainer(callbacks=[callback()]).fit(module, loader())
    assert module.__dict__[name] == module.own


# ---- what it stops


class Unused(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(4, 4)


def test_a_layer_that_the_forward_does_not_reach_stops_the_run_with_its_name(trainer: Any) -> None:
    module = Unused()
    with pytest.raises(RuntimeError, match=r"2 of 6 .* idle.weight \(default.lora_A\), .* exclude_modules=\['idle'\]"):
        trainer(callbacks=[callback()]).fit(module, loader())
    assert len(module.losses) == 1, "it stops after the first batch"
    trainer(callbacks=[callback(exclude_modules=["idle"])]).fit(Unused(), loader())


def test_the_audit_can_be_switched_off(trainer: Any) -> None:
    module = Unused()
    trainer(callbacks=[callback(audit=False)]).fit(module, loader())
    assert len(module.losses) == 8


class Checkpointed(Lit):
    """A frozen input into a checkpointed block, then a head."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(lambda x: torch.tanh(self.net.first(x)), x, use_reentrant=self.reentrant)
        return self.net.second(hidden)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # torch's hint at this very fault
def test_reentrant_checkpointing_of_a_frozen_input_stops_although_a_head_trains(trainer: Any) -> None:
    with pytest.raises(RuntimeError, match=r"net.first.weight \(default.lora_A\).* pass use_reentrant=False") as raised:
        trainer(callbacks=[callback(modules_to_save=["second"])]).fit(Checkpointed(True), loader())
    assert "exclude_modules" not in str(raised.value), "nothing would be left"


def test_other_checkpointing_trains_like_none(trainer: Any) -> None:
    module, plain = Checkpointed(False), Lit()
    trainer(callbacks=[callback(modules_to_save=["second"])]).fit(module, loader())
    trainer(callbacks=[callback(modules_to_save=["second"])]).fit(plain, loader())
    assert module.losses == plain.losses
    assert same(snapshot(module), snapshot(plain))


def test_a_base_that_something_unfroze_stops_the_run_with_its_name(trainer: Any) -> None:
    class Thaws(Lit):
        def on_fit_start(self) -> None:
            self.net.first.bias.requires_grad_(True)

    with pytest.raises(RuntimeError, match=r"1 parameters of the frozen base require a gradient: net.first.bias"):
        trainer(callbacks=[callback()]).fit(Thaws(), loader())


def test_the_callbacks_own_state_says_what_was_trained() -> None:
    assert callback().state_dict() == {"method": "LoRA", "hyperparameters": dataclasses.asdict(METHOD), "schedules": []}


def test_two_callbacks_are_refused(trainer: Any) -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `LoRACallback`"):
        trainer(callbacks=[callback(), callback(exclude_modules=["second"])])


class Replaced(nn.Linear):
    """What a precision plugin puts in the place of ``nn.Linear``."""


class Replacing(Precision):
    """A plugin that gives every linear layer a class of its own.

    Args:
        again: Replace also what was replaced before.
    """

    def __init__(self, again: bool) -> None:
        self.again = again

    def convert_module(self, module: nn.Module) -> nn.Module:
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear) and (self.again or not isinstance(child, Replaced)):
                    new = Replaced(child.in_features, child.out_features)
                    new.load_state_dict({"weight": child.weight, "bias": child.bias})
                    setattr(parent, name, new.requires_grad_(child.weight.requires_grad))
        return module


def test_a_plugin_that_replaces_layers_does_not_lose_the_adapters(trainer: Any) -> None:
    module, plain = Lit(), Lit()
    trainer(callbacks=[callback()], plugins=[Replacing(again=False)]).fit(module, loader())
    trainer(callbacks=[callback()]).fit(plain, loader())
    assert isinstance(module.net.first, Replaced)
    assert moved(module)
    assert same(snapshot(module), snapshot(plain))


def test_a_plugin_that_replaces_even_adapted_layers_stops_the_run(trainer: Any) -> None:
    with pytest.raises(RuntimeError, match=r"2 of 2 adapters are gone since they were injected: net.first.weight"):
        trainer(callbacks=[callback()], plugins=[Replacing(again=True)]).fit(Lit(), loader())


def test_training_while_merged_is_refused(trainer: Any) -> None:
    module = Lit()
    trainer(callbacks=[callback()]).fit(module, loader())
    with merged(module), pytest.raises(RuntimeError, match="cannot train while the adapters are merged"):
        trainer(callbacks=[callback()]).fit(module, loader())
    with merged(module):
        trainer(callbacks=[callback()]).test(module, loader(), verbose=False)


@pytest.mark.parametrize("averaging", [EMAWeightAveraging, lambda: SWA(swa_lrs=0.01)])
def test_averaging_before_us_is_refused_with_the_order_to_write(averaging: Any, trainer: Any) -> None:
    run = trainer(callbacks=[averaging(), callback()])
    words = "copies the module before the adapters are in it: put LoRACallback before .*; or use AdapterEMA, which"
    with pytest.raises(ValueError, match=words):
        run.fit(Lit(), loader())


@pytest.mark.parametrize("averaging", [lambda: EMAWeightAveraging(decay=0.9), lambda: SWA(0.01, swa_epoch_start=1)])
@pytest.mark.parametrize("style", [Lit, InConfigureModel])
@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")  # advice
def test_averaging_after_us_averages_the_adapters_and_leaves_the_base_bit_for_bit(
    style: Any, averaging: Any, trainer: Any
) -> None:
    module, plain = style(), Lit()
    trainer(callbacks=[callback(), averaging()], max_epochs=4).fit(module, loader())
    trainer(callbacks=[callback()], max_epochs=4).fit(plain, loader())
    assert moved(module)
    assert same(base(module), base(plain))
    assert not same(snapshot(module), snapshot(plain))


def test_ema_of_the_adapters_is_what_it_is_by_hand(trainer: Any) -> None:
    seen: list[dict[str, Tensor]] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: L.LightningModule, *_: Any) -> None:
            seen.append(snapshot(module))

    module = Lit()
    trainer(callbacks=[callback(), Look(), EMAWeightAveraging(decay=0.9)]).fit(module, loader())
    average = dict(seen[0])
    for state in seen[1:]:
        average = {name: 0.9 * average[name] + (1 - 0.9) * state[name] for name in average}
    ours = {name: tensor for name, tensor in module.state_dict().items() if "adapters" in name}
    assert same(ours, {name: average[name] for name in ours})


def test_swa_over_frozen_running_statistics_is_refused_because_it_would_reset_them(trainer: Any) -> None:
    with pytest.raises(ValueError, match=r"resets the running statistics .* use EMAWeightAveraging"):
        trainer(callbacks=[callback(), SWA(0.01)]).fit(Tuned(), loader())


@pytest.mark.parametrize("strategy", ["FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"])
def test_strategies_of_lightning_that_shard_the_base_are_refused(strategy: str, trainer: Any) -> None:
    run = trainer(callbacks=[callback()])
    run.strategy.__class__ = type(strategy, (type(run.strategy),), {})
    with pytest.raises(ValueError, match=f"strategy={strategy}: .* use strategy='lora_fsdp"):
        run.fit(Lit(), loader())


def test_strategies_that_train_in_processes_of_their_own_are_refused(trainer: Any) -> None:
    class _MultiProcessingLauncher:
        def launch(self, function: Any, *arguments: Any, trainer: Any, **options: Any) -> Any:
            return function(*arguments, **options)

    run = trainer(callbacks=[callback()])
    run.strategy._launcher = _MultiProcessingLauncher()
    with pytest.raises(ValueError, match=r"injected there would stay there: use strategy='ddp'"):
        run.fit(Lit(), loader())


# ---- what it shows


def test_the_table_and_the_line_are_shown_once(trainer: Any, caplog: pytest.LogCaptureFixture) -> None:
    module = Lit()
    with caplog.at_level(logging.INFO):
        run = trainer(callbacks=[callback(modules_to_save=["second"])])
        run.fit(module, loader())
        run.test(module, loader(), verbose=False)
        trainer(callbacks=[callback(modules_to_save=["second"])]).fit(module, loader())
    shown = [record.getMessage() for record in caplog.records if "net.first.weight" in record.getMessage()]
    assert len(shown) == 1
    trainable, total = 2 * (4 + 8) + 8 * 3 + 3, 4 * 8 + 8 + 8 * 3 + 3 + 2 * (4 + 8)
    assert shown[0].endswith(f"{trainable} trainable of {total} parameters ({100 * trainable / total:.2f} %)"), (
        "the last line"
    )
    assert "8 x 4" in shown[0]


def test_the_trainers_own_summary_counts_the_same(trainer: Any) -> None:
    module = Lit()
    run = trainer(callbacks=[callback()], enable_model_summary=True)
    run.fit(module, loader())
    summary = L.utilities.model_summary.summarize(module)
    assert (summary.trainable_parameters, summary.total_parameters) == (46, 67 + 46)


# ---- randomness and modes


def start(trainer: Any, module: Lit) -> dict[str, Tensor]:
    trainer(callbacks=[callback()]).validate(module, loader(), verbose=False)
    return {name: tensor for name, tensor in snapshot(module).items() if name.endswith("lora_A")}


def test_the_start_of_a_depends_on_seed_everything_alone(trainer: Any) -> None:
    L.seed_everything(1, verbose=False)
    first = start(trainer, Lit())
    L.seed_everything(1, verbose=False)
    torch.randn(100)
    assert same(start(trainer, Lit()), first)
    L.seed_everything(2, verbose=False)
    second = start(trainer, Lit())
    assert [name for name in first if torch.equal(first[name], second[name])] == []


def test_the_start_of_a_is_the_same_without_a_seed(trainer: Any) -> None:
    first = start(trainer, Lit())
    torch.manual_seed(99)
    assert same(start(trainer, Lit()), first)


def test_injection_draws_nothing_from_the_global_random_state(trainer: Any) -> None:
    torch.manual_seed(5)
    start(trainer, Lit())
    ours = torch.randn(3)
    torch.manual_seed(5)
    trainer().validate(Lit(), loader(), verbose=False)
    assert torch.equal(torch.randn(3), ours)


class Modes(Lit):
    """Notes in every training and validation step who is in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.train_modes: list[tuple[bool, bool]] = []
        self.val_modes: list[tuple[bool, bool]] = []

    def modes(self) -> tuple[bool, bool]:
        return self.net.first.training, self.net.first.adapters.weight.default.training

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.train_modes.append(self.modes())
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.val_modes.append(self.modes())


@MEANT
@pytest.mark.parametrize("when", ["before the run", "in every epoch"])
def test_the_adapters_dropout_is_on_over_a_base_in_eval_mode_and_off_in_validation(when: str, trainer: Any) -> None:
    class Evaluates(Modes):
        def on_train_epoch_start(self) -> None:
            if when == "in every epoch":
                self.net.eval()

    module = Evaluates()
    if when == "before the run":
        module.net.eval()
    trainer(callbacks=[LoRACallback(LoRA(r=2, dropout=0.5))]).fit(module, loader(), loader())
    assert module.train_modes == [(False, True)] * 8
    assert set(module.val_modes) == {(False, False)}


class Statistics(Tuned):
    """Calls ``train()`` wherever a user might."""

    def on_train_start(self) -> None:
        self.train()

    def on_train_epoch_start(self) -> None:
        self.net.train()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.train()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.net.train()
        return super().training_step(batch, batch_idx)

    def on_validation_end(self) -> None:
        self.train()


class NewNorms(Precision):
    """A plugin that puts new norm layers in the place of the old ones, as the conversion to SyncBatchNorm does."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.BatchNorm1d):
                    new = nn.BatchNorm1d(child.num_features).requires_grad_(child.weight.requires_grad)
                    new.load_state_dict(child.state_dict())
                    setattr(parent, name, new.train(child.training))
        return module


@MEANT
def test_running_statistics_do_not_drift_in_norms_that_took_the_place_of_others(trainer: Any) -> None:
    module = Statistics()
    trainer(callbacks=[callback()], plugins=[NewNorms()]).fit(module, loader(), loader())
    assert same(base(module), base(Tuned()))
    assert_clean(module)


@MEANT
def test_running_statistics_of_a_frozen_norm_do_not_drift_whatever_calls_train(trainer: Any) -> None:
    module = Statistics()
    trainer(callbacks=[callback()]).fit(module, loader(), loader())
    assert same(base(module), base(Tuned()))
    assert module.net[0].first.training
    module.train()
    assert module.net[1].training, "after the run it can be trained again"


def test_a_norm_listed_in_modules_to_save_trains_with_its_statistics(trainer: Any) -> None:
    module = Tuned()
    trainer(callbacks=[callback(modules_to_save=["net.1"])]).fit(module, loader(), loader())
    plain = nn.BatchNorm1d(3).state_dict()
    assert [name for name, tensor in module.net[1].state_dict().items() if torch.equal(tensor, plain[name])] == []
    assert int(module.net[1].num_batches_tracked) == 8


# ---- Trainers, wrappers, loops


def test_a_compiled_submodule_is_found_under_its_plain_name(trainer: Any, tmp_path: Path) -> None:
    class Compiled(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.compile(self.net, backend="eager")

    module, plain = Compiled(), Lit()
    run = trainer(callbacks=[callback(target_modules=["net.first"])])
    run.fit(module, loader())
    trainer(callbacks=[callback(target_modules=["net.first"])]).fit(plain, loader())
    assert [site.name for site in sites(module)] == ["net.first.weight"]
    assert module.losses == plain.losses
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = Compiled()
    trainer(callbacks=[callback(target_modules=["net.first"])], max_epochs=3).fit(
        again, loader(), ckpt_path=tmp_path / "a.ckpt"
    )
    assert len(again.losses) == 4


def test_a_compiled_lightning_module_trains_like_the_plain_one(trainer: Any) -> None:
    class Silent(Lit):  # stock Lightning cannot log from a compiled step under torch 2.13
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch)

    module, plain = Silent(), Silent()
    trainer(callbacks=[callback()]).fit(torch.compile(module, backend="eager"), loader())
    trainer(callbacks=[callback()]).fit(plain, loader())
    assert moved(module)
    assert same(snapshot(module), snapshot(plain))


def test_accumulated_gradients_train_like_batches_twice_the_size(trainer: Any) -> None:
    module, plain = Lit(), Lit()
    trainer(callbacks=[callback()], accumulate_grad_batches=2).fit(module, loader(4, 4))
    trainer(callbacks=[callback()]).fit(plain, loader(2, 8))
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, plain.state_dict()[name])


def test_manual_optimization_trains_like_automatic(trainer: Any) -> None:
    class Manual(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = self.loss(batch)
            self.losses.append(loss.item())
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()

    module, plain = Manual(), Lit()
    trainer(callbacks=[callback()]).fit(module, loader())
    trainer(callbacks=[callback()]).fit(plain, loader())
    assert module.losses == plain.losses
    assert same(snapshot(module), snapshot(plain))


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_adapters_keep_fp32_or_wider_under_true_precision(precision: str, trainer: Any) -> None:
    module = Lit()
    trainer(callbacks=[callback()], precision=precision).fit(module, loader())
    found = {name: p.dtype for name, p in module.named_parameters()}
    host = torch.bfloat16 if precision == "bf16-true" else torch.float64
    assert {dtype for name, dtype in found.items() if "adapters" not in name} == {host}
    assert {dtype for name, dtype in found.items() if "adapters" in name} == {torch.promote_types(host, torch.float32)}
    assert moved(module)


def test_the_other_lightning_package_works_too(trainer: Any, tmp_path: Path) -> None:
    pl = pytest.importorskip("pytorch_lightning")

    class Other(pl.LightningModule):
        build, loss, forward = Lit.build, Lit.loss, Lit.forward
        training_step, validation_step = Lit.training_step, Lit.validation_step
        configure_optimizers = Lit.configure_optimizers

        def __init__(self) -> None:
            super().__init__()
            self.width, self.configure, self.losses = 8, None, []
            self.net = self.build()

    plain, whole, first, second = Lit(), Other(), Other(), Other()
    trainer(callbacks=[callback(lr_ratio=4)], max_epochs=3).fit(plain, loader())
    trainer(pl.Trainer, callbacks=[callback(lr_ratio=4)], max_epochs=3).fit(whole, loader())
    assert whole.losses == plain.losses
    saver = pl.callbacks.ModelCheckpoint(tmp_path / "saved", filename="one")
    trainer(pl.Trainer, callbacks=[callback(lr_ratio=4), saver], max_epochs=2, enable_checkpointing=True).fit(
        first, loader()
    )
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["one.adapter", "one.ckpt"]
    assert same(snapshot(load_from_checkpoint(Other, tmp_path / "saved" / "one.ckpt")), snapshot(first))
    resumed = trainer(pl.Trainer, callbacks=[callback(lr_ratio=4), saver], max_epochs=3, enable_checkpointing=True)
    resumed.fit(second, loader(), ckpt_path=tmp_path / "saved" / "one.ckpt")
    assert first.losses + second.losses == whole.losses
    assert same(snapshot(second), snapshot(whole))
    assert_clean(second)


DDP = """
import sys, warnings
from pathlib import Path
sys.path.insert(0, "{tests}")
import lightning.pytorch as L, torch, torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from conftest import Lit, loader
from lightning_lora import AdapterEMA, LoRA, LoRACallback

torch.manual_seed(int(__import__("os").environ.get("LOCAL_RANK", 0)))  # ranks differ, adapters must not
folder = Path(sys.argv[1])
quiet = dict(accelerator="cpu", devices=2, logger=False, enable_progress_bar=False, enable_model_summary=False)

def run(folder, more, epochs, **options):
    module = Lit()
    trainer = L.Trainer(
        strategy=DDPStrategy(process_group_backend="gloo"), max_epochs=epochs, use_distributed_sampler=True,
        callbacks=[LoRACallback(LoRA(r=2), lr_ratio=4), *more, ModelCheckpoint(folder / f"{{epochs}}", "last")],
        **quiet,
    )
    trainer.fit(module, loader(8), **options)
    own = torch.cat([p.detach().flatten() for p in module.parameters()])
    both = [torch.empty_like(own) for _ in range(2)]
    dist.all_gather(both, own)
    assert torch.equal(*both), "replicas differ"
    assert all(p.any() for n, p in module.named_parameters() if n.endswith("lora_B")), "B did not train"
    losses = [None, None]
    dist.all_gather_object(losses, module.losses)
    trainer.strategy.barrier()
    return module, losses

def check(folder, *more):
    whole, losses = run(folder, more, 3)
    assert losses[0] != losses[1], "each rank has data of its own"
    part, first = run(folder, more, 2)
    rest, second = run(folder, more, 3, ckpt_path=folder / "2" / "last.ckpt")
    assert [one + two for one, two in zip(first, second)] == losses, "the resumed run goes on"
    assert all(torch.equal(one, two) for one, two in zip(whole.parameters(), rest.parameters()))
    if dist.get_rank() == 0:
        print("FILES", sorted(str(p.relative_to(folder)) for p in (folder / "2").iterdir()))
    return losses, whole

losses, current = check(folder / "plain")
same_losses, average = check(folder / "averaged", AdapterEMA(0.8))
assert losses == same_losses, "an average changes nothing of the training"
assert not all(torch.equal(one, two) for one, two in zip(current.parameters(), average.parameters()))
"""


def test_ddp_keeps_replicas_equal_writes_once_and_resumes(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(DDP.format(tests=Path(__file__).parent))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PL_", "PYTEST", "LOCAL_RANK"))}
    here = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, script, tmp_path],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**kept, "PYTHONPATH": here, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("FILES ['2/last.adapter', '2/last.ckpt']") == 2


class Attending(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, None]
        return super().forward(self.attention(x, x, x)[0][:, 0])


def test_dropout_that_attention_cannot_apply_is_said_and_elsewhere_is_not(trainer: Any) -> None:
    words = r"no effect at 2 matrices \(first: attention.in_proj_weight\): the forward of their layer reads them"
    with pytest.warns(UserWarning, match=words):
        trainer(callbacks=[LoRACallback(LoRA(r=2, dropout=0.1))], max_epochs=1).fit(Attending(), loader())
    trainer(callbacks=[LoRACallback(LoRA(r=2))], max_epochs=1).fit(Attending(), loader())
    trainer(callbacks=[LoRACallback(LoRA(r=2, dropout=0.1))], max_epochs=1).fit(Lit(), loader())


def test_the_audit_leaves_adapters_of_other_tasks_alone(trainer: Any) -> None:
    module = Lit()
    inject(module, LoRA(r=1), task="other")
    trainer(callbacks=[LoRACallback(LoRA(r=2))], max_epochs=1).fit(module, loader())
    assert all(site.adapter("default").lora_B.any() for site in sites(module))
    assert not any(site.adapter("other").lora_B.any() for site in sites(module))
