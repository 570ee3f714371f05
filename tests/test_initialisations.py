"""How LoRA's factors start: what each start is, that the model starts as its base, and PEFT's numbers beside ours."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import peft
import pytest
import torch
from conftest import Lit, loader
from torch import Tensor, nn

from lightning_lora import (
    AdaLoRA,
    DeltaLoRA,
    DoRA,
    DyLoRA,
    HiRA,
    LoRA,
    LoRACallback,
    LoRADrop,
    LoRAFA,
    ReLoRA,
    inject,
    load_adapter,
    merged,
    offline,
    save_adapter,
    sites,
    start_from_data,
    using,
)
from lightning_lora.initialisations import (
    KEEPS_START,
    eva_ranks,
    fast_pissa,
    from_weight,
    lora_ga,
    milora,
    olora,
    pissa,
)

every_kept_start = pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "milora", "olora"])


class Mlp(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 9, dtype=dtype), nn.Linear(9, 5, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def mlp(dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(4)
    return Mlp(dtype)


def data(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def adapted(init: Any, dtype: torch.dtype = torch.float64, **fields: Any) -> Any:
    model = mlp(dtype)
    inject(model, LoRA(r=2, alpha=6, init=init, **fields), seed=1)
    return model


def change(model: nn.Module) -> None:
    with torch.no_grad():
        for site in sites(model):
            for name in ("lora_A", "lora_B"):
                parameter = getattr(site.adapter("default"), name)
                parameter.add_(0.1 * data(*parameter.shape))


# ---- what the starts are


def test_gaussian_draws_a_with_deviation_one_over_the_rank_and_sets_b_to_zero() -> None:
    model = nn.Sequential(nn.Linear(4000, 3))
    (site,) = inject(model, LoRA(r=4, init="gaussian"), seed=0)
    adapter = site.adapter("default")
    assert adapter.lora_A.std().item() == pytest.approx(1 / 4, rel=0.02)
    assert not adapter.lora_B.any()


def test_orthogonal_starts_both_factors_off_zero_with_a_product_of_zero() -> None:
    model = adapted("orthogonal")
    for site in sites(model):
        adapter = site.adapter("default")
        assert adapter.lora_A.std() > 0.01
        assert adapter.lora_B.std() > 0.01
        assert (adapter.lora_B @ adapter.lora_A).abs().max() < 1e-16


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (3, 6, 4)], ids=["tall", "wide", "stack"])
def test_pissa_takes_the_best_approximation_of_the_weight_with_its_singular_values_halved_between_the_factors(
    shape: tuple[int, ...],
) -> None:
    weight, s, r = data(*shape), 3.0, 2
    A, B = pissa(weight, r, s)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    best = U[..., :r] @ torch.diag_embed(S[..., :r]) @ Vh[..., :r, :]
    assert torch.allclose(s * B @ A, best, atol=1e-14)
    assert torch.allclose(A @ A.mT, torch.diag_embed(S[..., :r] / s), atol=1e-14)
    assert torch.allclose(B.mT @ B, torch.diag_embed(S[..., :r] / s), atol=1e-14)


@pytest.mark.parametrize("shape", [(90, 60), (60, 90), (2, 60, 90)], ids=["tall", "wide", "stack"])
def test_a_fast_pissa_comes_as_close_to_the_exact_singular_values_as_its_rounds_go(shape: tuple[int, ...]) -> None:
    weight, s, r = data(*shape), 3.0, 4
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    best = U[..., :r] @ torch.diag_embed(S[..., :r]) @ Vh[..., :r, :]
    values, parts = [], []
    for rounds in (0, 4, 64):
        A, B = fast_pissa(weight, r, s, rounds=rounds, seed=1)
        assert torch.allclose(A @ A.mT, B.mT @ B, atol=1e-12)
        values.append(((s * torch.diagonal(A @ A.mT, dim1=-2, dim2=-1) / S[..., :r]) - 1).abs().max().item())
        parts.append(((s * B @ A - best).norm() / best.norm()).item())
    assert values == sorted(values, reverse=True)
    assert parts == sorted(parts, reverse=True)
    assert values[0] > 0.1  # a random matrix has no few directions that stand out
    assert values[1] < 0.02
    assert values[2] < 1e-6
    assert parts[2] < 1e-3


def test_a_fast_pissa_is_exact_where_few_directions_stand_out_and_where_it_takes_all() -> None:
    for weight in (data(90, 4) @ data(4, 60), data(12, 9)):
        (A, B), (exact_A, exact_B) = fast_pissa(weight, 3, 2.0, rounds=1, seed=1), pissa(weight, 3, 2.0)
        assert torch.allclose(B @ A, exact_B @ exact_A, atol=1e-11)


def test_the_directions_of_a_fast_pissa_are_the_adapters_own_and_draw_nothing_from_the_run() -> None:
    starts = []
    for seed in (1, 1, 2):
        torch.manual_seed(4)
        model = nn.Sequential(nn.Linear(60, 90))
        torch.manual_seed(len(starts))
        before = torch.random.get_rng_state()
        [site] = inject(model, LoRA(r=3, init="pissa_niter_2"), seed=seed)
        assert torch.equal(torch.random.get_rng_state(), before)
        adapter = site.adapter("default")
        starts.append(adapter.lora_A.detach())
        expected = fast_pissa(model[0].weight, 3, adapter.scaling, rounds=2, seed=adapter.seed)[0]
        assert torch.equal(starts[-1], expected)
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_milora_takes_what_the_best_approximation_of_the_complementary_rank_leaves() -> None:
    weight, s, r = data(7, 5), 3.0, 2
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    A, B = milora(weight, r, s)
    assert torch.allclose(s * B @ A, weight - U[:, :3] @ S[:3].diag() @ Vh[:3], atol=1e-14)
    assert torch.allclose(A @ A.mT, (S[3:] / s).diag(), atol=1e-14)


def test_olora_takes_orthonormal_columns_and_a_triangle_that_give_the_weights_first_columns() -> None:
    weight = data(7, 5)
    A, B = olora(weight, 2, 3.0)
    assert torch.allclose(B.mT @ B, torch.eye(2, dtype=torch.float64), atol=1e-14)
    assert torch.allclose((B @ A)[:, :2], weight[:, :2], atol=1e-14)
    assert not A.tril(-1).any()


@every_kept_start
def test_a_start_in_half_precision_is_computed_in_single(init: str) -> None:
    A, B = from_weight(init, 0)(data(7, 5, dtype=torch.bfloat16), 2, 1.0)
    assert A.dtype == B.dtype == torch.float32


# ---- the model starts as its base, and computes what the papers compute on a changed base


@every_kept_start
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_model_starts_as_its_base_bit_for_bit_and_the_base_is_never_written(init: str, dtype: torch.dtype) -> None:
    model, plain, x = adapted(init, dtype), mlp(dtype), data(3, 6, dtype=dtype)
    assert torch.equal(model(x), plain(x))
    change(model)
    assert not torch.equal(model(x), plain(x))
    with using(model):
        assert torch.equal(model(x), plain(x))
    assert all(torch.equal(model.get_parameter(name), value) for name, value in plain.named_parameters())
    with merged(model):
        pass
    assert all(torch.equal(model.get_parameter(name), value) for name, value in plain.named_parameters())


@every_kept_start
@pytest.mark.parametrize("scaling", ["linear", "rsqrt"])
def test_outputs_and_gradients_are_those_of_lora_on_the_papers_residual(init: str, scaling: Any) -> None:
    model, residual, x = adapted(init, scaling=scaling), mlp().requires_grad_(False), data(3, 6)
    factors = {}
    for site in sites(model):
        adapter, name = site.adapter("default"), site.name.partition(".")[0]
        layer = getattr(residual, name)
        layer.weight.data -= adapter.scaling * adapter.lora_B.data @ adapter.lora_A.data
        assert adapter.scaling == 6 / (2 if scaling == "linear" else math.sqrt(2))
    change(model)
    for site in sites(model):
        adapter, name = site.adapter("default"), site.name.partition(".")[0]
        A, B = (p.detach().clone().requires_grad_() for p in (adapter.lora_A, adapter.lora_B))
        layer, factors[name] = getattr(residual, name), (A, B)
        weight = layer.weight.data + adapter.scaling * B @ A
        del layer._parameters["weight"]
        layer.weight = weight
    assert torch.allclose(model(x), residual(x), rtol=0, atol=1e-13)
    model(x).square().sum().backward()
    residual(x).square().sum().backward()
    for site in sites(model):
        adapter, (A, B) = site.adapter("default"), factors[site.name.partition(".")[0]]
        assert torch.allclose(adapter.lora_A.grad, A.grad, rtol=0, atol=1e-12)
        assert torch.allclose(adapter.lora_B.grad, B.grad, rtol=0, atol=1e-12)
        assert adapter.lora_A0.grad is adapter.lora_B0.grad is None


@every_kept_start
def test_the_start_of_an_embedding_is_that_of_its_matrix(init: str) -> None:
    model = nn.Sequential(nn.Embedding(9, 6, dtype=torch.float64))
    (site,) = inject(model, LoRA(r=2, init=init), ["0"])
    adapter, index = site.adapter("default"), torch.arange(9)
    start = adapter.scaling * adapter.lora_B @ adapter.lora_A
    expected = from_weight(init, adapter.seed)(model[0].weight, 2, adapter.scaling)
    assert torch.allclose(start, adapter.scaling * expected[1] @ expected[0], atol=1e-14)
    assert torch.equal(model(index), model[0].weight)


@every_kept_start
def test_a_rank_beyond_the_matrix_is_refused_before_anything_is_changed(init: str) -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"second.weight: r=6: init='\w+' takes 6 directions .* 5 x 9"):
        inject(model, LoRA(r=6, init=init))
    assert not sites(model)
    assert type(model.first) is nn.Linear
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert len(inject(model, LoRA(r=6, init=init), rank_pattern={"second": 5})) == 2


def test_every_task_has_its_own_start_of_the_same_base() -> None:
    model, plain, x = adapted("pissa"), mlp(), data(3, 6)
    change(model)
    inject(model, LoRA(r=3, init="olora"), task="second")
    with using(model, "second"):
        assert torch.equal(model(x), plain(x))
    one = adapted("pissa")
    change(one)
    with using(model, "default"):
        assert torch.equal(model(x), one(x))


@every_kept_start
def test_a_base_that_gets_its_values_after_the_injection_gives_the_start_at_the_first_forward(init: Any) -> None:
    with torch.device("meta"):
        model = Mlp()
    inject(model, LoRA(r=2, alpha=6, init=init), seed=1)
    model.to_empty(device="cpu").load_state_dict(mlp().state_dict(), strict=False)
    x = data(3, 6)
    assert torch.equal(model(x), mlp()(x))
    for site, other in zip(sites(model), sites(adapted(init)), strict=True):
        assert torch.equal(site.adapter("default").lora_A, other.adapter("default").lora_A)


# ---- files


@every_kept_start
def test_a_folder_gives_back_factors_and_start_bit_for_bit(init: Any, tmp_path: Path) -> None:
    model, fresh = adapted(init, torch.float32), mlp(torch.float32)
    change(model)
    save_adapter(model, tmp_path / "adapter")
    load_adapter(fresh, tmp_path / "adapter")
    for site, other in zip(sites(model), sites(fresh), strict=True):
        ours, theirs = site.adapter("default"), other.adapter("default")
        assert ours.method == theirs.method
        assert list(ours.state_dict()) == ["lora_A", "lora_B", "lora_A0", "lora_B0"]
        assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
        assert [p.requires_grad for p in theirs.parameters()] == [True, True, False, False]


@every_kept_start
@pytest.mark.parametrize("scaling", ["linear", "rsqrt"])
def test_peft_reads_the_folder_as_a_lora_of_twice_the_rank_that_computes_the_same(
    init: Any, scaling: Any, tmp_path: Path
) -> None:
    model, x = mlp(torch.float32), data(3, 6, dtype=torch.float32)
    inject(model, LoRA(r=2, alpha=6, init=init, scaling=scaling), rank_pattern={"second": 3}, alpha_pattern={"*": 5})
    change(model)
    save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert sorted([config["r"], *config["rank_pattern"].values()]) == [4, 6]
    theirs = peft.PeftModel.from_pretrained(mlp(torch.float32), str(tmp_path / "adapter"))
    assert torch.allclose(theirs(x), model(x), atol=1e-5)
    assert not torch.allclose(theirs(x), mlp(torch.float32)(x), atol=1e-2)


def test_the_portable_form_has_twice_the_rank(tmp_path: Path) -> None:
    model, x = adapted("pissa", torch.float32), data(3, 6, dtype=torch.float32)
    change(model)
    save_adapter(model, tmp_path / "adapter")
    offline.export(tmp_path / "adapter", tmp_path / "portable")
    theirs = peft.PeftModel.from_pretrained(mlp(torch.float32), str(tmp_path / "portable"))
    assert json.loads((tmp_path / "portable" / "adapter_config.json").read_text())["r"] == 4
    assert torch.allclose(theirs(x), model(x), atol=1e-5)


@every_kept_start
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    init: Any, trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    def run(**options: Any) -> L.Trainer:
        return trainer(callbacks=[LoRACallback(LoRA(r=2, init=init))], **options)

    whole, half, rest = run(max_epochs=2), run(max_epochs=1), run(max_epochs=2)
    modules = [Lit(), Lit(), Lit()]
    whole.fit(modules[0], loader())
    half.fit(modules[1], loader())
    half.save_checkpoint(tmp_path / "half.ckpt")
    rest.fit(modules[2], loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    one, other = modules[0].state_dict(), modules[2].state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# ---- PEFT


def in_peft(init: str, **fields: Any) -> Any:
    config = peft.LoraConfig(r=2, lora_alpha=6, init_lora_weights=init, target_modules=["first", "second"], **fields)
    return peft.get_peft_model(mlp(torch.float32), config)


def pairs(model: nn.Module, theirs: Any) -> list[tuple[Tensor, Tensor]]:
    """Every factor of ours with PEFT's."""
    found = []
    for site in sites(model):
        layer = theirs.get_submodule(f"base_model.model.{site.name.partition('.')[0]}")
        adapter = site.adapter("default")
        found += [(adapter.lora_A, layer.lora_A["default"].weight), (adapter.lora_B, layer.lora_B["default"].weight)]
    return found


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_factors_and_five_steps_of_adamw_are_those_of_peft(init: Any, use_rslora: bool) -> None:
    model = adapted(init, torch.float32, scaling="rsqrt" if use_rslora else "linear")
    theirs = in_peft(init, use_rslora=use_rslora)
    x, y = data(8, 6, dtype=torch.float32), data(8, 5, dtype=torch.float32)
    for ours, other in pairs(model, theirs):  # the sign of a singular vector is free, but the same routine gave both
        assert torch.allclose(ours, other, atol=1e-6)
    for one in (model, theirs):
        optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.mse_loss(one(x), y).backward()
            optimizer.step()
    for ours, other in pairs(model, theirs):
        assert torch.allclose(ours, other, atol=1e-4)
    assert torch.allclose(model(x), theirs(x), atol=1e-4)


