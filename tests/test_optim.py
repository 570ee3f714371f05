"""The optimizers that a user configured get groups by role, and a ratio of learning rates that holds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from conftest import Lit, loader
from lightning.pytorch.callbacks import LearningRateFinder, LearningRateMonitor
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer, lr_scheduler

from lightning_lora import LoRA, LoRACallback, inject, param_groups, sites
from lightning_lora.derived_groups import link, roles, split

RATIO = 16.0
METHOD = LoRA(r=2, alpha=4)


def callback(**kwargs: Any) -> LoRACallback:
    return LoRACallback(METHOD, **{"lr_ratio": RATIO} | kwargs)


def factors(module: nn.Module, name: str) -> list[Tensor]:
    return [parameter for key, parameter in module.named_parameters() if key.endswith(name)]


def assert_every_role_has_its_groups(module: L.LightningModule, optimizers: list[Optimizer], ratio: float) -> None:
    """Each adapter is in one group, B in groups of B alone at ``ratio`` times the parent's rate; nothing is frozen."""
    role_of = roles(module)
    held: list[Tensor] = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            held += group["params"]
            assert all(parameter.requires_grad for parameter in group["params"])
            members = {role_of.get(parameter) for parameter in group["params"]}
            if "lora_role" in group:
                assert members == {"B"}
                assert group["lr"] == ratio * optimizer.param_groups[group["lora_parent"]]["lr"]
            else:
                assert "B" not in members
    assert len({id(parameter) for parameter in held}) == len(held)
    assert {id(parameter) for parameter in held} == {id(p) for p in module.parameters() if p.requires_grad}
    assert all(bool(factor.any()) for factor in factors(module, "lora_B")), "B moved from zero"


# ---- every shape that configure_optimizers may return


def step_decay(optimizer: Optimizer) -> lr_scheduler.LRScheduler:
    return lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


def by_name(module: Lit) -> list[dict[str, Any]]:
    named = list(module.named_parameters())
    decay = [p for name, p in named if name.endswith("weight") or "lora" in name]
    rest = [p for name, p in named if not (name.endswith("weight") or "lora" in name)]
    return [{"params": decay, "weight_decay": 0.1, "name": "decay"}, {"params": rest, "weight_decay": 0.0}]


