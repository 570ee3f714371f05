"""ReLoRA: restarts leave the function as it is and let the rank grow; the paper's loop, which writes W, agrees."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from by_hand import (
    Build,
    adamw,
    batches,
    net,
    run,
    same,
    train,
    trainable,
    trained,
    weights,
)
from conftest import Lit, Net, loader
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import ExponentialLR

from lightning_lora import (
    LoRA,
    LoRACallback,
    ReLoRA,
    inject,
    load_adapter,
    load_from_checkpoint,
    offline,
    param_groups,
    remove,
    save_adapter,
    sites,
)
from lightning_lora.methods.relora import ReLoRAAdapter, Restarts
from lightning_lora.schedule import Schedule

METHOD = ReLoRA(r=1, alpha=3, restart_every=4, restarts=2, warmup=3, prune=0.9)


def adapters(model: nn.Module) -> list[ReLoRAAdapter]:
    found = [site.adapter("default") for site in sites(model)]
    assert all(isinstance(one, ReLoRAAdapter) for one in found)
    return found  # type: ignore[return-value]


def step(model: nn.Module, batch: tuple[Tensor, Tensor], optimizer: Optimizer, schedules: list[Schedule]) -> None:
    optimizer.zero_grad()
    (model(batch[0]) - batch[1]).square().mean().backward()
    for schedule in schedules:
        schedule.before_step(optimizer)
    optimizer.step()
    for schedule in schedules:
        schedule.after_step(optimizer)


# ---- the method


@pytest.mark.parametrize(
    "build",
    [adamw, lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1)],
    ids=["AdamW", "SGD with momentum and decay"],
)
def test_it_is_the_papers_loop_which_writes_the_base_and_lowers_the_rate(build: Build) -> None:
    ours, loop = net(), net()
    inject(ours, METHOD, seed=1, dtype=torch.float64)
    inject(loop, LoRA(r=1, alpha=3), seed=1, dtype=torch.float64)
    optimizer, other = build(trainable(ours)), build(trainable(loop))
    schedules, full = METHOD.schedules(sites(ours), "default"), other.param_groups[0]["lr"]
    for t, batch in enumerate(batches(14)):
        step(ours, batch, optimizer, schedules)
        restarts = min(t // 4, 2)
        since = t - 4 * restarts  # 4 steps a cycle; the third one does not end
        other.param_groups[0]["lr"] = full * (min(1, (since + 1) / 3) if restarts else 1)
        step(loop, batch, other, [])
        if t in (3, 7):
            for one, site in zip(adapters(ours), sites(loop), strict=True):
                pair = site.adapter("default")
                with torch.no_grad():
                    site.module.weight += pair.delta()
                    pair.lora_A.copy_(one.lora_A)
                    pair.lora_B.zero_()
                for parameter in (pair.lora_A, pair.lora_B):
                    moments = [
                        other.state[parameter].get(name) for name in ("exp_avg", "exp_avg_sq", "momentum_buffer")
                    ]
                    first, *rest = [moment for moment in moments if moment is not None]
                    kept = first.abs() > torch.quantile(first.abs(), 0.9)
                    for moment in (first, *rest):
                        moment.mul_(kept)
        for weight, expected in zip(weights(ours), weights(loop), strict=True):
            assert (weight - expected).abs().max() < 1e-13
    assert [one.folds for one in adapters(ours)] == [2, 2]
    assert adapters(ours)[0].lora_B.any()


def test_until_the_first_restart_it_is_lora_bit_for_bit() -> None:
    ours, plain = net(torch.float32), net(torch.float32)
    train(ours, METHOD, 3, dtype=torch.float32)
    train(plain, LoRA(r=1, alpha=3), 3, dtype=torch.float32)
    assert same(trained(ours), trained(plain))
    x = batches(1, torch.float32)[0][0]
    assert torch.equal(ours(x), plain(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_restart_leaves_the_function_as_it_is_up_to_rounding(dtype: torch.dtype) -> None:
    model, x = net(dtype), batches(1, dtype)[0][0]
    inject(model, METHOD, seed=1)
    for _ in range(2):
        for one in adapters(model):
            nn.init.normal_(one.lora_B)
        before = model(x)
        for one in adapters(model):
            one.restart()
        assert torch.allclose(model(x), before, rtol=0, atol=20 * torch.finfo(dtype).eps)
        assert not any(one.lora_B.any() for one in adapters(model))


def test_every_restart_draws_another_a_and_the_same_one_in_every_run() -> None:
    drawn = []
    for _ in range(2):
        model = net()
        inject(model, METHOD, seed=1)
        for one in adapters(model):
            for _ in range(3):
                drawn.append(one.lora_A.detach().clone())
                if one.folds < 2:
                    one.restart()
    first, second = drawn[:6], drawn[6:]
    assert all(map(torch.equal, first, second))
    assert not any(
        one.shape == other.shape and torch.equal(one, other) for one, other in itertools.combinations(first, 2)
    )
    assert all(one.abs().max() <= one.shape[-1] ** -0.5 for one in first)  # the same distribution as at the start


@pytest.mark.parametrize(("steps", "rank"), [(3, 1), (6, 2), (10, 3), (20, 3)])
def test_the_rank_grows_by_r_with_each_restart_until_there_is_no_room(steps: int, rank: int) -> None:
    model = net()
    train(model, METHOD, steps)
    assert [int(torch.linalg.matrix_rank(one.delta())) for one in adapters(model)] == [rank, rank]
    assert [one.folds for one in adapters(model)] == [rank - 1, rank - 1]


@pytest.mark.parametrize(("prune", "left"), [(0.0, 10), (0.9, 1), (1.0, 0)])
def test_a_restart_prunes_the_optimizers_state_of_the_pair_and_nothing_else(prune: float, left: int) -> None:
    model = net()
    model.first = nn.Linear(10, 8, dtype=torch.float64)
    model.requires_grad_(False)
    method = ReLoRA(r=1, restart_every=1, prune=prune)
    inject(model, method, ["first"], modules_to_save=["second"], seed=1)
    optimizer = Adam(trainable(model), lr=0.01)
    schedule = method.schedules(sites(model), "default")
    nn.init.normal_(adapters(model)[0].lora_B)
    (model(torch.ones(1, 10, dtype=torch.float64)) * torch.tensor([1.0, 2, 3])).sum().backward()
    a = adapters(model)[0].lora_A
    gradient = torch.arange(1.0, 11)[None].double() * torch.tensor([1, -1] * 5)
    a.grad = gradient.clone()
    schedule[0].before_step(optimizer)
    optimizer.step()
    optimizer.state[a]["exp_avg_sq"] = optimizer.state[a]["exp_avg_sq"].flip(1)  # largest where the first is smallest
    schedule[0].after_step(optimizer)
    for name in ("exp_avg", "exp_avg_sq"):
        kept = optimizer.state[a][name] != 0
        assert kept.sum() == left
        assert kept[0, 10 - left :].all()
        assert (optimizer.state[model.second.weight][name] != 0).all()
    assert optimizer.state[a]["step"] == 1


def test_updates_warm_up_again_whatever_sets_the_learning_rate() -> None:
    """Every group keeps the rate that its scheduler gave it, and what is trained beside the adapters is not slowed."""
    model, method = net(), ReLoRA(r=1, restart_every=2, restarts=1, warmup=4, prune=1.0)
    inject(model, method, ["first"], modules_to_save=["second"], seed=1)
    optimizer = SGD(param_groups(model, 0.1, lr_ratio=4))
    scheduler = ExponentialLR(optimizer, 0.5)
    schedules = method.schedules(sites(model), "default")
    (one,) = adapters(model)
    for t, batch in enumerate(batches(8)):
        before = {p: p.detach().clone() for p in trainable(model)}
        rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        step(model, batch, optimizer, schedules)
        assert [group["lr"] for group in optimizer.param_groups] == [
            rates[g["params"][0]] for g in optimizer.param_groups
        ]
        share = 1.0 if t < 2 else min(1.0, (t - 1) / 4)
        if t != 1:  # which ends in the restart
            for p, was in before.items():
                expected = was - (share if p is one.lora_A or p is one.lora_B else 1.0) * rates[p] * p.grad
                assert torch.allclose(p, expected, rtol=0, atol=1e-15)
        assert rates[one.lora_B] == pytest.approx(4 * rates[one.lora_A])
        scheduler.step()
    assert rates[one.lora_A] == pytest.approx(0.1 * 0.5**7)


def test_a_step_that_is_not_taken_is_neither_counted_nor_scaled() -> None:
    model = net()
    inject(model, METHOD, seed=1)
    schedule = Restarts(adapters(model), METHOD)
    optimizer = adamw(trainable(model))
    for taken in (True, False, True, True, False, True):
        schedule.before_step(optimizer)
        if taken:
            optimizer.step()
            schedule.after_step(optimizer)
    assert schedule.step == 4
    assert [one.folds for one in adapters(model)] == [1, 1]
    before = trained(model)
    schedule.before_step(optimizer)
    assert same(trained(model), before)


# ---- files


def after(steps: int) -> Net:
    model = net(torch.float32)
    train(model, METHOD, steps, dtype=torch.float32)
    return model


@pytest.mark.parametrize(("steps", "rank"), [(3, 1), (6, 2), (10, 3)])
def test_it_is_exported_as_a_lora_of_the_whole_rank_that_peft_loads(steps: int, rank: int, tmp_path: Path) -> None:
    model, x = after(steps), batches(1, torch.float32)[0][0]
    holder, fresh, by_peft = (nn.Sequential(one) for one in (model, net(torch.float32), net(torch.float32)))
    save_adapter(holder, tmp_path / "adapter")
    offline.export(tmp_path / "adapter", tmp_path / "portable")
    load_adapter(fresh, tmp_path / "portable")
    method = sites(fresh)[0].adapter("default").method
    assert (type(method), method.r) == (LoRA, rank)
    for other in (fresh, peft.PeftModel.from_pretrained(by_peft, tmp_path / "portable")):
        assert torch.allclose(other(x), model(x), rtol=0, atol=1e-6)
    assert not torch.allclose(net(torch.float32)(x), model(x), rtol=0, atol=1e-3)


def test_a_folder_computes_the_same_and_has_room_left(tmp_path: Path) -> None:
    model, fresh, x = after(6), net(torch.float32), batches(1, torch.float32)[0][0]
    save_adapter(model, tmp_path / "adapter")
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(x), model(x))
    assert [one.folds for one in adapters(fresh)] == [1, 1]
    optimizer, schedules = adamw(trainable(fresh)), METHOD.schedules(sites(fresh), "default")
    for batch in batches(9, torch.float32):
        step(fresh, batch, optimizer, schedules)
    assert [one.folds for one in adapters(fresh)] == [2, 2]
    remove(fresh)
    assert same(fresh.state_dict(), net(torch.float32).state_dict())


# ---- runs


@pytest.mark.parametrize("stop", [3, 4, 5, 8], ids=lambda stop: f"stopped after {stop} steps")
def test_a_run_resumed_around_a_restart_equals_the_uninterrupted_one(stop: int, trainer: Any, tmp_path: Path) -> None:
    whole, part, rest = Lit(), Lit(), Lit()
    first = run(trainer, whole, 10, METHOD)
    run(trainer, part, stop, METHOD).save_checkpoint(tmp_path / "a.ckpt")
    second = run(trainer, rest, 10, METHOD, ckpt_path=tmp_path / "a.ckpt")
    assert part.losses + rest.losses == whole.losses
    assert same(rest.state_dict(), whole.state_dict())
    states = [made.optimizers[0].state_dict()["state"] for made in (first, second)]
    assert all(same(states[0][i], states[1][i]) for i in states[0])
    assert [one.folds for one in adapters(whole)] == [2, 2]
    restored, x = load_from_checkpoint(Lit, tmp_path / "a.ckpt"), torch.randn(3, 4)
    assert [one.folds for one in adapters(restored)] == [stop // 4] * 2
    assert torch.equal(restored(x), part(x))


def test_accumulated_gradients_make_the_same_run(trainer: Any) -> None:
    whole, parts = Lit(), Lit()
    trainer(callbacks=[LoRACallback(METHOD)], max_epochs=3).fit(whole, loader(4, 4))
    trainer(callbacks=[LoRACallback(METHOD)], max_epochs=3, accumulate_grad_batches=2).fit(parts, loader(8, 2))
    assert [one.folds for one in adapters(parts)] == [2, 2]
    for name, value in whole.state_dict().items():
        assert torch.allclose(parts.state_dict()[name], value, rtol=0, atol=1e-4)