def test_orthogonal_of_peft_has_the_same_form() -> None:
    theirs = in_peft("orthogonal")
    for _, factor in pairs(adapted("orthogonal"), theirs):
        assert factor.any()
    layer = theirs.base_model.model.first
    assert (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).abs().max() < 1e-7


def test_only_starts_with_a_product_that_is_not_zero_are_kept() -> None:
    for init in ("kaiming", "gaussian", "orthogonal", *KEEPS_START):
        names = list(sites(adapted(init))[0].adapter("default").state_dict())
        assert names == ["lora_A", "lora_B", "lora_A0", "lora_B0"][: 4 if init in KEEPS_START else 2]


def test_copies_keep_what_an_adapter_waits_for() -> None:
    with torch.device("meta"):
        model = Mlp()
    inject(model, LoRA(r=2, init="pissa"))
    assert all(site.adapter("default").waits_for_weight for site in sites(copy.deepcopy(model)))


# ---- starts that look at data


def batches(count: int = 3) -> list[Tensor]:
    """Inputs that lie mostly in a few directions."""
    mix = data(6, 6) * torch.tensor([5.0, 3.0, 1.0, 0.3, 0.1, 0.1], dtype=torch.float64)[:, None]
    return [data(10 + i, 6) @ mix for i in range(count)]