SHAPES: dict[str, Callable[[Lit], Any]] = {
    "one optimizer": lambda m: AdamW(m.parameters(), lr=0.01),
    "list": lambda m: [AdamW(m.parameters(), lr=0.01)],
    "tuple": lambda m: (AdamW(m.parameters(), lr=0.01),),
    "tuple of lists": lambda m: ([o := AdamW(m.parameters(), lr=0.01)], [step_decay(o)]),
    "list and one scheduler": lambda m: ([o := AdamW(m.parameters(), lr=0.01)], step_decay(o)),
    "tuple of lists with a scheduler config": lambda m: (
        [o := AdamW(m.parameters(), lr=0.01)],
        [{"scheduler": step_decay(o), "interval": "step"}],
    ),
    "dict": lambda m: {"optimizer": AdamW(m.parameters(), lr=0.01)},
    "dict with a scheduler": lambda m: {
        "optimizer": (o := AdamW(m.parameters(), lr=0.01)),
        "lr_scheduler": step_decay(o),
    },
    "dict with a scheduler config": lambda m: {
        "optimizer": (o := AdamW(m.parameters(), lr=0.01)),
        "lr_scheduler": {"scheduler": step_decay(o), "interval": "step", "frequency": 2, "name": "decay"},
        "monitor": "train_loss",
    },
    "tuple of dicts": lambda m: ({"optimizer": (o := AdamW(m.parameters(), lr=0.01)), "lr_scheduler": step_decay(o)},),
    "generator without frozen entries": lambda m: AdamW((p for p in m.parameters() if p.requires_grad), lr=0.01),
    "filter by requires_grad": lambda m: AdamW(filter(lambda p: p.requires_grad, m.parameters()), lr=0.01),
    "named parameters": lambda m: AdamW(m.named_parameters(), lr=0.01),
    "named parameters in groups": lambda m: AdamW([{"params": list(m.net.named_parameters())}], lr=0.01),
    "groups by name": lambda m: AdamW(by_name(m), lr=0.01),
    "groups by layer": lambda m: AdamW(
        [{"params": m.net.first.parameters(), "lr": 0.01}, {"params": m.net.second.parameters(), "lr": 0.002}]
    ),
    "learning rate as a tensor": lambda m: AdamW(m.parameters(), lr=torch.tensor(0.01)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_groups_come_from_every_shape_that_configure_optimizers_may_return(shape: str, trainer: Any) -> None:
    module = Lit(SHAPES[shape])
    run = trainer(callbacks=[callback()])
    run.fit(module, loader())
    assert_every_role_has_its_groups(module, run.optimizers, RATIO)


class TwoOptimizers(Lit):
    """Manual optimization of two networks, each with its own optimizer and scheduler, as a GAN has."""

    def __init__(self, configure: Callable[[Any], Any] | None = None) -> None:
        super().__init__(configure)
        self.other = self.build()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer, net in zip(self.optimizers(), (self.net, self.other), strict=True):
            self.toggle_optimizer(optimizer)
            loss = nn.functional.cross_entropy(net(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=1.0)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self) -> Any:
        first, second = AdamW(self.net.parameters(), lr=0.01), SGD(self.other.parameters(), lr=0.02)
        return [first, second], [step_decay(first), lr_scheduler.CosineAnnealingLR(second, 8, eta_min=0.001)]


class TwoOptimizersInDicts(TwoOptimizers):
    def configure_optimizers(self) -> Any:
        first, second = AdamW(self.net.parameters(), lr=0.01), SGD(self.other.parameters(), lr=0.02)
        return (
            {"optimizer": first, "lr_scheduler": step_decay(first)},
            {"optimizer": second, "lr_scheduler": {"scheduler": step_decay(second)}},
        )


@pytest.mark.parametrize("cls", [TwoOptimizers, TwoOptimizersInDicts])
def test_several_optimizers_under_manual_optimization_keep_their_own_parameters(cls: Any, trainer: Any) -> None:
    module = cls()
    run = trainer(callbacks=[callback()])
    run.fit(module, loader())
    assert_every_role_has_its_groups(module, run.optimizers, RATIO)
    for optimizer, net in zip(run.optimizers, (module.net, module.other), strict=True):
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in net.parameters() if p.requires_grad}
        assert optimizer.param_groups[0]["lr"] < 0.01, "its scheduler stepped"


def test_heads_trained_in_full_and_biases_stay_at_the_users_rate(trainer: Any) -> None:
    module = Lit()
    run = trainer(callbacks=[callback(modules_to_save=["second"], bias="all")])
    run.fit(module, loader())
    base, derived = run.optimizers[0].param_groups
    full = [module.net.first.bias, module.net.second.weight, module.net.second.bias]
    assert {id(p) for p in base["params"]} == {id(p) for p in [*factors(module, "lora_A"), *full]}
    assert [id(p) for p in derived["params"]] == [id(p) for p in factors(module, "lora_B")]
    assert (base["lr"], derived["lr"]) == (0.01, 0.01 * RATIO)


def test_named_parameters_keep_their_names_in_derived_groups(trainer: Any) -> None:
    module = Lit(SHAPES["named parameters"])
    run = trainer(callbacks=[callback()])
    run.fit(module, loader())
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for group in run.optimizers[0].param_groups:
        assert group["param_names"] == [names[id(parameter)] for parameter in group["params"]]


def test_the_first_group_of_the_user_keeps_its_identity_and_its_own_hyperparameters(trainer: Any) -> None:
    kept: list[Any] = []

    def configure(module: Lit) -> Optimizer:
        optimizer = SGD(by_name(module), lr=0.01, momentum=0.5)
        kept.extend(optimizer.param_groups)
        return optimizer

    run = trainer(callbacks=[callback()])
    run.fit(Lit(configure), loader())
    groups = run.optimizers[0].param_groups
    assert groups[0] is kept[0]
    assert groups[1] is kept[1]
    assert [group.get("name") for group in groups] == ["decay", None, "decay.lora_B"]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.1]
    assert [group["momentum"] for group in groups] == [0.5, 0.5, 0.5]


# ---- names and weight decay


class Log(Logger):
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, float]] = []

    name = version = "log"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.seen.append(dict(metrics))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


def test_learning_rate_monitor_shows_each_group_by_role(trainer: Any) -> None:
    log = Log()
    run = trainer(callbacks=[callback(), LearningRateMonitor("step")], logger=log, log_every_n_steps=1)
    run.fit(Lit(SHAPES["dict with a scheduler config"]), loader())
    rates = [entry for entry in log.seen if any(key.startswith("decay") for key in entry)]
    assert {key for entry in rates for key in entry if key.startswith("decay")} == {"decay/pg1", "decay/pg1.lora_B"}
    assert all(entry["decay/pg1.lora_B"] == RATIO * entry["decay/pg1"] for entry in rates)
    assert len({entry["decay/pg1"] for entry in rates}) > 1, "the schedule shows"


def test_learning_rate_monitor_keeps_the_users_group_names(trainer: Any) -> None:
    log = Log()
    run = trainer(callbacks=[callback(), LearningRateMonitor("step")], logger=log, log_every_n_steps=1)
    run.fit(Lit(lambda m: [SGD(by_name(m), lr=0.01)]), loader())
    shown = {key for entry in log.seen for key in entry if key.startswith("lr-")}
    assert shown == {"lr-SGD/decay", "lr-SGD/pg2", "lr-SGD/decay.lora_B"}


def test_weight_decay_by_role_replaces_the_optimizers_own_and_the_rest_keeps_it(trainer: Any) -> None:
    module = Lit(lambda m: AdamW(m.parameters(), lr=0.01, weight_decay=0.3))
    run = trainer(callbacks=[callback(weight_decay={"A": 0.0, "B": 0.2}, modules_to_save=["second"])])
    run.fit(module, loader())
    decays = {group.get("lora_role"): group["weight_decay"] for group in run.optimizers[0].param_groups}
    assert decays == {None: 0.3, "A": 0.0, "B": 0.2}
    rates = {group.get("lora_role"): group["lr"] for group in run.optimizers[0].param_groups}
    assert rates == {None: 0.01, "A": 0.01, "B": 0.01 * RATIO}


