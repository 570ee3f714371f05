"""AdaLoRA: the budget, what is masked, and that neither resuming, processes nor other libraries change it."""

from __future__ import annotations

import copy
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import pytest
import safetensors.torch
import torch
from conftest import Lit, loader
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_lora import (
    AdaLoRA,
    AdapterError,
    LoRA,
    LoRACallback,
    inject,
    load_adapter,
    offline,
    param_groups,
    save_adapter,
)
from lightning_lora.rank_allocation import RankAllocation, budget, importance, keep_most_important, observe_, pull
from lightning_lora.report import ranks

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
from transformers.pytorch_utils import Conv1D  # noqa: E402


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


class WithLoss(nn.Module):
    """PEFT adds its regulariser to what is called ``loss`` in an output."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return SimpleNamespace(loss=nn.functional.mse_loss(self.net(x), y))


def net(dtype: torch.dtype = torch.float64) -> Mlp:
    torch.manual_seed(0)
    return Mlp().to(dtype)


def batches(steps: int, dtype: torch.dtype = torch.float64) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield (
            torch.randn(16, 6, generator=generator, dtype=torch.float64).to(dtype),
            torch.randn(16, 5, generator=generator, dtype=torch.float64).to(dtype),
        )


class Run:
    """Training by hand, with what was to be seen after every step.

    Args:
        method: What to inject.
        steps: Optimizer steps.
        model: What to train; by default three linear layers.
        rank_pattern: For ``inject``.
        clip: Norm that gradients are clipped to.
        weight_decay: Of the optimizer.
    """

    def __init__(
        self,
        method: AdaLoRA,
        steps: int,
        model: nn.Module | None = None,
        rank_pattern: dict[str, int] | None = None,
        clip: float | None = None,
        weight_decay: float = 0.1,
        targets: str | list[str] = "all-linear",
    ) -> None:
        self.model = net() if model is None else model
        self.sites = inject(self.model, method, targets, rank_pattern=rank_pattern, seed=3)
        self.adapters: dict[str, Any] = {site.name: site.adapter("default") for site in self.sites}
        self.optimizer = torch.optim.AdamW(param_groups(self.model, 0.02, weight_decay=weight_decay))
        [schedule] = method.schedules(self.sites, "default", steps)
        assert isinstance(schedule, RankAllocation)
        self.schedule = schedule
        self.values: list[Tensor] = []  # all singular values after each step
        self.clip = clip

    def go(self, data: Iterator[tuple[Tensor, Tensor]] | list[tuple[Tensor, Tensor]]) -> Run:
        for x, y in data:
            nn.functional.mse_loss(self.model(x), y).backward()
            self.schedule.before_step(self.optimizer)
            if self.clip is not None:
                nn.utils.clip_grad_norm_(self.parameters(), self.clip)
            self.optimizer.step()
            self.schedule.after_step(self.optimizer)
            self.optimizer.zero_grad()
            self.values.append(torch.cat([a.lora_E.detach().flatten() for a in self.adapters.values()]))
        return self

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for adapter in self.adapters.values() for parameter in adapter.parameters()]

    def in_use(self) -> list[int]:
        return [int((values != 0).sum()) for values in self.values]


PHASES: dict[str, Any] = {"initial_steps": 4, "final_steps": 6}


def method(**fields: Any) -> AdaLoRA:
    return AdaLoRA(**{"r": 4, "target_r": 2, "alpha": 8, **PHASES, **fields})


# ---- the budget


def test_the_budget_follows_the_released_codes_trace() -> None:
    phases = {"start": 864, "target": 576, "initial_steps": 500, "final_steps": 1500, "total_steps": 3000}
    trace = {500: 864, 501: 863, 600: 785, 750: 697, 1000: 612, 1250: 580, 1500: 576}
    assert {step: budget(step, **phases) for step in trace} == trace
    assert {budget(step, **phases) for step in range(501)} == {864}
    assert {budget(step, **phases) for step in range(1500, 3000)} == {576}


@pytest.mark.parametrize(("start", "target", "initial", "final", "total"), [(864, 576, 50, 90, 301), (7, 1, 0, 1, 9)])
def test_the_budget_never_rises_and_is_pefts_up_to_its_rounding(
    start: int, target: int, initial: int, final: int, total: int
) -> None:
    ours = [
        budget(t, start=start, target=target, initial_steps=initial, final_steps=final, total_steps=total)
        for t in range(total)
    ]
    assert ours == sorted(ours, reverse=True)
    allocator = object.__new__(peft.tuners.adalora.RankAllocator)
    allocator.peft_config = SimpleNamespace(tinit=initial, tfinal=final, total_step=total, deltaT=1)
    allocator.init_bgt, allocator.target_bgt = start, target
    theirs = [allocator.budget_schedule(t)[0] for t in range(total)]
    assert all(0 <= one - other <= 1 for one, other in zip(ours, theirs, strict=True))
    assert sum(one != other for one, other in zip(ours, theirs, strict=True)) <= 2


def test_a_budget_that_starts_at_its_target_stays_there() -> None:
    assert {budget(t, start=8, target=8, initial_steps=2, final_steps=3, total_steps=20) for t in range(20)} == {8}


# ---- which triplets are kept


def test_exactly_the_budget_is_kept_whatever_the_ties() -> None:
    for scores in (torch.zeros(8), torch.ones(8), torch.tensor([1.0, 2, 2, 2, 0, 0, 1, 1])):
        for number in range(9):
            assert int(keep_most_important(scores, number).sum()) == number


def test_the_largest_are_kept_and_of_equal_ones_the_first() -> None:
    scores = torch.tensor([1.0, 2, 2, 2, 0, 0, 1, 1])
    assert keep_most_important(scores, 2).tolist() == [False, True, True, False, False, False, False, False]
    assert keep_most_important(scores, 5).tolist() == [True, True, True, True, False, False, True, False]
    assert keep_most_important(torch.zeros(4), 1).tolist() == [True, False, False, False]


@pytest.mark.parametrize("number", [1, 17, 500, 983])
@pytest.mark.parametrize("values", [1, 2, 5])
def test_of_many_equal_scores_the_first_are_kept(values: int, number: int) -> None:
    scores = [(7 * i) % values for i in range(1000)]  # fast sorts move equal ones from some twenty on
    first = sorted(range(1000), key=lambda i: (-scores[i], i))[:number]
    kept = keep_most_important(torch.tensor(scores, dtype=torch.float32), number)
    assert kept.nonzero().flatten().tolist() == sorted(first)


def test_what_is_kept_is_a_function_of_scores_and_budget_alone() -> None:
    scores = torch.rand(200, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    before = scores.clone()
    first = keep_most_important(scores, 71)
    assert torch.equal(scores, before)
    assert torch.equal(keep_most_important(scores, 71), first)
    assert torch.equal(keep_most_important(scores * 4, 71), first)
    assert bool((keep_most_important(scores, 70) <= first).all())


def test_importance_is_that_of_the_value_plus_the_means_over_both_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    E, B, A = (torch.rand(*size, generator=generator) for size in ((3, 1), (5, 3), (3, 7)))
    expected = [float(E[i, 0] + B[:, i].mean() + A[i].mean()) for i in range(3)]
    assert importance(E, B, A).tolist() == pytest.approx(expected)
    stack = importance(torch.stack([E, 2 * E]), torch.stack([B, B]), torch.stack([A, A]))
    assert torch.equal(stack[0], importance(E, B, A))
    assert stack.shape == (2, 3)


def test_the_deviation_is_taken_from_the_mean_that_is_renewed_already() -> None:
    mean, spread = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    m = u = 0.0
    for value in (3.0, 1.0, 4.0):
        observe_([mean], [spread], [torch.tensor([value], dtype=torch.float64)], 0.85, 0.7)
        m = 0.85 * m + (1 - 0.85) * value
        u = 0.7 * u + (1 - 0.7) * abs(value - m)
    assert mean.item() == pytest.approx(m, rel=1e-14)
    assert spread.item() == pytest.approx(u, rel=1e-14)


# ---- the regulariser


def norm_of_excess(vectors: Tensor) -> Tensor:
    return (vectors @ vectors.T - torch.eye(len(vectors), dtype=vectors.dtype)).square().sum().sqrt()


def test_the_pull_is_the_gradient_of_the_norm() -> None:
    vectors = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    norm_of_excess(vectors).backward()
    assert torch.allclose(pull(vectors.detach()), vectors.grad, rtol=0, atol=1e-14)
    stack = torch.stack([vectors.detach(), 2 * vectors.detach()])
    assert torch.allclose(pull(stack)[0], vectors.grad, rtol=0, atol=1e-14)
    assert torch.allclose(pull(stack)[1], pull(stack[1]), rtol=0, atol=1e-14)


def test_orthonormal_vectors_are_not_pulled() -> None:
    assert torch.equal(pull(torch.eye(3, 7)), torch.zeros(3, 7))


def test_the_regulariser_is_the_mean_of_the_norms_over_all_A_and_B() -> None:
    run = Run(method(orthogonality=0.3), 20)
    factors = [(a.lora_A, a.lora_B) for a in run.adapters.values()]
    total = sum(norm_of_excess(A) + norm_of_excess(B.T) for A, B in factors) / (2 * len(factors))
    expected = torch.autograd.grad(0.3 * total, [p for pair in factors for p in pair])
    run.schedule.before_step(run.optimizer)
    for gradient, parameter in zip(expected, [p for pair in factors for p in pair], strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=0, atol=1e-15)
    assert all(a.lora_E.grad is None for a in run.adapters.values())
    run.schedule.before_step(run.optimizer)
    for gradient, parameter in zip(expected, [p for pair in factors for p in pair], strict=True):
        assert torch.allclose(parameter.grad, 2 * gradient, rtol=0, atol=1e-15), "it is added to what is there"


def test_without_a_weight_the_regulariser_adds_nothing() -> None:
    run = Run(method(orthogonality=0), 20)
    run.schedule.before_step(run.optimizer)
    assert all(parameter.grad is None for parameter in run.parameters())


# ---- the adapter


def test_vectors_start_random_singular_values_at_zero_and_the_scale_is_that_of_the_first_rank() -> None:
    model = nn.Sequential(nn.Linear(300, 400))
    [site] = inject(model, AdaLoRA(r=12, alpha=6), seed=0)
    adapter = site.adapter("default")
    assert adapter.scaling == 0.5
    assert not adapter.lora_E.any()
    for vectors in (adapter.lora_A, adapter.lora_B):
        assert vectors.std().item() == pytest.approx(0.02, rel=0.05)
        assert abs(vectors.mean().item()) < 1e-3
    assert (
        inject(nn.Sequential(nn.Linear(4, 4)), AdaLoRA(r=4, alpha=6, scaling="rsqrt"))[0].adapter("default").scaling
        == 3
    )
    run = Run(method(), 20).go(batches(20))
    assert {adapter.scaling for adapter in run.adapters.values()} == {2.0}


# ---- what is masked, and when


def test_the_ranks_in_use_are_the_budget_at_every_choice_and_the_target_at_the_end() -> None:
    run = Run(method(mask_every=3), 24).go(batches(24))
    for step in range(24):
        chosen = step >= 18 or (step > 4 and step % 3 == 0)
        assert run.in_use()[step] == (run.schedule.budget(step) if chosen else 12)
    assert run.schedule.target == 6
    assert sum(run.schedule.ranks().values()) == 6
    assert run.schedule.ranks() == ranks(run.sites)


def test_a_masked_triplet_can_come_back_before_the_final_phase() -> None:
    run = Run(method(), 60).go(batches(60))
    kept = [values != 0 for values in run.values[5:54]]
    assert any(bool((later & ~before).any()) for before, later in itertools.pairwise(kept))


@pytest.mark.parametrize("fields", [{}, {"sensitivity": "pre_step"}, {"mask_every": 5}])
def test_in_the_final_phase_the_same_values_are_exactly_zero_after_every_step(fields: dict[str, Any]) -> None:
    run = Run(method(**fields), 30, weight_decay=0.5).go(batches(30))
    assert {tuple((values != 0).tolist()) for values in run.values[24:]} == {tuple((run.values[-1] != 0).tolist())}
    assert int((run.values[-1] == 0).sum()) == 6
    moments = torch.cat([run.optimizer.state[a.lora_E]["exp_avg"].flatten() for a in run.adapters.values()])
    assert bool(moments[run.values[-1] == 0].all()), "their momentum would have moved them"


def test_a_start_at_the_target_masks_nothing() -> None:
    run = Run(method(target_r=4), 20).go(batches(20))
    assert run.in_use() == [12] * 20
    assert not run.schedule.kept
    assert run.schedule.metrics() == {"rank/total": 12}


def test_equal_scores_keep_the_first_sites_ranks_and_a_rank_of_zero_is_saved_and_loaded(tmp_path: Path) -> None:
    run = Run(method(mask_every=100, orthogonality=0), 20, weight_decay=0.0)
    with torch.no_grad():
        for adapter in run.adapters.values():
            adapter.lora_E.fill_(0.5)
    zero = [(torch.zeros(2, 6, dtype=torch.float64), run.model(torch.zeros(2, 6, dtype=torch.float64)).detach())] * 20
    run.go(zero)
    assert list(run.schedule.ranks().values()) == [4, 2, 0]
    save_adapter(run.model, tmp_path / "adapter")
    fresh = net()
    assert ranks(load_adapter(fresh, tmp_path / "adapter")) == run.schedule.ranks()
    [(x, _)] = batches(1)
    assert torch.equal(fresh(x), run.model(x))


def test_ranks_differ_by_site_where_a_pattern_says_so() -> None:
    run = Run(method(r=3, target_r=2), 20, rank_pattern={"second": 6}).go(batches(20))
    assert (run.schedule.start, run.schedule.target) == (12, 6)
    assert [a.lora_E.shape[0] for a in run.adapters.values()] == [3, 6, 3]
    assert run.in_use()[-1] == 6


def test_every_matrix_of_a_stack_counts_and_has_its_own_ranks() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(6, 6, 3, groups=3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x[..., None].expand(-1, -1, 4))[:, :5, 0]

    torch.manual_seed(0)
    run = Run(method(r=2, target_r=1), 20, Grouped().double(), targets=["conv"]).go(batches(20))
    assert (run.schedule.start, run.schedule.target) == (6, 3)
    assert run.adapters["conv.weight"].lora_E.shape == (3, 2, 1)
    assert run.in_use()[-1] == 3


# ---- sensitivities


@pytest.mark.parametrize("clip", [None, 1e-2])
@pytest.mark.parametrize("order", ["post_step", "pre_step"])
def test_sensitivities_multiply_the_clipped_gradient_by_the_weights_after_or_before_the_step(
    order: str, clip: float | None
) -> None:
    run = Run(method(sensitivity=order, orthogonality=0.3), 20, clip=clip).go(batches(3))
    before = {name: p.detach().clone() for name, p in run.schedule._parameters()}
    mean = copy.deepcopy(run.schedule.mean)
    gradients: dict[str, Tensor] = {}
    run.optimizer.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad.clone() for n, p in run.schedule._parameters()})
    )
    run.go(batches(1))
    weights = before if order == "pre_step" else {n: p.detach() for n, p in run.schedule._parameters()}
    for name in before:
        expected = 0.85 * mean[name] + 0.15 * (weights[name] * gradients[name]).abs()
        assert torch.allclose(run.schedule.mean[name], expected, rtol=1e-12, atol=0)
    if clip is not None:
        norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
        assert norm == pytest.approx(clip, rel=1e-4)


def test_sensitivities_are_not_kept_once_ranks_are_fixed() -> None:
    run = Run(method(), 20).go(batches(14))
    assert len(run.schedule.mean) == len(run.schedule.spread) == 9
    run.go(batches(1))
    assert run.schedule.state_dict()["mean"] == run.schedule.state_dict()["spread"] == {}


def test_adapters_in_half_precision_have_sensitivities_in_full() -> None:
    model = net(torch.bfloat16)
    sites_ = inject(model, method(), dtype=torch.bfloat16)
    [schedule] = method().schedules(sites_, "default", 20)
    optimizer = torch.optim.AdamW(param_groups(model, 0.02))
    for x, y in batches(20, torch.bfloat16):
        nn.functional.mse_loss(model(x), y).backward()
        schedule.before_step(optimizer)
        optimizer.step()
        schedule.after_step(optimizer)
        optimizer.zero_grad()
        assert {tensor.dtype for tensor in schedule.mean.values()} <= {torch.float32}
    assert sum(ranks(sites_).values()) == 6


# ---- PEFT is the independent reference


def in_peft(run: Run, steps: int) -> Any:
    """The same adapters in PEFT, whose scale is alpha / (r + 1e-5)."""
    config = peft.AdaLoraConfig(
        init_r=4,
        target_r=2,
        lora_alpha=2.0 * (4 + 1e-5),
        tinit=4,
        tfinal=6,
        deltaT=2,
        total_step=steps,
        orth_reg_weight=0.3,
        target_modules=["first", "second", "third"],
    )
    theirs = peft.get_peft_model(WithLoss(net()), config, autocast_adapter_dtype=False)
    for name, adapter in run.adapters.items():
        layer = theirs.base_model.model.net.get_submodule(name.removesuffix(".weight"))
        for factor in ("lora_A", "lora_B", "lora_E"):
            getattr(layer, factor)["default"].data = getattr(adapter, factor).detach().clone()
    return theirs


def test_a_whole_run_is_pefts_step_by_step() -> None:
    steps = 40
    run = Run(method(mask_every=2, orthogonality=0.3), steps, weight_decay=0.1)
    theirs = in_peft(run, steps)
    optimizer = torch.optim.AdamW([p for n, p in theirs.named_parameters() if ".lora_" in n], lr=0.02, weight_decay=0.1)
    for step, (x, y) in enumerate(batches(steps)):
        run.go([(x, y)])
        theirs.base_model(x, y).loss.backward()  # PeftModel itself would leave the regulariser out
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        for name, adapter in run.adapters.items():
            layer = theirs.base_model.model.net.get_submodule(name.removesuffix(".weight"))
            for factor in ("lora_A", "lora_B", "lora_E"):
                ours, other = getattr(adapter, factor), getattr(layer, factor)["default"]
                assert torch.equal(ours == 0, other == 0)
                assert torch.allclose(ours, other, rtol=0, atol=1e-10)
    assert run.in_use()[-1] == 6


def pefts_own(steps: int = 20) -> Any:
    """A model that PEFT trained to rank 0 in one place, and fewer ranks than at the start in all."""
    config = peft.AdaLoraConfig(
        init_r=3, target_r=1, tinit=2, tfinal=5, total_step=steps, lora_alpha=4,
        target_modules=["first", "second", "third"],
    )  # fmt: skip
    model = peft.get_peft_model(net(), config, autocast_adapter_dtype=False)
    adapters = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    for parameter in adapters.values():
        parameter.data *= 10
    optimizer = torch.optim.AdamW(adapters.values(), lr=0.05)
    for step, (x, y) in enumerate(batches(steps)):
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return model.eval()


ZERO_SIZED = "ignore:.*LoRA tensor.*have invalid shape"  # PEFT's advice on a rank of 0


@pytest.mark.filterwarnings(ZERO_SIZED)
def test_a_folder_of_pefts_loads_with_its_masks_and_computes_the_same(tmp_path: Path) -> None:
    theirs, ours = pefts_own(), net()
    theirs.save_pretrained(tmp_path)
    found = load_adapter(ours, tmp_path)
    [(x, _)] = batches(1)
    assert torch.allclose(ours(x), theirs(x), rtol=0, atol=1e-13)
    assert not torch.allclose(ours(x), net()(x), rtol=0, atol=1e-4)
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert ranks(found) == {f"{name.removesuffix('.lora_E')}.weight": sum(kept) for name, kept in pattern.items()}
    assert sum(ranks(found).values()) == 3
    assert {site.adapter("default").method.r for site in found} == {3}


def with_conv1d() -> Mlp:
    """All weights lie as (in, out), as in GPT-2."""
    model = net()
    model.first, model.second, model.third = Conv1D(8, 6), Conv1D(8, 8), Conv1D(5, 8)
    return model.double()


@pytest.mark.parametrize("base", [net, with_conv1d])
def test_peft_loads_our_folder_and_computes_the_same(base: Callable[[], Mlp], tmp_path: Path) -> None:
    run = Run(method(), 20, base()).go(batches(20))
    save_adapter(run.model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path, autocast_adapter_dtype=False).eval()
    [(x, _)] = batches(1)
    assert torch.allclose(theirs(x), run.model(x), rtol=0, atol=1e-13)
    assert theirs.peft_config["default"].target_r == 2


def test_a_folder_goes_through_peft_and_back(tmp_path: Path) -> None:
    run = Run(method(), 20).go(batches(20))
    save_adapter(run.model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path / "ours", autocast_adapter_dtype=False)
    theirs.save_pretrained(tmp_path / "theirs")
    back = net()
    load_adapter(back, tmp_path / "theirs")
    [(x, _)] = batches(1)
    assert torch.allclose(back(x), run.model(x), rtol=0, atol=1e-13)


def test_ranks_of_their_own_by_site_make_the_folder_ours_with_the_reason(tmp_path: Path) -> None:
    run = Run(method(r=3), 20, rank_pattern={"second": 6}).go(batches(20))
    save_adapter(run.model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LIGHTNING_LORA"
    fresh = net()
    load_adapter(fresh, tmp_path)
    [(x, _)] = batches(1)
    assert torch.equal(fresh(x), run.model(x))


@pytest.mark.filterwarnings(ZERO_SIZED)
@pytest.mark.parametrize("kept", [[True, True, True], "all of them", [], [1, 0, 0]])
def test_a_rank_pattern_that_does_not_fit_is_refused(kept: Any, tmp_path: Path) -> None:
    pefts_own().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    pattern = config["rank_pattern"]
    name = max(pattern, key=lambda name: 0 < sum(pattern[name]) < 3)
    pattern[name] = kept
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=f"triplets of {name}"):
        load_adapter(net(), tmp_path)


# ---- as plain LoRA


@pytest.mark.parametrize("pattern", [None, {"second": 6}], ids=["one rank", "ranks by site"])
def test_the_portable_form_is_a_lora_without_the_masked_triplets(pattern: Any, tmp_path: Path) -> None:
    run = Run(method(), 20, net(torch.float32), rank_pattern=pattern).go(batches(20, torch.float32))
    save_adapter(run.model, tmp_path / "adapter")
    offline.export(tmp_path / "adapter", tmp_path / "portable")
    config = json.loads((tmp_path / "portable" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == max(run.schedule.ranks().values())
    [(x, _)] = batches(1, torch.float32)
    theirs = peft.PeftModel.from_pretrained(net(torch.float32), tmp_path / "portable").eval()
    assert torch.allclose(theirs(x), run.model(x), rtol=0, atol=1e-6)
    ours = net(torch.float32)
    found = load_adapter(ours, tmp_path / "portable")
    assert isinstance(found[0].adapter("default").method, LoRA)
    for site in found:
        plain, adaptive = site.adapter("default"), run.adapters[site.name]
        up, down = adaptive.factors()
        kept = adaptive.lora_E.flatten() != 0
        rank = int(kept.sum())
        assert rank == run.schedule.ranks()[site.name]
        assert torch.equal(plain.lora_A[:rank], down[kept]), "A is E * A, bit for bit"
        assert torch.equal(plain.lora_B[:, :rank], adaptive.scaling * up[:, kept])
        assert not plain.lora_A[rank:].any()


def test_the_portable_form_of_nothing_but_masked_triplets_changes_nothing(tmp_path: Path) -> None:
    model = net()
    inject(model, method())
    save_adapter(model, tmp_path / "adapter")
    offline.export(tmp_path / "adapter", tmp_path / "portable")
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path / "portable", autocast_adapter_dtype=False)
    [(x, _)] = batches(1)
    assert torch.equal(theirs(x), net()(x))
    assert {
        t.shape[0]
        for k, t in safetensors.torch.load_file(tmp_path / "portable" / "adapter_model.safetensors").items()
        if "lora_A" in k
    } == {1}


# ---- with a Trainer


def fit(trainer: Any, module: Lit | None = None, ckpt_path: Any = None, batch_size: int = 4, **options: Any) -> Any:
    """Train for 24 steps on 48 pairs of examples, unless the options say otherwise."""
    module = module or Lit()
    callback = LoRACallback(options.pop("method", method(initial_steps=4, final_steps=6)))
    data = options.pop("data", None)
    data = loader(32 // batch_size, batch_size) if data is None else data
    options = {"max_epochs": 3, **options, "callbacks": [callback, *options.pop("callbacks", [])]}
    trainer(**options).fit(module, data, ckpt_path=ckpt_path)
    return SimpleNamespace(module=module, callback=callback, schedule=callback._schedules[0])


def trained(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


@pytest.mark.parametrize("at", [2, 11, 21], ids=["before ranks fall", "while they fall", "after it"])
@pytest.mark.parametrize("order", ["post_step", "pre_step"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    at: int, order: str, trainer: Any, tmp_path: Path
) -> None:
    ours = method(initial_steps=4, final_steps=6, sensitivity=order, mask_every=2)
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=at, save_top_k=-1)
    whole = fit(trainer, method=ours, callbacks=[saver], enable_checkpointing=True)
    path = tmp_path / f"step={at}.ckpt"
    state = torch.load(path, weights_only=True)["callbacks"]["LoRACallback"]["schedules"][0]
    assert state["step"] == at
    assert bool(state["kept"]) == (at > 4)
    assert bool(state["mean"]) == (at < 18)
    again = {"callbacks": [copy.deepcopy(saver)], "enable_checkpointing": True}
    resumed = fit(trainer, method=ours, ckpt_path=path, data=Resumable(at % 8), **again)
    assert resumed.schedule.step == whole.schedule.step == 24
    assert same(trained(resumed.module), trained(whole.module))
    assert same(resumed.schedule.state_dict(), whole.schedule.state_dict())
    assert sum(whole.schedule.ranks().values()) == 4


class Resumable:
    """The eight batches, of which the first epoch leaves out those that an interrupted one had seen.

    Args:
        position: How many these are.
    """

    def __init__(self, position: int) -> None:
        self.batches, self.position = list(loader(8)), position

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[Any]:
        start, self.position = self.position, 0
        yield from self.batches[start:]

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None: ...


def test_accumulated_batches_give_the_masks_of_the_large_batch(trainer: Any) -> None:
    large = fit(trainer, batch_size=8, max_epochs=5)
    small = fit(trainer, batch_size=4, max_epochs=5, accumulate_grad_batches=2)
    assert large.schedule.step == small.schedule.step == 20
    assert same(large.schedule.kept, small.schedule.kept)
    for one, other in zip(trained(large.module).values(), trained(small.module).values(), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-4)


class Overflowing(Lit):
    """Its second batch gives infinite gradients."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx == 1 and self.current_epoch == 0 else loss


