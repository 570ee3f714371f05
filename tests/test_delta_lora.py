"""Delta-LoRA: the closed form is the paper's loop, and what of the paper's claims follows from that."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import peft
import pytest
import torch
from by_hand import Build, adamw, batches, net, run, same, train, trainable, trained, weights
from conftest import Lit, Net, loader
from lightning.pytorch.callbacks import LearningRateFinder
from torch import Tensor, nn
from torch.optim import SGD, Adam

from lightning_lora import (
    DeltaLoRA,
    LoRA,
    LoRACallback,
    inject,
    load_adapter,
    load_from_checkpoint,
    merge_,
    merged,
    offline,
    remove,
    save_adapter,
    sites,
    use,
)
from lightning_lora.analysis import singular_values
from lightning_lora.methods.delta_lora import DeltaLoRAAdapter

METHOD = DeltaLoRA(r=2, alpha=3, start_step=2)
IN_PLACE = DeltaLoRA(r=2, alpha=3, start_step=2, in_place=True)


def adapter(model: nn.Module, index: int = 0) -> DeltaLoRAAdapter:
    found = sites(model)[index].adapter("default")
    assert isinstance(found, DeltaLoRAAdapter)
    return found


class Literal(nn.Module):
    """Algorithm 1 written down again: two linear layers whose W is written after each step t > K.

    Args:
        plain: Adapted by LoRA with the same start.
        method: The hyperparameters.
    """

    def __init__(self, plain: Net, method: DeltaLoRA) -> None:
        super().__init__()
        self.s, self.ratio, self.K = method.alpha / method.r, method.update_ratio, method.start_step
        self.W = [layer.weight.detach().clone() for layer in (plain.first, plain.second)]
        self.bias = [layer.bias.detach().clone() for layer in (plain.first, plain.second)]
        pairs = [site.adapter("default") for site in sites(plain)]
        self.A = nn.ParameterList(one.lora_A.detach().clone() for one in pairs)
        self.B = nn.ParameterList(one.lora_B.detach().clone() for one in pairs)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(2):
            x = x @ self.W[i].T + self.bias[i] + self.s * (x @ self.A[i].T) @ self.B[i].T
            x = torch.tanh(x) if i == 0 else x
        return x

    def train_for(self, steps: int, build: Build) -> list[list[Tensor]]:
        """Train, and return what was added to each W at each step."""
        optimizer, added = build(list(self.parameters())), []
        for t, (x, y) in enumerate(batches(steps)):
            optimizer.zero_grad()
            (self(x) - y).square().mean().backward()
            before = [(B @ A).detach() for A, B in zip(self.A, self.B, strict=True)]
            optimizer.step()
            after = [(B @ A).detach() for A, B in zip(self.A, self.B, strict=True)]
            change = [self.ratio * self.s * (new - old) for new, old in zip(after, before, strict=True)]
            if t > self.K:
                added.append(change)
                self.W = [W + one for W, one in zip(self.W, change, strict=True)]
        return added


def literal(method: DeltaLoRA) -> Literal:
    plain = net()
    inject(plain, LoRA(r=method.r, alpha=method.alpha), seed=1, dtype=torch.float64)
    return Literal(plain, method)


# ---- the closed form


@pytest.mark.parametrize("start_step", [-1, 0, 2])
@pytest.mark.parametrize(
    "build",
    [adamw, lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1)],
    ids=["AdamW", "SGD with momentum and decay"],
)
def test_the_closed_form_is_the_papers_loop(build: Build, start_step: int) -> None:
    method = DeltaLoRA(r=2, alpha=3, start_step=start_step, update_ratio=0.7)
    ours, loop = net(), literal(method)
    train(ours, method, 20, build)
    added = loop.train_for(20, build)
    for i, weight in enumerate(weights(ours)):
        pair = adapter(ours, i)
        expected = loop.W[i] + loop.s * loop.B[i] @ loop.A[i]
        assert (weight - expected).abs().max() < 1e-14
        assert max((pair.lora_A - loop.A[i]).abs().max(), (pair.lora_B - loop.B[i]).abs().max()) < 1e-14
        increment = weight - ours.get_submodule(["first", "second"][i]).weight - loop.s * pair.lora_B @ pair.lora_A
        assert (sum(step[i] for step in added) - increment).abs().max() < 1e-14
        assert increment.abs().max() > 1e-3


def test_the_base_changes_from_the_step_after_start_step_on() -> None:
    for steps in range(6):
        model, plain = net(), net()
        train(model, METHOD, steps)
        train(plain, LoRA(r=2, alpha=3), steps)
        assert METHOD.start_step == 2
        if steps <= 3:  # t = 0, 1, 2
            assert same(trained(model), trained(plain))
            assert all(map(torch.equal, weights(model), weights(plain)))
            assert not adapter(model).propagates
        else:
            assert adapter(model).propagates
            assert not any(map(torch.equal, weights(model), weights(plain)))


@pytest.mark.parametrize(
    "method",
    [
        DeltaLoRA(r=2, alpha=3, update_ratio=0, start_step=-1),
        DeltaLoRA(r=2, alpha=3, start_step=9),
        DeltaLoRA(r=2, alpha=3, start_step=100, scaling="rsqrt"),
    ],
    ids=["update_ratio=0", "start_step is the last step", "start_step after the end, rsLoRA's scale"],
)
def test_without_an_update_of_the_base_it_is_lora_bit_for_bit(method: DeltaLoRA) -> None:
    ours, plain = net(torch.float32), net(torch.float32)
    train(ours, method, 10, dtype=torch.float32)
    train(plain, LoRA(r=2, alpha=3, scaling=method.scaling), 10, dtype=torch.float32)
    assert same(trained(ours), trained(plain))
    x = batches(1, torch.float32)[0][0]
    assert torch.equal(ours(x), plain(x))


def test_gradients_are_loras_for_the_factors_and_the_whole_ones_for_the_input() -> None:
    model = net()
    train(model, METHOD, 8)
    one, x = adapter(model), batches(1)[0][0].requires_grad_()
    a, b = one.lora_A.detach().clone().requires_grad_(), one.lora_B.detach().clone().requires_grad_()
    fixed = one.adapted(model.first.weight).detach() - one.scaling * (b @ a).detach()
    expected = torch.tanh(x @ (fixed + one.scaling * b @ a).T).square().sum()
    up, down = one.factors()
    ours = torch.tanh(x @ model.first.weight.T + one.scaling * (x @ down.T) @ up.T).square().sum()
    ours_too = torch.autograd.grad(ours, [x, one.lora_A, one.lora_B])
    for gradient, other in zip(ours_too, torch.autograd.grad(expected, [x, a, b]), strict=True):
        assert (gradient - other).abs().max() < 1e-13
        assert gradient.any()
    assert one.snapshot_A.grad is None
    assert one.snapshot_B.grad is None


# ---- what follows from it


@pytest.mark.parametrize(
    ("ours", "loras", "alpha"),
    [
        (lambda p: Adam(p, lr=0.01, eps=1e-300), lambda p: Adam(p, lr=0.01, eps=1e-300), 3 * (1 + 0.7)),
        (lambda p: SGD(p, lr=0.05), lambda p: SGD(p, lr=0.05 / (1 + 0.7)), 3 * (1 + 0.7)),
    ],
    ids=["Adam: LoRA with alpha (1 + ratio)", "SGD: that with lr / (1 + ratio)"],
)
def test_from_the_first_step_on_it_is_lora_with_another_alpha(ours: Build, loras: Build, alpha: float) -> None:
    model, plain = net(), net()
    train(model, DeltaLoRA(r=2, alpha=3, update_ratio=0.7, start_step=-1), 40, ours)
    train(plain, LoRA(r=2, alpha=alpha), 40, loras)
    for weight, other in zip(weights(model), weights(plain), strict=True):
        assert (weight - other).abs().max() < 1e-10
    assert max((a - b).abs().max() for a, b in zip(weights(model), weights(net_as_adapted()), strict=True)) > 1e-3


def net_as_adapted() -> Net:
    model = net()
    inject(model, LoRA(r=2, alpha=3), seed=1)
    return model


@pytest.mark.parametrize(("start_step", "rank"), [(-1, 1), (0, 2), (5, 2)])
def test_the_change_has_rank_r_if_it_starts_with_the_first_step_and_2r_if_later(start_step: int, rank: int) -> None:
    model = net()
    train(model, DeltaLoRA(r=1, alpha=3, start_step=start_step), 12)
    change = adapter(model).delta()
    assert torch.linalg.matrix_rank(change) == rank
    assert (singular_values(adapter(model)) > 1e-9).sum() == rank


def test_the_base_is_never_written_and_comes_back_bit_for_bit() -> None:
    model, plain = net(), net()
    train(model, METHOD, 8)
    with merged(model):
        assert not torch.equal(model.first.weight, plain.first.weight)
    remove(model)
    assert same(model.state_dict(), plain.state_dict())


def test_a_step_that_is_not_taken_is_not_counted() -> None:
    model = net()
    inject(model, METHOD, seed=1)
    (schedule,) = METHOD.schedules(sites(model), "default")
    optimizer = adamw(trainable(model))
    for taken in (True, False, True, False, False, True, False):
        schedule.before_step(optimizer)
        if taken:
            optimizer.step()
            schedule.after_step(optimizer)
    assert schedule.step == 3  # steps 0, 1 and 2: the next is the first that changes the base


# ---- files


def after(steps: int = 8) -> Net:
    model = net(torch.float32)
    train(model, METHOD, steps, dtype=torch.float32)
    return model


@pytest.mark.parametrize("steps", [2, 8], ids=["before the base changes", "after"])
def test_it_is_exported_as_a_lora_that_peft_loads(steps: int, tmp_path: Path) -> None:
    model, x = after(steps), batches(1, torch.float32)[0][0]
    holder, fresh, by_peft = (nn.Sequential(one) for one in (model, net(torch.float32), net(torch.float32)))
    save_adapter(holder, tmp_path / "adapter")
    offline.export(tmp_path / "adapter", tmp_path / "portable")
    load_adapter(fresh, tmp_path / "portable")
    method = sites(fresh)[0].adapter("default").method
    assert type(method) is LoRA
    assert method.r == (2 if steps == 2 else 4)
    theirs = peft.PeftModel.from_pretrained(by_peft, tmp_path / "portable")
    for other in (fresh, theirs):
        assert torch.allclose(other(x), model(x), rtol=0, atol=1e-6)
    assert not torch.allclose(net(torch.float32)(x), model(x), rtol=0, atol=1e-3)


def test_a_folder_computes_the_same_and_goes_on(tmp_path: Path) -> None:
    model, fresh, x = after(), net(torch.float32), batches(1, torch.float32)[0][0]
    save_adapter(model, tmp_path / "adapter")
    load_adapter(fresh, tmp_path / "adapter")
    assert adapter(fresh).propagates
    assert torch.equal(fresh(x), model(x))
    assert torch.equal(merge_(fresh)(x), merge_(copy.deepcopy(model))(x))


# ---- runs


@pytest.mark.parametrize("method", [METHOD, IN_PLACE], ids=["closed form", "in place"])
@pytest.mark.parametrize("stop", [2, 3, 4, 7], ids=lambda stop: f"stopped after {stop} steps")
def test_a_run_resumed_around_the_start_equals_the_uninterrupted_one(
    stop: int, method: DeltaLoRA, trainer: Any, tmp_path: Path
) -> None:
    whole, part, rest = Lit(), Lit(), Lit()
    run(trainer, whole, 9, method)
    run(trainer, part, stop, method).save_checkpoint(tmp_path / "a.ckpt")
    run(trainer, rest, 9, method, ckpt_path=tmp_path / "a.ckpt")
    assert part.losses + rest.losses == whole.losses
    assert same(rest.state_dict(), whole.state_dict())
    assert adapter(whole).propagates
    restored = load_from_checkpoint(Lit, tmp_path / "a.ckpt")
    x = torch.randn(3, 4)
    assert adapter(restored).propagates == (stop > 3)
    assert torch.equal(restored(x), part(x))


def test_a_checkpoint_holds_the_two_pairs_and_nothing_of_the_base(trainer: Any, tmp_path: Path) -> None:
    run(trainer, Lit(), 5, METHOD).save_checkpoint(tmp_path / "a.ckpt")
    names = {name.rpartition(".")[2] for name in torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]}
    assert {name for name in names if " " not in name} == {"lora_A", "lora_B", "snapshot_A", "snapshot_B"}


def test_accumulated_gradients_make_the_same_run(trainer: Any) -> None:
    whole, parts = Lit(), Lit()
    trainer(callbacks=[LoRACallback(METHOD)], max_epochs=3).fit(whole, loader(4, 4))
    trainer(callbacks=[LoRACallback(METHOD)], max_epochs=3, accumulate_grad_batches=2).fit(parts, loader(8, 2))
    assert adapter(parts).propagates
    for name, value in whole.state_dict().items():
        assert torch.allclose(parts.state_dict()[name], value, rtol=0, atol=1e-5)


# ---- in place


class Watch(L.Callback):
    """Do something after every batch, with what the run holds then.

    Args:
        do: A function of the module.
    """

    def __init__(self, do: Callable[[Any], object]) -> None:
        self.do = do
        self.found: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.found.append(self.do(pl_module))


def matrices(module: nn.Module) -> list[Tensor]:
    return [site.module.weight.detach().clone() for site in sites(module)]


def base_of_lit() -> list[Tensor]:
    return [Lit().net.first.weight, Lit().net.second.weight]


def fitted(trainer: Any, do: Callable[[Any], object], method: DeltaLoRA = IN_PLACE, steps: int = 8) -> list[Any]:
    """Train, and return what a function gave after each step."""
    watch = Watch(do)
    trainer(callbacks=[LoRACallback(method), watch], max_epochs=steps).fit(Lit(), loader(1))
    return watch.found


@pytest.mark.parametrize("start_step", [-1, 2])
def test_in_place_the_weight_itself_is_the_papers(start_step: int) -> None:
    method = DeltaLoRA(r=2, alpha=3, start_step=start_step, update_ratio=0.7, in_place=True)
    ours, loop = net(), literal(method)
    train(ours, method, 20)
    loop.train_for(20, adamw)
    for i, (weight, before) in enumerate(zip(matrices(ours), (net().first.weight, net().second.weight), strict=True)):
        assert (weight - loop.W[i]).abs().max() < 1e-14
        assert (weight - before).abs().max() > 1e-3
        assert (weights(ours)[i] - loop.W[i] - loop.s * loop.B[i] @ loop.A[i]).abs().max() < 1e-14
        assert adapter(ours, i).factors()[0].shape[1] == 2, "only the pair is computed beside it"


def test_the_weight_is_the_bases_until_start_step_and_after_the_run(trainer: Any) -> None:
    module = Lit()
    before, watch = base_of_lit(), Watch(matrices)
    trainer(callbacks=[LoRACallback(IN_PLACE), watch], max_epochs=6).fit(module, loader(1))
    for step, found in enumerate(watch.found):
        assert all(map(torch.equal, found, before)) == (step <= IN_PLACE.start_step)
    assert all(map(torch.equal, matrices(module), before))
    assert not any(site.slot.written_by or adapter(module, i).in_base for i, site in enumerate(sites(module)))


def test_a_run_that_fails_leaves_the_base_as_it_was(trainer: Any) -> None:
    module = Lit()

    def fail(module: Any) -> None:
        if sites(module)[0].slot.written_by:
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        trainer(callbacks=[LoRACallback(IN_PLACE), Watch(fail)], max_epochs=6).fit(module, loader(1))
    assert all(map(torch.equal, matrices(module), base_of_lit()))


def test_in_place_and_closed_form_are_one_run_to_rounding_with_accumulation_and_a_resume(
    trainer: Any, tmp_path: Path
) -> None:
    runs = []
    for method in (METHOD, IN_PLACE):
        part, rest = Lit(), Lit()
        options = {"accumulate_grad_batches": 2, "precision": "64-true"}
        first = trainer(callbacks=[LoRACallback(method, dtype="float64")], max_epochs=3, **options)
        first.fit(part, loader(4, 4))
        first.save_checkpoint(tmp_path / "a.ckpt")
        second = trainer(callbacks=[LoRACallback(method, dtype="float64")], max_epochs=6, **options)
        second.fit(rest, loader(4, 4), ckpt_path=tmp_path / "a.ckpt")
        runs.append((part.losses + rest.losses, weights(rest)))
    (losses, ends), (other_losses, other_ends) = runs
    assert len(losses) == 24
    assert max(abs(one - other) for one, other in zip(losses, other_losses, strict=True)) < 1e-14
    assert max((one - other).abs().max() for one, other in zip(ends, other_ends, strict=True)) < 1e-14


def test_what_is_saved_in_mid_run_is_what_the_closed_form_saves(trainer: Any, tmp_path: Path) -> None:
    seen: list[Any] = []

    def save(module: Any) -> None:
        module.trainer.save_checkpoint(tmp_path / "a.ckpt")
        save_adapter(module, tmp_path / "folder")
        seen.append(module(torch.ones(1, 4)))

    assert any(fitted(trainer, lambda module: save(module) or sites(module)[0].slot.written_by is not None))
    restored, loaded = load_from_checkpoint(Lit, tmp_path / "a.ckpt"), Lit()
    load_adapter(loaded, tmp_path / "folder")
    for fresh in (restored, loaded):
        assert torch.allclose(fresh(torch.ones(1, 4)), seen[-1], rtol=0, atol=1e-6)
        assert all(map(torch.equal, matrices(fresh), base_of_lit()))
    names = {name.rpartition(".")[2] for name in torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]}
    assert {name for name in names if " " not in name} == {"lora_A", "lora_B", "snapshot_A", "snapshot_B"}


def in_mid_run() -> Net:
    model = net()
    train(model, IN_PLACE, 8)
    assert sites(model)[0].slot.written_by == "default"
    return model


@pytest.mark.parametrize("copied", [False, True], ids=["itself", "a copy"])
def test_taken_out_in_mid_run_it_leaves_the_base_bit_for_bit(copied: bool) -> None:
    model = copy.deepcopy(in_mid_run()) if copied else in_mid_run()
    remove(model)
    assert same(model.state_dict(), net().state_dict())


def test_merged_in_mid_run_the_whole_change_stays() -> None:
    model, x = in_mid_run().eval(), batches(1)[0][0]
    expected = model(x)
    with merged(model):
        assert torch.allclose(model(x), expected, rtol=0, atol=1e-14)
    merge_(model)
    assert torch.allclose(model(x), expected, rtol=0, atol=1e-14)
    assert type(model.first) is nn.Linear


def test_while_the_base_is_written_to_nothing_else_can_use_it() -> None:
    model = net()
    inject(model, LoRA(r=1), task="other")
    inject(model, IN_PLACE, seed=1, dtype=torch.float64)
    (schedule,) = IN_PLACE.schedules(sites(model, "default"), "default")
    before = matrices(model)
    optimizer = adamw(trainable(model))
    for x, y in batches(6):
        use(model, "default")
        (model(x) - y).square().mean().backward()
        schedule.before_step(optimizer)
        optimizer.step()
        schedule.after_step(optimizer)
    use(model, "default", "other")
    for tasks in ([], ["other"]):
        with pytest.raises(RuntimeError, match="training writes what default adds to the base to"):
            use(model, *tasks)
    with pytest.raises(RuntimeError, match="cannot use third now"):
        inject(model, LoRA(r=1), task="third")
    remove(model, "other")
    assert not any(map(torch.equal, matrices(model), before)), "another task's end is not this one's"
    expected = model(x)
    schedule.end()
    assert torch.allclose(model(x), expected, rtol=0, atol=1e-14)
    assert all(map(torch.equal, matrices(model), before))
    use(model)
    assert torch.equal(model(x), net()(x))


def test_parts_of_one_weight_are_written_each_in_its_rows() -> None:
    model = nn.Sequential(nn.Linear(4, 6)).double()
    closed = copy.deepcopy(model)
    before = model[0].weight.detach().clone()
    for one, method in ((model, IN_PLACE), (closed, METHOD)):
        inject(one, method, ["0.q", "0.v"], fused={"0": ["q", "k", "v"]}, seed=1, dtype=torch.float64)
        (schedule,) = method.schedules(sites(one), "default")
        optimizer = adamw(trainable(one))
        for x, _ in batches(6):
            optimizer.zero_grad()
            one(x).square().sum().backward()
            schedule.before_step(optimizer)
            optimizer.step()
            schedule.after_step(optimizer)
    x = batches(1)[0][0]
    assert torch.allclose(model(x), closed(x), rtol=0, atol=1e-13)
    now = model[0].weight
    assert torch.equal(now[2:4], before[2:4])
    assert not torch.isclose(now[:2], before[:2]).any()
    assert not torch.isclose(now[4:], before[4:]).any()
    remove(model)
    assert torch.equal(model[0].weight, before)


def test_a_learning_rate_search_in_mid_run_leaves_no_trace_in_the_base(trainer: Any) -> None:
    class Tuned(Lit):
        lr = 0.01

    class Searches(LearningRateFinder):
        def on_fit_start(self, *_: Any) -> None:
            pass

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 5:
                assert sites(pl_module)[0].slot.written_by == "default"
                self.lr_find(trainer, pl_module)

    plain, tuned = Tuned(), Tuned()
    trainer(callbacks=[LoRACallback(IN_PLACE)], max_epochs=8).fit(plain, loader(1))
    search = Searches(num_training_steps=3, update_attr=False)
    trainer(callbacks=[LoRACallback(IN_PLACE), search], max_epochs=8).fit(tuned, loader(1))
    assert len(tuned.losses) > 8
    assert tuned.losses[-3:] == plain.losses[-3:]
    assert same(tuned.state_dict(), plain.state_dict())


def test_a_schedule_goes_back_to_a_state_from_before_the_first_write() -> None:
    model = net()
    inject(model, IN_PLACE, seed=1, dtype=torch.float64)
    (schedule,) = IN_PLACE.schedules(sites(model), "default")
    start = copy.deepcopy((model.state_dict(), schedule.state_dict()))
    losses: list[list[float]] = []
    for _ in range(2):
        optimizer, found = adamw(trainable(model)), []
        for x, y in batches(6):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            found.append(loss.item())
            schedule.before_step(optimizer)
            optimizer.step()
            schedule.after_step(optimizer)
        losses.append(found)
        adapters = {name: value for name, value in start[0].items() if "adapters" in name}
        model.load_state_dict(adapters, strict=False)
        schedule.load_state_dict(start[1])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision_is_refused(dtype: torch.dtype) -> None:
    model = net(dtype)
    inject(model, IN_PLACE)
    with pytest.raises(ValueError, match=rf"first.weight is a Parameter of {dtype}.*use in_place=False"):
        IN_PLACE.schedules(sites(model), "default")


def test_a_weight_that_another_layer_has_too_is_refused(trainer: Any) -> None:
    module = Lit()
    module.net.tied = nn.Linear(8, 3)
    module.net.tied.weight = module.net.second.weight
    with pytest.raises(ValueError, match=r"net\.second\.weight is tied to net\.tied\.weight"):
        trainer(callbacks=[LoRACallback(IN_PLACE, ["first", "second"])]).fit(module, loader(1))


@pytest.mark.parametrize("start_step", [-1, 2])
def test_the_audit_lets_the_first_step_write_to_the_base(start_step: int, trainer: Any) -> None:
    module, method = Lit(), DeltaLoRA(r=2, alpha=3, start_step=start_step, in_place=True)
    run(trainer, module, 1, method)
    assert adapter(module).propagates == (start_step == -1)