@pytest.mark.parametrize("ratio", [0, -1, float("nan"), float("inf"), "16", None])
def test_a_ratio_that_is_no_finite_number_above_zero_is_refused(ratio: Any) -> None:
    with pytest.raises(ValueError, match=r"lr_ratio=.* must be a finite number above 0"):
        LoRACallback(METHOD, lr_ratio=ratio)


# ---- the ratio under every scheduler


class Decay(lr_scheduler.LRScheduler):
    """A user's own scheduler, with one entry per group that it was built for."""

    def __init__(self, optimizer: Optimizer, factors: list[float]) -> None:
        self.factors = factors
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        groups = self.optimizer.param_groups
        return [group["lr"] * factor for group, factor in zip(groups, self.factors, strict=True)]


class TimmLike:
    """A scheduler without a base class, which sets each group from the rate that it started with."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.start = [group["lr"] for group in optimizer.param_groups]

    def step(self, epoch: int, metric: float | None = None) -> None:
        for group, lr in zip(self.optimizer.param_groups, self.start, strict=True):
            group["lr"] = lr / (epoch + 2)

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "optimizer"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def warm_up_then_cosine(o: Optimizer) -> lr_scheduler.SequentialLR:
    parts = [lr_scheduler.LinearLR(o, 0.1, 1.0, 4), lr_scheduler.CosineAnnealingLR(o, 8, eta_min=0.001)]
    return lr_scheduler.SequentialLR(o, parts, milestones=[4])


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "LambdaLR, a list": lambda o: lr_scheduler.LambdaLR(o, [lambda step: 0.9**step, lambda step: 0.8**step]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "MultiplicativeLR, a list": lambda o: lr_scheduler.MultiplicativeLR(o, [lambda step: 0.9, lambda step: 0.7]),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], gamma=0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, 4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 6),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 12, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 12, eta_min=0.001),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4, eta_min=0.001),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
    "OneCycleLR, a list": lambda o: lr_scheduler.OneCycleLR(o, [0.1, 0.2], total_steps=12),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, step_size_up=3, cycle_momentum=True),
    "CyclicLR, a list": lambda o: lr_scheduler.CyclicLR(o, [0.001, 0.002], [0.1, 0.2], step_size_up=3),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5, min_lr=0.003),
    "ReduceLROnPlateau, a list": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, min_lr=[0.003, 0.0001]),
    "SequentialLR": warm_up_then_cosine,
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "a custom LRScheduler": lambda o: Decay(o, [0.9, 0.7]),
    "no base class": TimmLike,
}


class Scheduled(Lit):
    """Two groups of the user's, a scheduler that steps with every batch, and the rates at every optimizer step.

    Args:
        schedule: Builds the scheduler from the optimizer.
    """

    def __init__(self, schedule: Callable[[Optimizer], Any]) -> None:
        super().__init__()
        self.schedule = schedule
        self.rates: list[list[dict[str, Any]]] = []

    def note(self, optimizer: Optimizer, *_: Any) -> None:
        self.rates.append([{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("worse", float(self.global_step))
        return super().training_step(batch, batch_idx)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if isinstance(scheduler, TimmLike):
            scheduler.step(epoch=self.global_step, metric=metric)
        else:
            super().lr_scheduler_step(scheduler, metric)

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.net.first.parameters(), "lr": 0.01}, {"params": self.net.second.parameters()}]
        optimizer = SGD(groups, lr=0.02, momentum=0.9)
        optimizer.register_step_post_hook(self.note)
        self.scheduler = self.schedule(optimizer)
        return [optimizer], [{"scheduler": self.scheduler, "interval": "step", "monitor": "worse"}]


def assert_linked(rates: list[list[dict[str, Any]]], unsplit: list[list[dict[str, Any]]], ratio: float = RATIO) -> None:
    """The user's groups are as without us, bit for bit, and B has exactly ``ratio`` times its parent's rate."""
    assert [step[:2] for step in rates] == unsplit
    for step in rates:
        assert [group["lora_parent"] for group in step[2:]] == [0, 1]
        assert [group["lr"] for group in step[2:]] == [ratio * group["lr"] for group in step[:2]]
        assert [group["momentum"] for group in step[2:]] == [group["momentum"] for group in step[:2]]


@pytest.mark.parametrize("name", SCHEDULES)
def test_ratio_is_exact_at_every_step_and_the_users_groups_follow_the_schedule_of_an_unsplit_run(
    name: str, trainer: Any
) -> None:
    plain, module = Scheduled(SCHEDULES[name]), Scheduled(SCHEDULES[name])
    trainer(max_epochs=3).fit(plain, loader())
    trainer(max_epochs=3, callbacks=[callback()]).fit(module, loader())
    assert len(module.rates) == 12
    assert len({step[0]["lr"] for step in module.rates}) > 1, "the schedule changed the rate"
    assert_linked(module.rates, plain.rates)


@pytest.mark.parametrize("name", SCHEDULES)
def test_scheduler_state_is_that_of_an_unsplit_run_and_loads_without_pickle(
    name: str, trainer: Any, tmp_path: Any
) -> None:
    plain, module = Scheduled(SCHEDULES[name]), Scheduled(SCHEDULES[name])
    trainer().fit(plain, loader())
    trainer(callbacks=[callback()]).fit(module, loader())
    state = module.scheduler.state_dict()
    torch.save(state, tmp_path / "state")
    assert torch.load(tmp_path / "state", weights_only=True) == state == plain.scheduler.state_dict()
    assert type(module.scheduler).__name__ == type(plain.scheduler).__name__
    assert isinstance(module.scheduler, type(plain.scheduler))


@pytest.mark.parametrize("name", SCHEDULES)
def test_ratio_and_schedule_go_on_through_a_resume(name: str, trainer: Any, tmp_path: Any) -> None:
    whole, first, second = (Scheduled(SCHEDULES[name]) for _ in range(3))
    trainer(max_epochs=3, callbacks=[callback()]).fit(whole, loader())
    run = trainer(max_epochs=2, callbacks=[callback()])
    run.fit(first, loader())
    run.save_checkpoint(tmp_path / "two.ckpt")
    trainer(max_epochs=3, callbacks=[callback()]).fit(second, loader(), ckpt_path=tmp_path / "two.ckpt")
    assert first.rates + second.rates == whole.rates
    assert torch.equal(second.net.first.adapters.weight.default.lora_B, whole.net.first.adapters.weight.default.lora_B)


def test_ratio_holds_for_a_warm_up_inside_optimizer_step(trainer: Any) -> None:
    class WarmUp(Scheduled):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
            for group, lr in zip(optimizer.param_groups, (0.01, 0.02), strict=False):
                group["lr"] = lr * min(1.0, (self.global_step + 1) / 6)
            optimizer.step(closure=closure)

    plain, module = WarmUp(SCHEDULES["ConstantLR"]), WarmUp(SCHEDULES["ConstantLR"])
    trainer().fit(plain, loader())
    trainer(callbacks=[callback()]).fit(module, loader())
    assert len({step[0]["lr"] for step in module.rates}) == 6
    assert_linked(module.rates, plain.rates)


@pytest.mark.parametrize("how", ["tuner", "callback"])
def test_ratio_holds_through_lr_find_and_the_adapters_come_back_to_their_start(how: str, trainer: Any) -> None:
    module = Scheduled(SCHEDULES["ExponentialLR"])
    module.lr = 0.01
    start: list[Tensor] = []

    class Look(L.Callback):
        def on_train_start(self, *_: Any) -> None:
            start.extend(p.detach().clone() for p in factors(module, "lora_B"))

    finder = {"min_lr": 1e-8, "max_lr": 0.1}
    if how == "tuner":
        Tuner(trainer(callbacks=[callback()])).lr_find(module, loader(16), num_training=16, **finder)
    else:
        finder = LearningRateFinder(**finder, num_training_steps=16)
        trainer(callbacks=[callback(), finder, Look()]).fit(module, loader(16))
        assert start
        assert not any(bool(factor.any()) for factor in start), "training starts from the base"
    assert len({step[0]["lr"] for step in module.rates}) > 10
    for step in module.rates:
        assert [group["lr"] for group in step[2:]] == [RATIO * group["lr"] for group in step[:2]]


@pytest.mark.parametrize(("before", "after"), [(16.0, 4.0), (16.0, 1.0), (1.0, 16.0)])
def test_resuming_with_another_ratio_takes_effect(before: float, after: float, trainer: Any, tmp_path: Any) -> None:
    first, second = Scheduled(SCHEDULES["OneCycleLR"]), Scheduled(SCHEDULES["OneCycleLR"])
    run = trainer(max_epochs=1, callbacks=[callback(lr_ratio=before)])
    run.fit(first, loader())
    run.save_checkpoint(tmp_path / "one.ckpt")
    momenta = {id(p): run.optimizers[0].state[p]["momentum_buffer"] for p in first.parameters() if p.requires_grad}
    expected = {n: momenta[id(p)] for n, p in first.named_parameters() if p.requires_grad}
    seen: dict[str, Tensor] = {}
    rates: list[float] = []

    class Look(L.Callback):
        def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            state = trainer.optimizers[0].state
            rates.extend(group["lr"] for group in trainer.optimizers[0].param_groups)
            seen.update({n: state[p]["momentum_buffer"].clone() for n, p in module.named_parameters() if p in state})

    again = trainer(max_epochs=3, callbacks=[callback(lr_ratio=after), Look()])
    again.fit(second, loader(), ckpt_path=tmp_path / "one.ckpt")
    assert seen.keys() == expected.keys()
    assert all(torch.equal(seen[name], expected[name]) for name in seen), "each parameter found its own momentum"
    assert rates[2:] == [after * rate for rate in rates[:2] if after != 1], "before the first step, as monitors see it"
    role_of = roles(second)
    for group in again.optimizers[0].param_groups:
        of_b = {role_of[p] == "B" for p in group["params"]}
        assert of_b == ({False, True} if after == 1 else {"lora_role" in group})
    for step in second.rates:
        assert [group["lr"] for group in step[2:]] == [after * group["lr"] for group in step[:2] if after != 1]


def test_resuming_with_another_weight_decay_takes_effect(trainer: Any, tmp_path: Any) -> None:
    run = trainer(max_epochs=1, callbacks=[callback(weight_decay={"B": 0.1})])
    run.fit(Lit(), loader())
    run.save_checkpoint(tmp_path / "one.ckpt")
    again = trainer(callbacks=[callback(weight_decay={"B": 0.2, "A": 0.0})])
    again.fit(Lit(), loader(), ckpt_path=tmp_path / "one.ckpt")
    assert {g.get("lora_role"): g["weight_decay"] for g in again.optimizers[0].param_groups} == {
        None: 0.01,
        "A": 0.0,
        "B": 0.2,
    }


def test_an_optimizer_of_other_groups_is_refused_at_resume(trainer: Any, tmp_path: Any) -> None:
    run = trainer(max_epochs=1, callbacks=[callback()])
    run.fit(Lit(SHAPES["groups by layer"]), loader())
    run.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(ValueError, match=r"AdamW has groups of \[2, 2\] parameters, .* groups of \[4\]: build"):
        trainer(callbacks=[callback()]).fit(Lit(), loader(), ckpt_path=tmp_path / "one.ckpt")


# ---- the arithmetic of the trained parameters


def by_hand(ratio: float, optimizer: Callable[[list[Any]], Optimizer], epochs: int = 2) -> tuple[Lit, list[float]]:
    """Train without Trainer and callback: inject, an ordinary optimizer, a loop."""
    module = Lit()
    inject(module, METHOD, seed=0)
    built = optimizer(param_groups(module, 0.01, lr_ratio=ratio))
    losses = []
    for _ in range(epochs):
        for batch in loader():
            loss = module.loss(batch)
            built.zero_grad()
            loss.backward()
            built.step()
            losses.append(loss.item())
    return module, losses


def assert_same_parameters(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("cls", [SGD, Adam, AdamW, Adagrad])
def test_ratio_one_is_plain_lora_bit_for_bit(cls: Any, trainer: Any) -> None:
    plain, losses = by_hand(1.0, lambda groups: cls([p for g in groups for p in g["params"]], lr=0.01))
    module = Lit(lambda m: cls(m.parameters(), lr=0.01))
    run = trainer(callbacks=[LoRACallback(METHOD)])
    run.fit(module, loader())
    assert module.losses == losses
    assert_same_parameters(module, plain)
    assert len(run.optimizers[0].param_groups) == 1


def test_another_ratio_is_loraplus_by_hand_bit_for_bit(trainer: Any) -> None:
    plain, losses = by_hand(RATIO, AdamW)
    module = Lit(lambda m: AdamW(m.parameters(), lr=0.01, weight_decay=0.0))
    trainer(callbacks=[callback()]).fit(module, loader())
    assert module.losses == losses
    assert_same_parameters(module, plain)
    assert losses != by_hand(1.0, AdamW)[1]


def test_param_groups_by_hand_name_each_role_and_give_b_its_rate() -> None:
    module = Lit()
    inject(module, METHOD, modules_to_save=["second"])
    groups = param_groups(module, 0.01, lr_ratio=4, weight_decay=0.1, role_weight_decay={"B": 0.0})
    found = {g["name"]: (g["lr"], g["weight_decay"], len(g["params"])) for g in groups}
    assert found == {"lora_A": (0.01, 0.1, 1), "lora_B": (0.04, 0.0, 1), "trained_in_full": (0.01, 0.1, 2)}


def test_param_groups_by_hand_before_injection_say_what_to_call() -> None:
    module = Lit().requires_grad_(False)
    with pytest.raises(ValueError, match=r"call inject\(model, ...\) before param_groups"):
        param_groups(module, 0.01)


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"foreach": False}])
def test_a_group_that_freezing_left_empty_does_no_harm(options: dict[str, bool], trainer: Any) -> None:
    def configure(module: Lit) -> Any:
        biases = [module.net.first.bias, module.net.second.bias]
        weights = [p for p in module.parameters() if all(p is not bias for bias in biases)]
        optimizer = AdamW([{"params": biases, "weight_decay": 0.0}, {"params": weights}], lr=0.01, **options)
        return [optimizer], [lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0, lambda step: 0.5])]

    module = Lit(configure)
    run = trainer(callbacks=[callback()])
    run.fit(module, loader())
    assert [len(group["params"]) for group in run.optimizers[0].param_groups] == [0, 2, 2]
    assert_every_role_has_its_groups(module, run.optimizers, RATIO)


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16-mixed"},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.01},
        {"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value"},
    ],
)
def test_groups_hold_under_trainer_options(options: dict[str, Any], trainer: Any) -> None:
    module = Lit()
    run = trainer(callbacks=[callback()], **options)
    run.fit(module, loader())
    assert_every_role_has_its_groups(module, run.optimizers, RATIO)
    assert {p.dtype for p in module.parameters()} == {torch.float32}


# ---- optimizers that were built before the adapters


class Bare(L.LightningModule):
    """A module without ``configure_optimizers``, for LightningCLI; it has its own data."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Lit().net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def train_dataloader(self) -> Any:
        return loader()


