"""Gradients changed before the step: what the weight moves by, against formulas in float64 and against PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import peft
import peft.optimizers.lorafa
import pytest
import torch
from conftest import Lit, loader
from torch import Tensor, nn

from lightning_lora import LoRA, LoRACallback, LoRAFA, inject, sites
from lightning_lora.preconditioners import fa, inverse, lora_pro, riemannian, sylvester

S, R = 1.5, 3
METHODS = {
    "fa": LoRAFA(r=2, gradient="fa"),
    "riemannian": LoRA(r=2, gradient="riemannian"),
    "lora_pro": LoRA(r=2, gradient="lora_pro"),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


def data(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


A, B, G = data(R, 8), data(6, R), data(6, 8)
G_A, G_B = S * B.mT @ G, S * G @ A.mT
P_A, P_B = A.mT @ torch.linalg.inv(A @ A.mT) @ A, B @ torch.linalg.inv(B.mT @ B) @ B.mT
EYE_A, EYE_B = torch.eye(8, dtype=torch.float64), torch.eye(6, dtype=torch.float64)


def step(g_A: Tensor, g_B: Tensor) -> Tensor:
    """What a small step along the gradients moves the weight by."""
    return S * (B @ g_A + g_B @ A)


# ---- formulas


def test_fa_moves_the_weight_by_the_projection_of_its_gradient() -> None:
    moved = S * fa(torch.linalg.inv(A @ A.mT), G_B, S) @ A
    assert torch.allclose(moved, G @ P_A, atol=1e-13)
    assert (moved @ A.mT - G @ A.mT).abs().max() < 1e-12  # what is left is orthogonal to the rows of A


def test_lora_pro_leaves_exactly_what_no_step_of_the_pair_can_reach() -> None:
    left = G - step(*lora_pro(A, B, G_A, G_B, S))
    assert torch.allclose(left, (EYE_B - P_B) @ G @ (EYE_A - P_A), atol=1e-6)
    assert left.norm() < (G - step(G_A, G_B) * (G * step(G_A, G_B)).sum() / step(G_A, G_B).square().sum()).norm()


def test_lora_pro_is_of_all_such_gradients_the_nearest_to_the_plain_ones() -> None:
    g_A, g_B = lora_pro(A, B, G_A, G_B, S)
    best = (g_A - G_A).square().sum() + (g_B - G_B).square().sum()
    for seed in range(5):
        X = 0.01 * torch.randn(R, R, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        other_A, other_B = g_A + X @ A, g_B - B @ X
        assert torch.allclose(step(other_A, other_B), step(g_A, g_B), atol=1e-12)
        assert (other_A - G_A).square().sum() + (other_B - G_B).square().sum() > best


def test_the_riemannian_step_without_damping_depends_on_the_product_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_lora.preconditioners._DAMPING", 0.0)
    M = data(R, R)
    g_A, g_B = riemannian(A, B, G_A, G_B, S)
    other_A, other_B = torch.linalg.inv(M) @ A, B @ M
    h_A, h_B = riemannian(other_A, other_B, S * other_B.mT @ G, S * G @ other_A.mT, S)
    assert torch.allclose(B @ g_A + g_B @ A, other_B @ h_A + h_B @ other_A, atol=1e-10)


def test_sylvester_solves_its_equation() -> None:
    left, right, target = B.mT @ B, A @ A.mT, data(R, R)
    X = sylvester(left, right, target)
    assert torch.allclose(left @ X + X @ right, target, atol=1e-12)


@pytest.mark.parametrize("function", [riemannian, lora_pro])
def test_stacks_are_changed_matrix_by_matrix(function: Any) -> None:
    stacked = [torch.stack([one, 2 * one]) for one in (A, B, G_A, G_B)]
    both = function(*stacked, S)
    for i in range(2):
        for whole, one in zip(both, function(*(x[i] for x in stacked), S), strict=True):
            assert torch.allclose(whole[i], one, atol=1e-12)


@pytest.mark.parametrize("rank_of_B", [0, 1, R])
def test_gradients_are_finite_where_B_has_less_than_full_rank(rank_of_B: int) -> None:
    for dtype in (torch.float32, torch.float64):
        low = (data(6, rank_of_B) @ data(rank_of_B, R) if rank_of_B else torch.zeros(6, R)).to(dtype)
        g_A, g_B = S * low.mT @ G.to(dtype), G_B.to(dtype)
        for function in (riemannian, lora_pro):
            changed = function(A.to(dtype), low, g_A, g_B, S)
            assert all(bool(torch.isfinite(one).all()) for one in changed)
            if rank_of_B == 0:
                assert not changed[0].any()
                assert changed[1].any()
    assert torch.isfinite(inverse(torch.zeros(2, 2), 1e-8)).all()


def test_lora_pro_at_B_zero_is_lora_fa() -> None:
    g_A, g_B = lora_pro(A, torch.zeros_like(B), torch.zeros_like(A), G_B, S)
    assert not g_A.any()
    assert torch.allclose(g_B, fa(torch.linalg.inv(A @ A.mT), G_B, S), atol=1e-9)


# ---- in training


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.second = nn.Linear(6, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, schedules: list[Any], steps: int = 5) -> None:
    x, y = data(8, 6, dtype=torch.float32), data(8, 5, dtype=torch.float32)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        for schedule in schedules:
            schedule.before_step(optimizer)
        optimizer.step()
        for schedule in schedules:
            schedule.after_step(optimizer)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def like(theirs: nn.Module, model: nn.Module) -> None:
    """Give PEFT's layers the factors of ours."""
    for site in sites(model):
        layer: Any = theirs.get_submodule(f"base_model.model.{site.name.partition('.')[0]}")
        layer.lora_A["default"].weight.data.copy_(site.adapter("default").lora_A.data)
        layer.lora_B["default"].weight.data.copy_(site.adapter("default").lora_B.data)