@pytest.mark.parametrize("order", ["post_step", "pre_step"])
def test_a_step_that_a_gradient_scaler_skips_does_not_count(order: str, trainer: Any) -> None:
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))
    run = fit(trainer, Overflowing(), plugins=[plugin], max_epochs=2, method=method(sensitivity=order))
    assert run.schedule.step == 15
    assert all(tensor.isfinite().all() for tensor in run.schedule.mean.values())
    assert all(parameter.isfinite().all() for parameter in trained(run.module).values())


def test_two_processes_choose_the_same_masks_as_one(tmp_path: Path) -> None:
    script = Path(__file__).with_name("adalora_processes.py")
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, timeout=300)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["alike"]
    assert found["masks"] == found["masks_of_one_process"]
    assert 0 < sum(found["masks"]) < len(found["masks"])


def test_the_number_of_ranks_is_logged_and_the_last_ones_are_shown(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("lightning_lora.callbacks.schedules.rank_zero_info", said.append)
    logger = CSVLogger(tmp_path)
    run = fit(trainer, logger=logger, log_every_n_steps=1)
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("rank/total")
    logged = [float(line.split(",")[column]) for line in lines[1:]]
    assert logged[:5] == [8.0] * 5
    assert logged == sorted(logged, reverse=True)
    assert logged[-1] == 4.0
    for site, rank in run.schedule.ranks().items():
        assert any(
            line.split()[0] == site.removesuffix(".weight") and line.split()[-1] == str(rank)
            for line in said[-1].splitlines()
        )


def test_a_search_for_the_learning_rate_leaves_no_trace(trainer: Any) -> None:
    class Tuned(Lit):
        lr = 0.01

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=self.lr)

    class Find(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            Tuner(trainer)
            from lightning.pytorch.tuner.lr_finder import _lr_find

            _lr_find(trainer, pl_module, num_training=8)

    plain, searched = fit(trainer, Tuned()), fit(trainer, Tuned(), callbacks=[Find()])
    assert searched.schedule.step == 24
    assert same(trained(searched.module), trained(plain.module))
    assert same(searched.schedule.state_dict(), plain.schedule.state_dict())


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from loader(4, 1).dataset


def test_a_run_without_an_end_has_to_say_its_steps(trainer: Any) -> None:
    endless = {"data": DataLoader(Endless(), batch_size=4), "limit_train_batches": 30, "max_epochs": -1}
    with pytest.raises(ValueError, match="this run has no end"):
        fit(trainer, **endless)
    run = fit(trainer, **{**endless, "max_steps": 20})
    assert run.schedule.total_steps == 20


def test_total_steps_of_the_method_come_before_the_trainers(trainer: Any) -> None:
    run = fit(trainer, method=method(total_steps=100), fast_dev_run=True)
    assert run.schedule.total_steps == 100


def test_phases_that_leave_no_step_for_ranks_to_fall_are_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"initial_steps=4 and final_steps=6 leave no step of\s+total_steps=10"):
        Run(method(), 10)
    Run(method(), 11)