@pytest.fixture
def command_line(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LightningCLI]:
    """Return a function that runs ``LightningCLI(Bare)`` with arguments, as a script would."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "max_epochs": 2,
        "default_root_dir": str(tmp_path),
    }

    def run(*arguments: str, callbacks: list[L.Callback]) -> LightningCLI:
        monkeypatch.setattr("sys.argv", ["train.py", *arguments])
        defaults = {**quiet, "callbacks": callbacks}
        return LightningCLI(Bare, trainer_defaults=defaults, save_config_callback=None, seed_everything_default=False)

    return run


def test_an_optimizer_that_lightning_cli_built_from_the_command_line_trains_the_adapters(command_line: Any) -> None:
    arguments = ["fit", "--optimizer=torch.optim.AdamW", "--optimizer.lr=0.01", "--lr_scheduler=OneCycleLR"]
    arguments += ["--lr_scheduler.max_lr=0.1", "--lr_scheduler.total_steps=9"]
    cli = command_line(*arguments, callbacks=[callback()])
    assert_every_role_has_its_groups(cli.model, cli.trainer.optimizers, RATIO)
    assert isinstance(cli.trainer.lr_scheduler_configs[0].scheduler, lr_scheduler.OneCycleLR)


def test_the_optimizer_of_lightning_cli_can_be_fitted_again_and_with_another_ratio(
    command_line: Any, trainer: Any
) -> None:
    arguments = ["fit", "--optimizer=torch.optim.AdamW", "--lr_scheduler=ExponentialLR", "--lr_scheduler.gamma=0.9"]
    cli = command_line(*arguments, callbacks=[callback()])
    optimizer, scheduler = cli.trainer.optimizers[0], cli.trainer.lr_scheduler_configs[0].scheduler
    depth = len(type(scheduler).__mro__)
    for ratio in (RATIO, 4.0, 1.0, RATIO):
        before = copy.deepcopy(factors(cli.model, "lora_B"))
        run = trainer(callbacks=[callback(lr_ratio=ratio)])
        run.fit(cli.model)
        assert run.optimizers[0] is optimizer
        assert run.lr_scheduler_configs[0].scheduler is scheduler
        assert len(type(scheduler).__mro__) == depth, "its class is not swapped again and again"
        if ratio != 1:
            assert_every_role_has_its_groups(cli.model, run.optimizers, ratio)
        assert len(optimizer.param_groups) == (1 if ratio == 1 else 2)
        held = sorted(id(p) for group in optimizer.param_groups for p in group["params"])
        assert held == sorted(id(p) for p in cli.model.parameters() if p.requires_grad)
        assert all(bool((old != new).any()) for old, new in zip(before, factors(cli.model, "lora_B"), strict=True))


class Captured(Lit):
    """A module that builds its optimizer in ``__init__``."""

    def __init__(self, build: Callable[[Lit], Optimizer]) -> None:
        super().__init__()
        self.early = build(self)
        self.configure = lambda _: self.early


class Eager(SGD):
    """An optimizer that makes its state when it is built, as Adagrad did before torch 2.13."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        for parameter in (p for group in self.param_groups for p in group["params"]):
            self.state[parameter]["count"] = torch.zeros(())

    def step(self, closure: Any = None) -> Any:
        for parameter in (p for group in self.param_groups for p in group["params"]):
            self.state[parameter]["count"] += 1
        return super().step(closure)


