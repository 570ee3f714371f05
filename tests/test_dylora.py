"""DyLoRA: each step trains a prefix, the same everywhere and in every run, and each prefix is a LoRA of its own."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from by_hand import Build, adamw, batches, net, run, same, train, trainable, trained
from conftest import Lit, loader
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.optim import SGD

from lightning_lora import (
    DyLoRA,
    LoRA,
    LoRACallback,
    at_rank,
    inject,
    load_adapter,
    merged,
    save_adapter,
    sites,
    truncate_,
)
from lightning_lora.methods.dylora import DyLoRAAdapter, RankSampling

METHOD = DyLoRA(r=4, alpha=3)
FROZEN = DyLoRA(r=4, alpha=3, frozen=True)
both = pytest.mark.parametrize("method", [METHOD, FROZEN], ids=["all of the prefix", "its last rank"])


def adapters(model: nn.Module) -> list[DyLoRAAdapter]:
    found = [site.adapter("default") for site in sites(model)]
    assert all(isinstance(one, DyLoRAAdapter) for one in found)
    return found  # type: ignore[return-value]


def after(steps: int, method: DyLoRA = METHOD) -> nn.Module:
    model = net()
    train(model, method, steps)
    return model.eval()


def loras(model: nn.Module, rank: int, method: DyLoRA = METHOD) -> nn.Module:
    """The same network with plain LoRA, made of the first rows and columns."""
    plain = net()
    inject(plain, LoRA(r=rank, alpha=method.alpha, scaling=method.scaling), seed=1)
    with torch.no_grad():
        for one, site in zip(adapters(model), sites(plain), strict=True):
            site.adapter("default").lora_A.copy_(one.lora_A[:rank])
            site.adapter("default").lora_B.copy_(one.lora_B[:, :rank])
    return plain.eval()


@pytest.mark.parametrize("scaling", ["linear", "rsqrt"])
@pytest.mark.parametrize("build", [adamw, lambda p: SGD(p, lr=0.05, momentum=0.9)], ids=["AdamW", "SGD with momentum"])
def test_a_step_trains_the_first_b_rows_and_columns_with_scale_alpha_by_b(build: Build, scaling: str) -> None:
    method = DyLoRA(r=4, alpha=3, scaling=scaling)  # type: ignore[arg-type]
    ours, plain = net(), net()
    train(ours, method, 12, build)
    inject(plain, LoRA(r=4, alpha=3), seed=1)
    pairs = [site.adapter("default") for site in sites(plain)]
    optimizer, ranks = build([p for one in pairs for p in (one.lora_A, one.lora_B)]), RankSampling(adapters(ours)).rank
    for t, (x, y) in enumerate(batches(12)):
        b = ranks(t)
        s = 3 / (b if scaling == "linear" else b**0.5)
        h = plain.first.weight + s * pairs[0].lora_B[:, :b] @ pairs[0].lora_A[:b]
        o = plain.second.weight + s * pairs[1].lora_B[:, :b] @ pairs[1].lora_A[:b]
        output = torch.tanh(x @ h.T + plain.first.bias) @ o.T + plain.second.bias
        optimizer.zero_grad()
        (output - y).square().mean().backward()
        optimizer.step()
    for one, pair in zip(adapters(ours), pairs, strict=True):
        assert (one.lora_A - pair.lora_A).abs().max() < 1e-13
        assert (one.lora_B - pair.lora_B).abs().max() < 1e-13
        assert one.lora_B.any()


def test_what_lies_behind_the_prefix_gets_a_gradient_of_zero() -> None:
    model = net()
    inject(model, METHOD, seed=1)
    for one in adapters(model):
        nn.init.normal_(one.lora_B)
    schedule = RankSampling(adapters(model))
    while schedule.rank(schedule.step) != 2:
        schedule.after_step(adamw(trainable(model)))
    model(batches(1)[0][0]).square().sum().backward()
    for one in adapters(model):
        assert (one.lora_A.grad[:2] != 0).all()
        assert (one.lora_B.grad[:, :2] != 0).all()
        assert not one.lora_A.grad[2:].any()
        assert not one.lora_B.grad[:, 2:].any()


def test_ranks_are_uniform_and_follow_from_the_seed_and_the_step_alone() -> None:
    model, other = net(), net()
    inject(model, METHOD, seed=1)
    inject(other, METHOD, seed=2)
    one, again, another = (RankSampling(adapters(m)) for m in (model, model, other))
    ranks = [one.rank(t) for t in range(2000)]
    assert [again.rank(t) for t in reversed(range(2000))] == ranks[::-1]
    assert [another.rank(t) for t in range(2000)] != ranks
    counts = Counter(ranks)
    assert set(counts) == {1, 2, 3, 4}
    assert all(abs(count - 500) < 100 for count in counts.values())  # five standard deviations


def test_adapters_of_smaller_rank_take_part_with_all_they_have() -> None:
    model = net()
    inject(model, METHOD, rank_pattern={"second": 2}, seed=1)
    schedule = RankSampling(adapters(model))
    used = set()
    for _ in range(30):
        first, second = adapters(model)
        rank = schedule.rank(schedule.step)
        used.add((rank, int((first.sample != 0).sum()), int((second.sample != 0).sum())))
        assert second.sample.max() * second.scaling == pytest.approx(3 / min(rank, 2))
        schedule.after_step(adamw(trainable(model)))
    assert used == {(1, 1, 1), (2, 2, 2), (3, 3, 2), (4, 4, 2)}


# ---- the last rank only


@pytest.mark.parametrize("build", [adamw, lambda p: SGD(p, lr=0.05, momentum=0.9)], ids=["AdamW", "SGD with momentum"])
def test_frozen_trains_the_bth_row_and_column_each_with_a_history_of_its_own(build: Build) -> None:
    ours, plain = net(), net()
    train(ours, FROZEN, 14, build)
    inject(plain, LoRA(r=4, alpha=3), seed=1)
    pairs = [site.adapter("default") for site in sites(plain)]
    rows = [[nn.Parameter(row.detach().clone()) for row in pair.lora_A] for pair in pairs]
    columns = [[nn.Parameter(column.detach().clone()) for column in pair.lora_B.T] for pair in pairs]
    optimizer, ranks = build([p for one in (*rows, *columns) for p in one]), RankSampling(adapters(ours)).rank
    for t, (x, y) in enumerate(batches(14)):
        b = ranks(t)
        h, o = (
            layer.weight + 3 / b * sum(torch.outer(column, row) for column, row in zip(B[:b], A[:b], strict=True))
            for layer, A, B in zip((plain.first, plain.second), rows, columns, strict=True)
        )
        output = torch.tanh(x @ h.T + plain.first.bias) @ o.T + plain.second.bias
        optimizer.zero_grad()
        (output - y).square().mean().backward()
        for one in (*rows, *columns):
            for i, parameter in enumerate(one):
                if i != b - 1:
                    parameter.grad = None  # the optimizer passes it by
                elif build is adamw:  # whose count of steps is that of the run
                    moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                    optimizer.state[parameter] = {
                        **moments,
                        **optimizer.state[parameter],
                        "step": torch.tensor(float(t)),
                    }
        optimizer.step()
    for adapter, A, B in zip(adapters(ours), rows, columns, strict=True):
        assert (adapter.lora_A - torch.stack(list(A))).abs().max() < 1e-13
        assert (adapter.lora_B - torch.stack(list(B), 1)).abs().max() < 1e-13
        assert (adapter.lora_B.abs().sum(0) > 0).all()


@pytest.mark.parametrize("pattern", [{}, {"second": 2}], ids=["one rank", "a smaller one"])
def test_frozen_leaves_everything_but_the_last_row_and_column_of_the_prefix_bit_for_bit(pattern: Any) -> None:
    model = net()
    inject(model, FROZEN, rank_pattern=pattern, seed=1)
    optimizer = adamw(trainable(model))
    [schedule] = FROZEN.schedules(sites(model), "default")
    for x, y in batches(12):
        b = schedule.rank(schedule.step)
        before = copy.deepcopy(adapters(model))
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        schedule.before_step(optimizer)
        gradients = [(one.lora_A.grad.any(1), one.lora_B.grad.any(0)) for one in adapters(model)]
        optimizer.step()
        schedule.after_step(optimizer)
        for one, earlier, (A, B) in zip(adapters(model), before, gradients, strict=True):
            last = torch.arange(one.method.r) == min(b, one.method.r) - 1
            assert torch.equal((one.lora_A != earlier.lora_A).any(1), last)
            assert torch.equal((one.lora_B != earlier.lora_B).any(0), last)
            assert not (A & ~last).any()
            assert torch.equal(B, last)


def test_frozen_lets_a_frozen_a_be() -> None:
    method = DyLoRA(r=4, alpha=3, freeze_A=True, frozen=True)
    model, start = after(6, method), after(0, method)
    for one, other in zip(adapters(model), adapters(start), strict=True):
        assert torch.equal(one.lora_A, other.lora_A)
        assert one.lora_B.any()


# ---- one model at every rank


@pytest.mark.parametrize("scaling", ["linear", "rsqrt"])
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_a_prefix_is_the_lora_of_its_rank_bit_for_bit(rank: int, scaling: str) -> None:
    method, x = DyLoRA(r=4, alpha=3, scaling=scaling), batches(1)[0][0]  # type: ignore[arg-type]
    model = after(8, method)
    whole = model(x)
    with at_rank(model, rank):
        assert torch.equal(model(x), loras(model, rank, method)(x))
        with merged(model):
            assert torch.allclose(model(x), loras(model, rank, method)(x), rtol=0, atol=1e-12)
    assert torch.equal(model(x), whole)
    assert torch.equal(whole, loras(model, 4, method)(x))
    cut = truncate_(copy.deepcopy(model), rank)
    assert torch.equal(cut(x), loras(model, rank, method)(x))


def test_prefixes_nest_and_end_with_an_exception() -> None:
    model, x = after(8), batches(1)[0][0]
    whole = model(x)
    with at_rank(model, 3):
        third = model(x)
        with at_rank(model, 1):
            assert torch.equal(model(x), loras(model, 1)(x))
        assert torch.equal(model(x), third)
    assert not torch.equal(third, whole)
    with pytest.raises(KeyboardInterrupt), at_rank(model, 3):
        raise KeyboardInterrupt
    assert torch.equal(model(x), whole)


@pytest.mark.parametrize("rank", [2, 4, 9])
def test_what_was_cut_is_saved_as_a_lora_that_peft_loads(rank: int, tmp_path: Path) -> None:
    model, x = nn.Sequential(after(8).float()), batches(1, torch.float32)[0][0]
    by_peft, fresh = nn.Sequential(net(torch.float32)), nn.Sequential(net(torch.float32))
    with at_rank(model, rank):
        expected = model(x)
    save_adapter(truncate_(model, rank), tmp_path / "adapter")
    assert {one.method for one in adapters(model)} == {DyLoRA(r=min(rank, 4), alpha=3)}
    assert {tuple(one.lora_A.shape) for one in adapters(model)} == {(min(rank, 4), 4), (min(rank, 4), 8)}
    theirs = peft.PeftModel.from_pretrained(by_peft, tmp_path / "adapter")
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.allclose(fresh(x), expected, rtol=0, atol=1e-6)  # factors that are cut lie otherwise in memory
    assert torch.allclose(theirs(x), expected, rtol=0, atol=1e-5)
    assert {p.requires_grad for one in adapters(model) for p in one.parameters()} == {True}


# ---- runs


class Recording(Lit):
    """Notes how many columns of B take part in each forward, in training and in validation."""

    def __init__(self) -> None:
        super().__init__()
        self.used: dict[str, list[int]] = {"training": [], "validation": []}

    def on_train_start(self) -> None:
        for one in adapters(self):
            nn.init.normal_(one.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        columns = [int((one.factors()[0] != 0).any(0).sum()) for one in adapters(self)]
        assert len(set(columns)) == 1
        self.used["training" if self.training else "validation"].append(columns[0])
        return super().forward(x)


def test_training_draws_a_rank_for_each_step_and_validation_uses_all(trainer: Any) -> None:
    module = Recording()
    made = trainer(callbacks=[LoRACallback(METHOD)], max_epochs=3, accumulate_grad_batches=2, num_sanity_val_steps=0)
    made.fit(module, loader(8), loader(2))
    ranks = RankSampling(adapters(module)).rank
    expected = [ranks(t) for t in range(12) for _ in range(2)]
    assert module.used["training"] == expected
    assert len(set(expected)) > 2
    assert module.used["validation"] == [4] * 6


def test_after_a_run_training_mode_uses_the_whole_pair(trainer: Any) -> None:
    module, x = Lit(), torch.randn(3, 4)
    run(trainer, module, 5, METHOD)
    assert torch.equal(module.train()(x), module.eval()(x))
    assert all(one.sample is None for one in adapters(module))


@both
@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_run_equals_the_uninterrupted_one(stop: int, method: DyLoRA, trainer: Any, tmp_path: Path) -> None:
    whole, part, rest = Lit(), Lit(), Lit()
    run(trainer, whole, 9, method)
    run(trainer, part, stop, method).save_checkpoint(tmp_path / "a.ckpt")
    run(trainer, rest, 9, method, ckpt_path=tmp_path / "a.ckpt")
    assert part.losses + rest.losses == whole.losses
    assert same(rest.state_dict(), whole.state_dict())


def test_a_run_resumed_with_another_seed_goes_on_with_the_first_ones_ranks(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, part, rest = Lit(), Lit(), Lit()
    run(trainer, whole, 9, METHOD)
    run(trainer, part, 4, METHOD).save_checkpoint(tmp_path / "a.ckpt")
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    run(trainer, rest, 9, METHOD, ckpt_path=tmp_path / "a.ckpt")
    assert part.losses + rest.losses == whole.losses


@both
def test_accumulated_gradients_make_the_same_run(method: DyLoRA, trainer: Any) -> None:
    whole, parts = Lit(), Lit()
    trainer(callbacks=[LoRACallback(method)], max_epochs=3).fit(whole, loader(4, 4))
    trainer(callbacks=[LoRACallback(method)], max_epochs=3, accumulate_grad_batches=2).fit(parts, loader(8, 2))
    for name, value in whole.state_dict().items():
        assert torch.allclose(parts.state_dict()[name], value, rtol=0, atol=1e-5)


def test_a_compiled_model_is_compiled_once_for_all_ranks() -> None:
    model, counter = net(), CompileCounter()
    inject(model, METHOD, seed=1)
    schedule = RankSampling(adapters(model))
    torch._dynamo.reset()
    compiled, ranks = torch.compile(model, backend=counter), set()
    for x, _ in batches(12):
        for one in adapters(model):
            nn.init.normal_(one.lora_B)
        assert torch.allclose(compiled(x), model(x), rtol=0, atol=1e-12)
        ranks.add(schedule.rank(schedule.step))
        schedule.after_step(adamw(trainable(model)))
    assert len(ranks) == 4
    assert counter.frame_count == 1
    assert trained(model)