@pytest.mark.parametrize(("steps", "phases"), [(400, (100, 100)), (5, (1, 1)), (2, (0, 1)), (1, (0, 1))])
def test_without_phases_ranks_fall_in_the_middle_half_of_any_run(steps: int, phases: tuple[int, int]) -> None:
    run = Run(method(initial_steps=None, final_steps=None), steps)
    assert (run.schedule.initial_steps, run.schedule.final_steps) == phases
    if steps < 10:
        assert run.go(batches(steps)).in_use()[-1] <= 6


def test_a_target_above_the_start_is_refused() -> None:
    with pytest.raises(ValueError, match=r"target_r=5 for 3 matrices is 15 ranks at the end, but .* 12 at the start"):
        Run(method(target_r=5), 20)


# ---- what it does not go with


def test_lora_plus_and_options_of_other_methods_are_refused() -> None:
    with pytest.raises(ValueError, match="LoRA\\+ is defined for a zero B"):
        LoRACallback(AdaLoRA(), lr_ratio=16)
    for field in ({"init": "pissa"}, {"freeze_A": True}, {"magnitude": True}):
        with pytest.raises(ValueError, match="AdaLoRA"):
            AdaLoRA(**field)  # type: ignore[arg-type]


# ---- what it is for


def test_ranks_go_where_the_change_is() -> None:
    """Two layers side by side: one has to learn a change of rank 4, the other almost nothing."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idle, self.busy = nn.Linear(12, 12, bias=False), nn.Linear(12, 12, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.idle(x), self.busy(x)], -1)

    torch.manual_seed(0)
    model, teacher = Two(), Two()
    teacher.load_state_dict(model.state_dict())
    with torch.no_grad():
        teacher.busy.weight += torch.randn(12, 4) @ torch.randn(4, 12) / 4
        teacher.idle.weight += 0.01 * torch.randn(12, 12)
    x = torch.randn(150, 32, 12)
    run = Run(method(r=4, target_r=2, initial_steps=30, final_steps=50), 150, model, weight_decay=0)
    run.go([(one, teacher(one).detach()) for one in x])
    assert list(run.schedule.ranks().values()) == [0, 4]