@pytest.mark.parametrize("cls", [SGD, AdamW, Adagrad, Eager])
def test_parameters_captured_before_injection_give_the_training_of_an_optimizer_built_after_it(
    cls: Any, trainer: Any, tmp_path: Any
) -> None:
    captured, later = Captured(lambda m: cls(m.parameters(), lr=0.01)), Lit(lambda m: cls(m.parameters(), lr=0.01))
    run = trainer(callbacks=[callback()])
    run.fit(captured, loader())
    trainer(callbacks=[callback()]).fit(later, loader())
    assert captured.losses == later.losses
    assert_same_parameters(captured, later)
    assert_every_role_has_its_groups(captured, run.optimizers, RATIO)
    run.save_checkpoint(tmp_path / "a.ckpt")  # the state of dropped parameters would not fit its groups
    assert len(torch.load(tmp_path / "a.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]) == 2


def test_an_adapter_that_was_frozen_between_two_runs_leaves_its_group(trainer: Any) -> None:
    module = Captured(SHAPES["one optimizer"])
    trainer(callbacks=[callback()]).fit(module, loader())
    held = module.net.first.adapters.weight.default.lora_B.requires_grad_(False)
    before = held.clone()
    run = trainer(callbacks=[callback()])
    run.fit(module, loader())
    assert torch.equal(held, before)
    assert_every_role_has_its_groups(module, run.optimizers, RATIO)
    assert [len(group["params"]) for group in run.optimizers[0].param_groups] == [2, 1]


def test_adapters_join_the_group_of_the_weight_that_they_adapt(trainer: Any) -> None:
    module = Captured(SHAPES["groups by layer"])
    run = trainer(callbacks=[callback()])
    run.fit(module, loader())
    for group, layer in zip(run.optimizers[0].param_groups, [module.net.first, module.net.second] * 2, strict=True):
        role = "lora_B" if "lora_role" in group else "lora_A"
        assert [id(p) for p in group["params"]] == [id(getattr(layer.adapters.weight.default, role))]


def test_names_of_captured_named_parameters_are_completed(trainer: Any) -> None:
    module = Captured(SHAPES["named parameters"])
    run = trainer(callbacks=[callback()])
    run.fit(module, loader())
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for group in run.optimizers[0].param_groups:
        assert group["param_names"] == [names[id(parameter)] for parameter in group["params"]]


def test_an_optimizer_with_state_and_a_constructor_of_its_own_says_where_to_build_it(trainer: Any) -> None:
    class Own(SGD):
        def __init__(self, module: nn.Module) -> None:
            super().__init__(module.parameters(), lr=0.01)
            for parameter in module.parameters():
                self.state[parameter]["sum"] = torch.zeros_like(parameter)

    with pytest.raises(ValueError, match=r"Own holds state .* build it in configure_optimizers, from self.parameters"):
        trainer(callbacks=[callback()]).fit(Captured(Own), loader())


def test_an_optimizer_over_the_head_alone_gets_the_adapters_with_a_warning(trainer: Any) -> None:
    module = Lit(lambda m: AdamW(m.net.second.parameters(), lr=0.01))
    run = trainer(callbacks=[callback(exclude_modules=["second"])])
    with pytest.warns(UserWarning, match="2 trained parameters .* were in no optimizer") as caught:
        run.fit(module, loader())
    text = str(next(w.message for w in caught if "in no optimizer" in str(w.message)))
    assert "net.first.adapters.weight.default.lora_A" in text
    assert "What it chose is frozen (first: net.second.weight)" in text
    assert "modules_to_save" in text
    assert_every_role_has_its_groups(module, run.optimizers, RATIO)


def test_adapters_that_fit_none_of_several_groups_are_an_error_that_says_what_to_write(trainer: Any) -> None:
    module = Lit(lambda m: AdamW([{"params": [m.net.second.weight]}, {"params": [m.net.second.bias]}], lr=0.01))
    with pytest.raises(ValueError, match=r"net.first.adapters.weight.default.lora_A is in no optimizer .* 2 parameter"):
        trainer(callbacks=[callback()]).fit(module, loader())


class SharedByTwo(TwoOptimizers):
    def configure_optimizers(self) -> Any:
        return AdamW(self.parameters(), lr=0.01), SGD(self.other.parameters(), lr=0.02)

    def lr_schedulers(self) -> Any:
        return []


class CapturedByTwo(SharedByTwo):
    def __init__(self) -> None:
        super().__init__()
        self.early = super().configure_optimizers()

    def configure_optimizers(self) -> Any:
        return self.early


@pytest.mark.parametrize("cls", [SharedByTwo, CapturedByTwo])
def test_what_two_optimizers_share_stays_shared(cls: Any, trainer: Any) -> None:
    module = cls()
    run = trainer(callbacks=[callback()])
    run.fit(module, loader())
    assert_every_role_has_its_groups(module.other, run.optimizers[1:], RATIO)
    for optimizer, part in zip(run.optimizers, (module, module.other), strict=True):
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in part.parameters() if p.requires_grad}


def test_no_optimizer_at_all_is_an_error(trainer: Any) -> None:
    with pytest.raises(ValueError, match="configure_optimizers returned no optimizer, so the adapters would not be"):
        trainer(callbacks=[callback()]).fit(Lit(lambda m: None), loader())


def test_a_head_that_was_frozen_and_filtered_away_is_explained(trainer: Any) -> None:
    module = Lit(lambda m: AdamW([p for p in m.net.second.parameters() if p.requires_grad]))
    with pytest.raises(ValueError, match=r"filters by requires_grad .* LoRACallback\(modules_to_save=\[...\]\)"):
        trainer(callbacks=[callback(exclude_modules=["second"])]).fit(module, loader())


def test_lbfgs_trains_at_ratio_one_and_refuses_another(trainer: Any) -> None:
    module, early = Lit(lambda m: LBFGS(m.parameters(), 0.1, 2)), Captured(lambda m: LBFGS(m.parameters(), 0.1, 2))
    for one in (module, early):
        trainer(callbacks=[callback(lr_ratio=1)]).fit(one, loader())
    assert all(bool(factor.any()) for factor in factors(module, "lora_B"))
    assert_same_parameters(module, early)
    with pytest.raises(ValueError, match="LBFGS keeps all parameters in one group: use lr_ratio=1"):
        trainer(callbacks=[callback()]).fit(module, loader())


class Outer:
    """An optimizer without torch's base class, as Lightning accepts them."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner
        self.param_groups, self.defaults, self.state = inner.param_groups, inner.defaults, inner.state

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def state_dict(self) -> Any:
        return self.inner.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.inner.load_state_dict(state)


def test_an_optimizer_without_torchs_base_class_trains_at_ratio_one_and_refuses_another(trainer: Any) -> None:
    module = Lit(lambda m: Outer(SGD(m.parameters(), lr=0.1)))
    trainer(callbacks=[callback(lr_ratio=1)]).fit(module, loader())
    assert all(bool(factor.any()) for factor in factors(module, "lora_B"))
    with pytest.raises(ValueError, match="Outer has no step hooks: use lr_ratio=1"):
        trainer(callbacks=[callback()]).fit(Lit(module.configure), loader())


def test_every_known_role_of_an_adapted_model_is_found() -> None:
    module = Lit()
    inject(module, METHOD)
    by_role = roles(module)
    assert len(by_role) == 2 * len(sites(module))
    assert {id(p) for p, role in by_role.items() if role == "B"} == {id(p) for p in factors(module, "lora_B")}


# ---- LoRA+: its groups, and what they do


def with_head_and_embedding() -> nn.Module:
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    inject(model, LoRA(r=2), ["0", "1"], modules_to_save=["2", "3"], seed=1)
    return model


OFFICIAL = {
    "lora_A": (["1.adapters.weight.default.lora_A", "3.weight"], 2e-4, 0.1),
    "embedding": (["0.adapters.weight.default.lora_A", "0.adapters.weight.default.lora_B"], 1e-6, 0.1),
    "lora_B": (["1.adapters.weight.default.lora_B"], 2e-3, 0.1),
    "lora_B_no_decay": (["2.bias", "2.weight", "3.bias"], 2e-3, 0.0),
}


def found_groups(model: nn.Module, groups: list[dict[str, Any]]) -> list[tuple[list[str], float, float]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    rows = [(sorted(names[p] for p in g["params"]), g["lr"], g["weight_decay"]) for g in groups if g["params"]]
    return sorted(rows, key=str)


def test_official_grouping_is_that_of_the_released_code() -> None:
    """`create_loraplus_optimizer`: what is below the ratio is the base rate, embeddings apart, vectors with B."""
    model = with_head_and_embedding()
    made = param_groups(model, 2e-4, lr_ratio=10, weight_decay=0.1, official_grouping=True)
    joined: dict[tuple[float, float], list[str]] = {}
    for names, lr, decay in found_groups(model, made):
        joined.setdefault((lr, decay), []).extend(names)
    expected = {(lr, decay): names for names, lr, decay in OFFICIAL.values()}
    assert {key: sorted(names) for key, names in joined.items()} == {key: sorted(v) for key, v in expected.items()}


def test_an_optimizer_that_is_split_officially_has_the_same_groups_and_follows_a_scheduler() -> None:
    model = with_head_and_embedding()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    split(model, optimizer, 10, official_grouping=True)
    link(scheduler, [optimizer])
    for halvings in range(3):
        for names, lr, decay in OFFICIAL.values():
            [group] = [
                group
                for group in optimizer.param_groups
                if set(names) == {n for n, p in model.named_parameters() if any(p is q for q in group["params"])}
            ]
            assert group["lr"] == pytest.approx(lr * 0.5**halvings, rel=1e-12)
            assert group["weight_decay"] == decay
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_lora_plus_at_ratio_one_is_lora_bit_for_bit_and_scales_the_first_step_of_B_by_any_other(ratio: float) -> None:
    def run(lr_ratio: float | None, steps: int) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).double()
        inject(model, LoRA(r=2), seed=1)
        before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        plain = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = plain if lr_ratio is None else param_groups(model, 1e-3, lr_ratio=lr_ratio)
        optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.0)
        x = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        after = [p.detach() for p in model.parameters() if p.requires_grad]
        return [b - a for a, b in zip(before, after, strict=True)]

    if ratio == 1:
        assert all(torch.equal(one, other) for one, other in zip(run(1.0, 30), run(None, 30), strict=True))
        return
    for (A, B), (same_A, scaled_B) in zip(batched(run(1.0, 1)), batched(run(ratio, 1)), strict=True):
        assert not A.any()
        assert not same_A.any()
        assert torch.allclose(scaled_B, ratio * B, rtol=1e-12)


def batched(factors: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(factors[::2], factors[1::2], strict=True))


@pytest.mark.parametrize("init", ["pissa", "orthogonal"])
def test_lora_plus_with_a_B_that_starts_elsewhere_is_warned_of(init: Any, trainer: Any) -> None:
    with pytest.warns(UserWarning, match=f"LoRA\\+ is derived for a B that starts at zero, and init='{init}'"):
        trainer(callbacks=[LoRACallback(LoRA(r=2, init=init), lr_ratio=4)], max_steps=1).fit(Lit(), loader(1))
