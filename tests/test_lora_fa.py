"""LoRA-FA's promises: A never moves, next to nothing is kept for the backward pass, and what B alone can reach."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from conftest import Lit, loader
from torch import Tensor, nn

from lightning_lora import LoRA, LoRACallback, LoRAFA, inject, load_adapter, param_groups, save_adapter, sites


def data(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def block(**fields: Any) -> nn.Module:
    """Three layers as a transformer's feed-forward part has them, so that each input is an activation."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.Linear(64, 64))
    method = fields.pop("method", None)
    if method is None:
        return model.requires_grad_(False)
    inject(model, method(r=4, **fields))
    return model


def saved_bytes(model: nn.Module) -> int:
    """What the forward keeps for the backward pass, weights left out."""
    own = {parameter.data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(4, 128, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(x)
    return sum(found.values())


def test_what_is_kept_for_the_backward_pass_is_that_of_the_frozen_model_and_a_few_numbers_per_token() -> None:
    frozen, plain, fa = saved_bytes(block()), saved_bytes(block(method=LoRA)), saved_bytes(block(method=LoRAFA))
    tokens, layers, r, bytes_each = 4 * 128, 3, 4, 4
    assert frozen <= fa <= frozen + tokens * layers * r * bytes_each
    assert plain - fa == tokens * (64 + 256 + 64) * bytes_each


def test_dropout_takes_a_byte_of_the_saving_for_each_element_and_is_warned_of(
    trainer: Callable[..., L.Trainer],
) -> None:
    dropped, fa = saved_bytes(block(method=LoRAFA, dropout=0.1)), saved_bytes(block(method=LoRAFA))
    assert dropped - fa == 4 * 128 * (64 + 256 + 64)
    with pytest.warns(UserWarning, match=r"dropout=0.1: with dropout the adapter keeps a mask of its whole input"):
        trainer(callbacks=[LoRACallback(LoRAFA(r=2, dropout=0.1))], max_steps=1).fit(Lit(), loader(1))


@pytest.mark.parametrize("gradient", ["plain", "fa"])
def test_A_is_bitwise_what_it_was_has_no_gradient_and_no_optimizer_state(
    gradient: Any, trainer: Callable[..., L.Trainer]
) -> None:
    module, start = Lit(), Lit()
    run = trainer(callbacks=[LoRACallback(LoRAFA(r=2, gradient=gradient))])
    run.fit(module, loader())
    inject(start, LoRAFA(r=2), seed=0)
    for site, before in zip(sites(module), sites(start), strict=True):
        adapter = site.adapter("default")
        assert torch.equal(adapter.lora_A, before.adapter("default").lora_A)
        assert adapter.lora_A.grad is None
        assert adapter.lora_B.abs().sum() > 0
    [optimizer] = run.optimizers
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(p) for p in held} == {id(site.adapter("default").lora_B) for site in sites(module)}
    assert len(optimizer.state) == 2


def test_only_the_columns_of_B_are_trained() -> None:
    model = block(method=LoRAFA)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4 * (256 + 64 + 64)
    [group] = param_groups(model, lr=1e-3)
    assert group["name"] == "lora_B"


def test_the_gradient_of_B_is_the_weights_times_A() -> None:
    layer, x = nn.Sequential(nn.Linear(6, 5, dtype=torch.float64)), data(7, 6)
    [site] = inject(layer, LoRAFA(r=2, alpha=3))
    layer(x).square().sum().backward()
    G = 2 * (layer(x).detach()).mT @ x
    adapter: Any = site.adapter("default")
    assert torch.allclose(adapter.lora_B.grad, 1.5 * G @ adapter.lora_A.mT, atol=1e-12)


def test_a_step_of_sgd_with_the_second_version_moves_the_weight_by_the_projected_gradient() -> None:
    layer, x = nn.Sequential(nn.Linear(6, 5, dtype=torch.float64)), data(7, 6)
    method = LoRAFA(r=2, alpha=3, gradient="fa")
    [site] = inject(layer, method)
    adapter: Any = site.adapter("default")
    optimizer = torch.optim.SGD([adapter.lora_B], lr=1e-3)
    G = 2 * (layer(x).detach()).mT @ x
    layer(x).square().sum().backward()
    method.schedules([site], "default")[0].before_step(optimizer)
    optimizer.step()
    A = adapter.lora_A.detach()
    P_A = A.mT @ torch.linalg.inv(A @ A.mT) @ A
    assert torch.allclose(adapter.delta(), -1e-3 * G @ P_A, atol=1e-9)
    assert torch.allclose((adapter.delta() + 1e-3 * G) @ A.mT, torch.zeros(5, 2, dtype=torch.float64), atol=1e-8)


def test_the_best_reachable_change_misses_exactly_what_is_orthogonal_to_A() -> None:
    target, r, width = data(40, 64), 8, 64
    layer = nn.Sequential(nn.Linear(width, 40, bias=False, dtype=torch.float64))
    [site] = inject(layer, LoRAFA(r=r), seed=3)
    A = site.adapter("default").lora_A.detach()
    best = torch.linalg.lstsq(A.mT, target.mT).solution.mT  # of B, over all there are
    P_A = A.mT @ torch.linalg.inv(A @ A.mT) @ A
    floor = (target - target @ P_A).norm() / target.norm()
    assert torch.allclose((best @ A - target).norm() / target.norm(), floor)
    assert float(floor) == pytest.approx(math.sqrt(1 - r / width), rel=0.02)  # of a random A
    X = data(200, width)
    optimizer = torch.optim.SGD(site.adapter("default").parameters(), lr=1e-3)
    schedule = LoRAFA(r=r, gradient="fa").schedules([site], "default")[0]
    with torch.no_grad():
        base = layer(X) + X @ target.mT
    for _ in range(150):
        optimizer.zero_grad()
        (layer(X) - base).square().sum(-1).mean().backward()
        schedule.before_step(optimizer)
        for group in optimizer.param_groups:
            group["lr"] = 0.2
        optimizer.step()
    reached = (site.adapter("default").delta().detach() - target).norm() / target.norm()
    assert float(floor) <= float(reached) < 1.1 * float(floor)


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_a_folder_says_that_A_is_frozen(init: Any, tmp_path: Path) -> None:
    model, fresh = Lit().net, Lit().net
    inject(model, LoRAFA(r=2, init=init, gradient="fa"))
    for site in sites(model):
        site.adapter("default").lora_B.data.add_(1)
    save_adapter(model, tmp_path / "adapter")
    load_adapter(fresh, tmp_path / "adapter")
    for site, other in zip(sites(model), sites(fresh), strict=True):
        ours, theirs = site.adapter("default"), other.adapter("default")
        assert theirs.method == LoRAFA(r=2, init=init, gradient="fa")
        assert not theirs.lora_A.requires_grad
        assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())


def test_a_kept_start_of_a_frozen_A_is_B_alone_and_the_change_has_the_pairs_own_rank() -> None:
    model = Lit().net
    inject(model, LoRAFA(r=2, init="pissa"))
    for site in sites(model):
        adapter = site.adapter("default")
        assert list(adapter.state_dict()) == ["lora_A", "lora_B", "lora_B0"]
        assert adapter.factors()[1] is adapter.lora_A
        assert not adapter.delta().any()


@pytest.mark.parametrize("r", [1, 2])
def test_lora_fa_is_lora_whose_A_is_frozen(r: int) -> None:
    one, other = Lit().net, Lit().net
    inject(one, LoRAFA(r=r), seed=1)
    inject(other, LoRA(r=r, freeze_A=True), seed=1)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    assert [p.requires_grad for p in one.parameters()] == [p.requires_grad for p in other.parameters()]


def test_lora_plus_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="LoRA-FA freezes A, so lr_B/lr_A has no denominator: raise lr instead"):
        LoRACallback(LoRAFA(), lr_ratio=16)
    model = block(method=LoRAFA)
    with pytest.raises(ValueError, match="raise lr instead"):
        param_groups(model, lr=1e-3, lr_ratio=16)