def squares(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda batch: model(batch).square().mean()


def started(init: Any, method: Any = LoRA, count: int = 3, **fields: Any) -> Any:
    """Started from all of the batches."""
    model = mlp()
    inject(model, method(r=2, alpha=6, init=init, init_similarity=1.0, **fields), seed=1)
    assert start_from_data(model, batches(count), squares(model)) == []
    return model


def span(A: Tensor) -> Tensor:
    return A.mT @ torch.linalg.pinv(A.mT)


def test_eva_takes_the_leading_right_singular_vectors_of_the_inputs_and_zero() -> None:
    model = started("eva")
    adapter = sites(model)[0].adapter("default")
    expected = torch.linalg.svd(torch.cat(batches()), full_matrices=False)[2][:2]
    assert torch.allclose((adapter.lora_A @ expected.mT).abs(), torch.eye(2, dtype=torch.float64), atol=1e-9)
    assert not adapter.lora_B.any()
    hidden = torch.tanh(mlp().first(torch.cat(batches())))
    second = sites(model)[1].adapter("default").lora_A
    assert torch.allclose(span(second), span(torch.linalg.svd(hidden)[2][:2]), atol=1e-9)


def test_lora_ga_takes_the_authors_singular_vectors_of_the_mean_gradient() -> None:
    model, plain = started("lora_ga"), mlp()
    torch.stack([squares(plain)(batch) for batch in batches()]).mean().backward()
    for site, G in zip(sites(model), (plain.first.weight.grad, plain.second.weight.grad), strict=True):
        adapter = site.adapter("default")
        U, _, Vh = torch.linalg.svd(G, full_matrices=False)
        size = G.shape[0] ** 0.25 / 4
        assert torch.allclose((adapter.lora_A @ Vh[:2].mT).abs(), size * torch.eye(2, dtype=torch.float64), atol=1e-8)
        assert torch.allclose(
            (U[:, 2:4].mT @ adapter.lora_B).abs(), size * torch.eye(2, dtype=torch.float64), atol=1e-8
        )


def test_lora_ga_of_a_stack_is_that_of_each_matrix() -> None:
    gradient = data(3, 6, 5)
    A, B = lora_ga(gradient, 2)
    for i in range(3):
        one = lora_ga(gradient[i], 2)
        assert torch.allclose(A[i].abs(), one[0].abs(), atol=1e-9)
        assert torch.allclose(B[i].abs(), one[1].abs(), atol=1e-9)


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
@pytest.mark.parametrize("method", [LoRA, LoRAFA, DoRA])
def test_a_model_started_from_data_is_its_base_bit_for_bit_and_the_rest_of_it_is_untouched(
    init: Any, method: Any
) -> None:
    model, plain, x = mlp(), mlp(), data(3, 6)
    inject(model, method(r=2, alpha=6, init=init), seed=1)
    before = {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}
    start_from_data(model, batches(), squares(model))
    assert torch.equal(model(x), plain(x).detach())
    for name, value in model.named_parameters():
        assert value.requires_grad == before[name][1]
        assert value.grad is None
        assert "lora" in name or torch.equal(value, before[name][0])
    assert not torch.equal(sites(model)[0].adapter("default").lora_A, before["first.adapters.weight.default.lora_A"][0])


def test_no_more_batches_than_asked_for_are_used() -> None:
    for init in ("eva", "lora_ga"):
        few, more = started(init, count=2), started(init, count=4, init_batches=2)
        for one, other in zip(sites(few), sites(more), strict=True):
            assert torch.equal(one.adapter("default").lora_A, other.adapter("default").lora_A)


def noisy(count: int) -> list[Tensor]:
    """Inputs with directions of decreasing size, in batches so small that these take a while to settle."""
    size = torch.tensor([3.0, 2.3, 1.6, 1.0, 0.5, 0.2], dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(8, 6, generator=generator, dtype=torch.float64) * size for _ in range(count)]


def settled_after(batches: list[Tensor], similarity: float, spread: float) -> int:
    """How many batches it takes, from the singular vectors of all inputs so far of both layers."""
    plain, before, r = mlp(), [], 2
    for n in range(1, len(batches) + 1):
        x = torch.cat(batches[:n])
        inputs = [x, torch.tanh(plain.first(x)).detach()]
        values, now = zip(*(torch.linalg.svd(one, full_matrices=False)[1:] for one in inputs), strict=True)
        ranks = [r, r]
        if spread != 1:
            shares = [(S**2 / (S**2).sum())[: int(r * spread)] for S in values]
            best = sorted(((-float(v), i) for i, share in enumerate(shares) for v in share[1:]))[: 2 * r - 2]
            ranks = [1 + sum(i == layer for _, i in best) for layer in range(2)]
        pairs = zip(before, now, ranks, strict=True) if before else ()
        cosines = [(one[:rank] * other[:rank]).sum(-1).abs().min() for one, other, rank in pairs]
        if before and all(cosine >= similarity for cosine in cosines):
            return n
        before = list(now)
    return len(batches)


@pytest.mark.parametrize("spread", [1.0, 2.0])
@pytest.mark.parametrize("similarity", [0.5, 0.9, 0.99, 0.9999, 1.0])
def test_eva_stops_at_the_batch_behind_which_no_direction_it_takes_has_moved(similarity: float, spread: float) -> None:
    data, read = noisy(40), []
    expected = settled_after(data, similarity, spread)
    model = mlp()
    inject(model, LoRA(r=2, init="eva", init_batches=40, init_similarity=similarity, rank_spread=spread), seed=1)
    start_from_data(model, data, lambda batch: read.append(batch) or model(batch))  # type: ignore[func-returns-value]
    assert len(read) == expected
    A = sites(model)[0].adapter("default").lora_A.detach()
    exact = torch.linalg.svd(torch.cat(data[:expected]), full_matrices=False)[2][: len(A)]
    assert torch.allclose((A @ exact.mT).abs(), torch.eye(len(A), dtype=torch.float64), atol=1e-6)


def test_directions_settle_later_the_closer_they_are_to_have_stood_still() -> None:
    counts = [settled_after(noisy(40), similarity, 1.0) for similarity in (0.5, 0.9, 0.99, 0.9999)]
    assert counts == sorted(counts)
    assert counts[0] < counts[2] < 40  # what the test above tells apart


def test_eva_goes_on_for_a_layer_that_no_batch_has_reached_and_not_for_one_that_it_cannot_see() -> None:
    class Late(nn.Module):
        def __init__(self, other: nn.Module) -> None:
            super().__init__()
            self.first, self.other, self.calls = nn.Linear(6, 5), other, 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.other(self.first(x)) if self.calls > 4 else self.first(x)

    same, read = [data(9, 6, dtype=torch.float32)] * 8, []
    for other in (nn.Linear(5, 5), nn.LSTM(5, 5)):
        model = Late(other)
        inject(model, LoRA(r=2, init="eva"), ["first", "other"])
        start_from_data(model, same, lambda batch, model=model: [model(batch)])  # type: ignore[misc]
        read.append(model.calls)
    assert read == [6, 2]
    model = Late(nn.LSTM(5, 5))
    inject(model, LoRA(r=2, init="eva", init_similarity=1.0), ["first", "other"])
    start_from_data(model, same, lambda batch: [model(batch)])  # type: ignore[arg-type, return-value]
    assert model.calls == 8


def test_eva_gives_the_budget_to_the_largest_shares_and_at_least_one_rank_to_each() -> None:
    shares = {"a": torch.tensor([0.5, 0.3, 0.15, 0.05]), "b": torch.tensor([0.9, 0.02]), "c": torch.tensor([0.3, 0.2])}
    assert eva_ranks(shares, 6) == {"a": 3, "b": 1, "c": 2}
    assert eva_ranks(shares, 3) == {"a": 1, "b": 1, "c": 1}
    assert sum(eva_ranks(shares, 8).values()) == 8


@pytest.mark.parametrize("scaling", ["linear", "rsqrt"])
def test_redistributed_ranks_keep_the_budget_the_bound_and_the_scale(scaling: Any) -> None:
    model = mlp()
    inject(model, LoRA(r=2, alpha=6, init="eva", rank_spread=2.0, scaling=scaling))
    start_from_data(model, [batch * torch.tensor([9.0, *[0.1] * 5]) for batch in batches()], squares(model))
    methods = [site.adapter("default").method for site in sites(model)]
    assert sum(method.r for method in methods) == 4
    assert all(1 <= method.r <= 4 for method in methods)
    assert len({method.r for method in methods}) == 2
    assert all(module.training for module in model.modules())
    for site, other in zip(sites(model), sites(adapted("eva", scaling=scaling)), strict=True):
        assert site.adapter("default").scaling == pytest.approx(other.adapter("default").scaling, rel=1e-12)
        assert site.adapter("default").lora_A.shape[0] == site.adapter("default").method.r


def test_matrices_whose_inputs_cannot_be_seen_keep_loras_own_start_and_are_named() -> None:
    model, other = (nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 5)) for _ in range(2))
    inject(model, LoRA(r=2, init="eva"), ["0", "1"], seed=1)
    inject(other, LoRA(r=2), ["0", "1"], seed=1)
    index = torch.arange(9)
    assert start_from_data(model, [index], squares(model)) == ["0.weight"]
    (one, _), (same, _) = sites(model), sites(other)
    assert torch.equal(one.adapter("default").lora_A, same.adapter("default").lora_A)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What data_start_processes.py wrote."""
    folder = tmp_path_factory.mktemp("two")
    script = Path(__file__).with_name("data_start_processes.py")
    subprocess.run([sys.executable, str(script), str(folder)], check=True, timeout=120)
    return folder


of_two_processes = pytest.mark.xdist_group("test_initialisations")


@of_two_processes
def test_two_processes_get_the_start_of_all_their_batches_and_the_same_one(two_processes: Path) -> None:
    from data_start_processes import data as all_batches
    from data_start_processes import started as in_one_process

    for init in ("eva", "lora_ga"):
        one, other = (torch.load(two_processes / f"{init}-{rank}.pt") for rank in range(2))
        whole = in_one_process(init, all_batches())
        assert one.keys() == other.keys() == whole.keys()
        for name, value in whole.items():
            assert torch.equal(one[name], other[name])
            assert one[name].shape == value.shape
            assert torch.allclose(one[name].abs(), value.abs(), atol=1e-6)


@of_two_processes
def test_two_processes_stop_at_the_same_batch_when_the_directions_of_both_have_settled(two_processes: Path) -> None:
    from data_start_processes import settled, streams

    alone = [settled(stream)[0] for stream in streams()]
    assert alone[0] == 2
    assert 3 < alone[1] < 30
    (short, one), (long, other) = (torch.load(two_processes / f"settled-{rank}.pt") for rank in range(2))
    assert (short, long) == (3, alone[1])  # the first has three batches in all, and waits
    assert torch.equal(one, other)
    counts = [torch.load(two_processes / f"moving-{rank}.pt")[0] for rank in range(2)]
    still = []
    for rank in range(2):
        half = streams()[1][rank::2]
        so_far = [torch.linalg.svd(torch.cat(half[: n + 1]))[2][:2] for n in range(len(half))]
        still.append([bool(((V * before).sum(-1).abs() >= 0.99).all()) for before, V in pairwise(so_far)])
    assert counts == [2 + [all(both) for both in zip(*still, strict=True)].index(True)] * 2
    assert still[0].index(True) != still[1].index(True)


@pytest.mark.parametrize(
    "method",
    [
        LoRA(r=1, init="eva", init_batches=2),
        LoRA(r=2, init="eva", init_similarity=1.0, rank_spread=2.0),
        LoRA(r=1, init="lora_ga", scaling="rsqrt"),
        LoRAFA(r=2, init="eva", init_similarity=1.0, gradient="fa"),
    ],
    ids=["eva", "eva with other ranks", "lora_ga", "lora_fa from eva"],
)
def test_a_trainer_starts_from_its_training_data_and_a_resumed_run_is_the_uninterrupted_one(
    method: LoRA, trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    by_hand, modules = Lit(), [Lit(), Lit(), Lit()]
    inject(by_hand, method, seed=0)
    start_from_data(by_hand, loader(), by_hand.loss)
    seen: list[dict[str, Tensor]] = []

    class Seen(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    whole, half, rest = (trainer(callbacks=[LoRACallback(method), Seen()], max_epochs=n) for n in (2, 1, 2))
    whole.fit(modules[0], loader())
    assert seen[0].keys() == by_hand.state_dict().keys()
    for name, value in by_hand.state_dict().items():
        assert torch.allclose(seen[0][name], value, atol=1e-6), name
    assert len(modules[0].losses) == 8 + min(4, method.init_batches)
    half.fit(modules[1], loader())
    half.save_checkpoint(tmp_path / "half.ckpt")
    rest.fit(modules[2], loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert len(modules[2].losses) == 4
    one, other = modules[0].state_dict(), modules[2].state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_testing_after_the_fit_keeps_the_ranks_that_the_start_chose(trainer: Callable[..., L.Trainer]) -> None:
    module, run, data = Lit(), trainer(callbacks=[LoRACallback(LoRA(r=2, init="eva", rank_spread=2.0))]), loader()
    data.dataset.tensors[0][:, 1:] *= 1e-3  # the first layer's inputs have one direction
    run.fit(module, data)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert {site.adapter("default").method.r for site in sites(module)} == {1, 3}
    run.test(module, data)
    assert before.keys() == module.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_eva_lets_a_frozen_A_reach_most_of_the_gradient() -> None:
    X, reached = torch.cat(batches()), {}
    G = data(len(X), 5).mT @ X  # of a linear layer whose outputs have any gradient
    for init in ("kaiming", "eva"):
        model = nn.Sequential(nn.Linear(6, 5, dtype=torch.float64))
        [site] = inject(model, LoRAFA(r=2, init=init), seed=1)
        if init == "eva":
            start_from_data(model, batches(), squares(model))
        A = site.adapter("default").lora_A.detach()
        reached[init] = float((G @ span(A)).norm() / G.norm())
    assert reached["eva"] > 0.95
    assert reached["kaiming"] < 0.8


@pytest.mark.parametrize("method", [LoRADrop, DyLoRA, HiRA, ReLoRA])
@pytest.mark.parametrize("init", KEEPS_START)
def test_methods_whose_adapters_cannot_keep_a_start_refuse_it(method: Any, init: Any) -> None:
    with pytest.raises(ValueError, match=f"init='{init}': "):
        method(init=init)
    with pytest.raises(ValueError, match="init='pissa_niter_4': "):
        method(init="pissa_niter_4")


def test_adalora_refuses_starts_frozen_factors_and_other_gradients_with_the_reason() -> None:
    for options in ({"init": "pissa"}, {"init": "eva"}, {"freeze_A": True}, {"gradient": "fa"}):
        with pytest.raises(ValueError, match=r"masking a triplet|needs a trainable Q|plain gradients"):
            AdaLoRA(**options)


def test_delta_lora_adds_its_ratio_to_what_was_learned_since_a_kept_start() -> None:
    model = nn.Sequential(nn.Linear(6, 5, dtype=torch.float64))
    [site] = inject(model, DeltaLoRA(r=2, init="pissa", update_ratio=2.0, start_step=-1))
    adapter = site.adapter("default")
    A0, B0 = adapter.lora_A.detach().clone(), adapter.lora_B.detach().clone()
    adapter.take_snapshot()
    change(model)
    assert torch.allclose(
        adapter.delta(), adapter.scaling * 3 * (adapter.lora_B @ adapter.lora_A - B0 @ A0), atol=1e-13
    )