def in_peft() -> Any:
    return peft.get_peft_model(Mlp(), peft.LoraConfig(r=2, lora_alpha=6, target_modules=["first", "second"]))


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_five_riemannian_steps_are_those_of_peft(kind: str) -> None:
    from peft.optimizers.riemannian import create_riemannian_optimizer

    cls: Any = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[kind]
    method = LoRA(r=2, alpha=6, gradient="riemannian")
    model, theirs = Mlp(), in_peft()
    inject(model, method)
    like(theirs, model)
    train(model, cls(trained(model), lr=1e-2), method.schedules(sites(model), "default"))
    train(theirs, create_riemannian_optimizer(theirs, cls, lr=1e-2), [])
    x = data(8, 6, dtype=torch.float32)
    assert torch.allclose(model(x), theirs(x), atol=1e-5)
    assert not torch.allclose(model(x), Mlp()(x), atol=1e-3)


def test_five_steps_of_lora_fa_are_those_of_peft_without_its_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT multiplies by the inverse in bf16 where it can. The rest of its step is AdamW with eps at another place."""
    monkeypatch.setattr(peft.optimizers.lorafa, "is_bf16_available", lambda: False)
    method = LoRAFA(r=2, alpha=6, gradient="fa")
    model, theirs = Mlp(), in_peft()
    inject(model, method)
    like(theirs, model)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2, eps=1e-20, weight_decay=0)
    their_optimizer = peft.optimizers.create_lorafa_optimizer(theirs, r=2, lora_alpha=6, lr=1e-2)
    for group in their_optimizer.param_groups:
        group["eps"] = 1e-20
    train(model, optimizer, method.schedules(sites(model), "default"))
    train(theirs, their_optimizer, [])
    x = data(8, 6, dtype=torch.float32)
    assert torch.allclose(model(x), theirs(x), atol=1e-4)
    assert not torch.allclose(model(x), Mlp()(x), atol=1e-3)


@every_method
def test_every_method_learns(method: LoRA, trainer: Callable[..., L.Trainer]) -> None:
    module = Lit()
    trainer(callbacks=[LoRACallback(method)], max_epochs=8).fit(module, loader())
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert sum(module.losses[-4:]) < 0.9 * sum(module.losses[:4])


@every_method
def test_the_trainer_takes_the_steps_of_the_loop_by_hand(method: LoRA, trainer: Callable[..., L.Trainer]) -> None:
    module = Lit()
    trainer(callbacks=[LoRACallback(method)], max_epochs=1).fit(module, loader())
    other = Lit()
    inject(other, method, seed=0)
    optimizer = torch.optim.AdamW(trained(other), lr=0.01)
    schedules = method.schedules(sites(other), "default")
    for batch in loader():
        optimizer.zero_grad()
        other.loss(batch).backward()
        schedules[0].before_step(optimizer)
        optimizer.step()
    for name, value in other.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name


@every_method
def test_accumulated_batches_are_one_whole_batch(method: LoRA, trainer: Callable[..., L.Trainer]) -> None:
    small, whole = Lit(), Lit()
    trainer(callbacks=[LoRACallback(method)], accumulate_grad_batches=2, max_epochs=3).fit(small, loader(4, 4))
    trainer(callbacks=[LoRACallback(method)], max_epochs=3).fit(whole, loader(2, 8))
    for name, value in small.state_dict().items():
        assert torch.allclose(value, whole.state_dict()[name], atol=1e-3), name


@every_method
def test_clipping_comes_after(method: LoRA, trainer: Callable[..., L.Trainer]) -> None:
    norms: list[float] = []

    class Seen(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            norms.append(
                float(torch.stack([p.grad.norm() for p in pl_module.parameters() if p.grad is not None]).norm())
            )

    run = trainer(callbacks=[LoRACallback(method), Seen()], gradient_clip_val=0.01, max_epochs=1)
    run.fit(Lit(), loader())
    assert all(norm <= 0.01 * (1 + 1e-4) for norm in norms)


@every_method
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    method: LoRA, trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    whole, half, rest = (trainer(callbacks=[LoRACallback(method)], max_epochs=epochs) for epochs in (2, 1, 2))
    modules = [Lit(), Lit(), Lit()]
    whole.fit(modules[0], loader())
    half.fit(modules[1], loader())
    half.save_checkpoint(tmp_path / "half.ckpt")
    rest.fit(modules[2], loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for name, value in modules[0].state_dict().items():
        assert torch.equal(value, modules[2].state_dict()[name]), name


def test_a_pair_without_gradients_is_left_alone() -> None:
    for method in METHODS.values():
        model = Mlp()
        inject(model, method)
        [schedule] = method.schedules(sites(model), "default")
        schedule.before_step(torch.optim.SGD(trained(model), lr=0.1))
        assert all(parameter.grad is None for parameter in model.parameters())


def test_a_pair_of_several_layers_is_changed_once() -> None:
    method = METHODS["riemannian"]
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inject(model, method)
    one, other = (site.adapter("default") for site in sites(model))
    other.lora_A, other.lora_B = one.lora_A, one.lora_B
    [schedule] = method.schedules(sites(model), "default")
    one.lora_A.grad, one.lora_B.grad = torch.zeros(2, 4), torch.ones(4, 2)
    schedule.before_step(torch.optim.SGD(trained(model), lr=0.1))
    expected = torch.ones(4, 2) @ torch.linalg.inv(one.lora_A @ one.lora_A.mT + 0.01 * torch.eye(2))
    assert torch.allclose(one.lora_B.grad, expected, rtol=1e-4)


def test_bf16_adapters_are_changed_in_single_precision() -> None:
    method = METHODS["lora_pro"]
    model = Mlp()
    inject(model, method, dtype=torch.bfloat16)
    train(model, torch.optim.SGD(trained(model), lr=1e-3), method.schedules(sites(model), "default"))
    assert {p.dtype for p in trained(model)} == {torch.bfloat16}
    assert all(torch.isfinite(p).all() for p in trained(model))
