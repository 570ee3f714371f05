"""What helps to choose targets and ranks: statistics of inputs, the curve over ranks, the table of matrices."""

from __future__ import annotations

import copy
import itertools
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from conftest import Lit, Net, loader
from torch import Tensor, nn

from lightning_lora import (
    AdaLoRA,
    DeltaLoRA,
    DoRA,
    LoRA,
    LoRACallback,
    Method,
    Recommendation,
    Score,
    VeRA,
    inject,
    param_groups,
    rank_curve,
    recommend_targets,
    sites,
    use,
    using,
)
from lightning_lora.candidates import Candidate, of_sites
from lightning_lora.evaluation import undisturbed
from lightning_lora.gradient_means import GradientMeans
from lightning_lora.input_statistics import InputStatistics, input_hooks, input_statistics, sees_inputs
from lightning_lora.knapsack import best_within
from lightning_lora.targets import find_targets


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def decaying(rows: int, width: int, *stack: int) -> Tensor:
    """Rows with singular values that fall by half from one to the next."""
    left = torch.linalg.qr(draw(*stack, rows, width)).Q
    right = torch.linalg.qr(draw(*stack, width, width, seed=1)).Q
    return (left * 0.5 ** torch.arange(width)) @ right


def by_svd(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same from all rows at once."""
    values, directions = torch.linalg.svd(rows, full_matrices=False)[1:]
    return directions[..., :k, :], values.square()[..., :k] / values.square().sum(-1, keepdim=True)


def assert_same_directions(one: Tensor, other: Tensor, tolerance: float = 1e-9) -> None:
    """Equal up to the sign of each row."""
    cosines = (one * other).sum(-1).abs()
    torch.testing.assert_close(cosines, torch.ones_like(cosines), atol=tolerance, rtol=0)


# Statistics of inputs


@pytest.mark.parametrize("exact_width", [2048, 0], ids=["Gram matrix", "incremental SVD that keeps all"])
@pytest.mark.parametrize("stack", [(), (3,)], ids=["matrix", "stack"])
def test_directions_and_shares_are_those_of_the_svd_of_all_rows(stack: tuple[int, ...], exact_width: int) -> None:
    rows = decaying(40, 6, *stack)
    statistics = InputStatistics("layer.weight", (*stack, 5, 6), exact_width=exact_width)
    for piece in rows.split(7, dim=-2):
        statistics.update(piece)
    directions, share = statistics.top(4)
    expected_directions, expected_share = by_svd(rows, 4)
    assert statistics.count == 40
    torch.testing.assert_close(statistics.energy, rows.square().sum((-2, -1)))
    torch.testing.assert_close(share, expected_share)
    assert_same_directions(directions, expected_directions)


def test_a_full_set_of_directions_is_orthonormal_and_explains_everything() -> None:
    statistics = InputStatistics("layer.weight", (5, 6))
    statistics.update(draw(20, 6))
    directions, share = statistics.top(6)
    torch.testing.assert_close(directions @ directions.T, torch.eye(6, dtype=torch.float64))
    assert share.sum().item() == pytest.approx(1)


def test_an_incremental_svd_is_exact_while_the_rows_have_no_higher_rank() -> None:
    rows = draw(300, 3) @ draw(3, 50, seed=1)
    statistics = InputStatistics("layer.weight", (5, 50), rank=4, exact_width=49)
    for piece in rows.split(30):
        statistics.update(piece)
    directions, share = statistics.top(3)
    expected_directions, expected_share = by_svd(rows, 3)
    torch.testing.assert_close(share, expected_share)
    assert_same_directions(directions, expected_directions)


def test_an_incremental_svd_that_drops_directions_never_claims_too_much() -> None:
    rows = draw(300, 50) * 0.8 ** torch.arange(50)
    statistics = InputStatistics("layer.weight", (5, 50), rank=8, exact_width=0)
    for piece in rows.split(20):
        statistics.update(piece)
    directions, share = statistics.top(4)
    energy_along = (rows @ directions.T).square().sum(0) / rows.square().sum()
    best = by_svd(rows, 4)[1]
    assert (share <= energy_along + 1e-12).all()
    assert share.sum() <= best.sum()
    assert share.sum() > 0.98 * best.sum()


@pytest.mark.parametrize("exact_width", [2048, 0], ids=["Gram matrix", "incremental SVD"])
@pytest.mark.parametrize("stack", [(), (3,)], ids=["matrix", "stack"])
def test_following_is_exact_where_all_directions_are_kept(stack: tuple[int, ...], exact_width: int) -> None:
    statistics, before = InputStatistics("layer.weight", (*stack, 5, 6), exact_width=exact_width), None
    for piece in decaying(40, 6, *stack).split(10, dim=-2):
        statistics.update(piece)
        before, share = statistics.follow(before)
        directions, exact = statistics.top(6)
        assert_same_directions(before, directions)
        torch.testing.assert_close(share, exact)


def test_following_comes_closer_with_every_call_where_few_of_many_directions_are_kept() -> None:
    rows = draw(300, 50) * 0.9 ** torch.arange(50)
    statistics, before, worst = InputStatistics("layer.weight", (5, 50), rank=8), None, []
    statistics.update(rows)
    for _ in range(5):
        before, share = statistics.follow(before)
        worst.append((before[:4] * by_svd(rows, 4)[0]).sum(-1).abs().min().item())
    assert worst == sorted(worst)
    assert worst[0] < 0.995
    assert worst[-1] > 1 - 1e-6
    torch.testing.assert_close(share[:4], by_svd(rows, 4)[1], atol=1e-6, rtol=0)


def test_half_precision_is_widened() -> None:
    rows = draw(64, 6).bfloat16()
    statistics = InputStatistics("layer.weight", (5, 6))
    statistics.update(rows)
    directions, share = statistics.top(2)
    assert directions.dtype == share.dtype == torch.float32
    torch.testing.assert_close(share, by_svd(rows.float(), 2)[1])


def test_autocast_narrows_nothing() -> None:
    rows = torch.randn(40, 6)
    inside, outside = (InputStatistics("layer.weight", (5, 6)) for _ in range(2))
    outside.update(rows)
    with torch.autocast("cpu", torch.bfloat16):
        inside.update(rows)
    for ours, expected in zip((*inside.top(3), *inside.follow()), (*outside.top(3), *outside.follow()), strict=True):
        assert torch.equal(ours, expected)


def test_more_directions_than_are_known_are_refused() -> None:
    statistics = InputStatistics("layer.weight", (5, 6))
    with pytest.raises(ValueError, match="got no input"):
        statistics.top(2)
    statistics.update(draw(3, 6))
    with pytest.raises(ValueError, match="1 to 6 directions are known"):
        statistics.top(7)
    wide = InputStatistics("layer.weight", (5, 6), rank=4, exact_width=0)
    wide.update(draw(3, 6))
    with pytest.raises(ValueError, match="1 to 3 directions are known after 3 rows"):
        wide.top(4)


class Wrapped(nn.Module):
    """One layer under the name ``layer``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(5, 6)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (2, 7, 6)),
    "Conv1D": (conv1d, (2, 7, 6)),
    "convolution": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (2, 4, 9, 8)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 9, 8)),
    "same padding": (lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=3), (2, 4, 20)),
    "circular": (lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), (2, 4, 20)),
    "reflected": (lambda: nn.Conv3d(2, 3, 2, padding=1, padding_mode="reflect"), (2, 2, 4, 5, 6)),
    "without a batch": (lambda: nn.Conv1d(4, 6, 3), (4, 20)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1), (2, 4, 5, 6)),
    "grouped transposed": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), (2, 4, 9)),
}


def rows_seen(model: nn.Module, found: list[Candidate], *args: Any, mask: Tensor | None = None, **kwargs: Any) -> Any:
    seen: dict[str, list[Tensor]] = {}
    with input_hooks(found, lambda one, rows: seen.setdefault(one.site.name, []).append(rows), mask):
        output = model(*args, **kwargs)
    return output, {name: torch.cat(rows, -2) for name, rows in seen.items()}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("kind", LAYERS)
def test_rows_times_the_matrix_are_what_the_layer_puts_out(kind: str) -> None:
    build, size = LAYERS[kind]
    model = Wrapped(build()).double()
    [one] = find_targets(model, ["layer"])
    x = draw(*size)
    output, seen = rows_seen(model, [one], x)
    rows = seen["layer.weight"]
    assert sees_inputs(one)
    assert rows.shape[-1] == one.shape[-1]
    assert rows.shape[:-2] == one.shape[:-2]
    matrix = one.layout.matrix(model.layer.weight)
    products = rows @ matrix.mT  # (..., rows, out)
    if kind in ("linear", "Conv1D"):
        expected = (output - model.layer.bias).flatten(0, -2)
    elif "transposed" not in kind:
        dims = model.layer.weight.dim() - 2
        channels = (output if output.dim() == dims + 2 else output[None]).movedim(1, -1).flatten(0, -2)
        expected = channels - model.layer.bias
        products = products if products.dim() == 2 else torch.cat(list(products), -1)
    else:  # products are patches that overlap in the output: their sum is the sum of the output without padding
        model.layer.padding = (0,) * len(model.layer.padding)
        expected = (model(x) - model.layer.bias.view(-1, *[1] * (x.dim() - 2))).sum()
        products = products.sum()
    torch.testing.assert_close(products, expected)


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
@pytest.mark.parametrize("mode", ["positional", "named"])
def test_attention_gives_each_projection_what_it_reads(mode: str, adapted: bool) -> None:
    q, k, v = draw(2, 5, 8), draw(2, 6, 8, seed=1), draw(2, 6, 8, seed=2)
    named = {"query": q, "key": k, "value": v}
    args, kwargs = ((q, k, v), {}) if mode == "positional" else ((), named)
    model = Wrapped(nn.MultiheadAttention(8, 2, batch_first=True)).double()
    fused = {"layer": ["q", "k", "v"]}
    if adapted:
        inject(model, LoRA(r=2), ["layer.q"], fused=fused)
    parts = find_targets(model, ["layer.q", "layer.k", "layer.v"], fused=fused)
    [whole] = (one for one in find_targets(model, ["layer"]) if one.site.parameter == "in_proj_weight")
    seen = rows_seen(model, [*parts, whole], *args, **kwargs)[1]
    for part, x in zip("qkv", (q, k, v), strict=True):
        assert torch.equal(seen[f"layer.in_proj_weight[{part}]"], x.flatten(0, 1))
    assert torch.equal(seen["layer.in_proj_weight"], torch.cat([x.flatten(0, 1) for x in (q, k, v)]))
    assert torch.equal(rows_seen(model, [whole], q, q, q)[1]["layer.in_proj_weight"], q.flatten(0, 1))


def test_attention_with_weights_of_different_widths_gives_each_its_own() -> None:
    q, k, v = draw(2, 5, 8), draw(2, 6, 4, seed=1), draw(2, 6, 3, seed=2)
    model = Wrapped(nn.MultiheadAttention(8, 2, kdim=4, vdim=3, batch_first=True)).double()
    seen = rows_seen(model, find_targets(model, ["layer"]), q, k, v)[1]
    for name, x in zip("qkv", (q, k, v), strict=True):
        assert torch.equal(seen[f"layer.{name}_proj_weight"], x.flatten(0, 1))


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_the_fused_path_of_an_encoder_does_not_hide_its_layers_inputs(adapted: bool) -> None:
    model = Wrapped(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)).double()
    if adapted:
        inject(model, LoRA(r=2))
    model.eval()
    x = draw(2, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    found = [one for one in find_targets(model, "all-linear") if "out_proj" not in one.site.name]
    with torch.no_grad():
        expected = model(x)
        output, seen = rows_seen(model, found, x)
        torch.testing.assert_close(output, expected)
        assert seen.keys() == {one.site.name for one in found}
        assert torch.equal(seen["layer.layers.0.self_attn.in_proj_weight"], x.flatten(0, 1))
        kept = rows_seen(model, found, x, src_key_padding_mask=padding, mask=~padding)[1]
    assert torch.equal(kept["layer.layers.0.self_attn.in_proj_weight"], x[~padding])
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_inputs_that_are_multiplied_out_of_sight_are_not_seen(adapted: bool) -> None:
    attention = nn.MultiheadAttention(4, 2)
    attention.out_proj = nn.Linear(4, 4)  # type: ignore[assignment]  # read all the same
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(9, 4),
            "lstm": nn.LSTM(4, 4),
            "attention": nn.MultiheadAttention(4, 2),
            "other": attention,
            "out_proj": nn.Linear(4, 4),
        }
    )
    targets = ["embedding", "lstm", "attention", "other", "out_proj"]
    found = of_sites(model, inject(model, LoRA(r=2), targets)) if adapted else find_targets(model, targets)
    assert [one.site.name for one in found if sees_inputs(one)] == [
        "attention.in_proj_weight",
        "other.in_proj_weight",
        "out_proj.weight",
    ]
    assert {one.site.name for one in found if one.read} == {"attention.out_proj.weight", "other.out_proj.weight"}


def test_masked_tokens_do_not_count() -> None:
    model = Net().double()
    x = draw(2, 5, 4)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    found = find_targets(model, "all-linear")
    kept = x[mask]
    statistics = input_statistics(model, found, [(x, mask)], lambda batch: model(batch[0]), mask=lambda batch: batch[1])
    assert statistics["first.weight"].count == 8
    torch.testing.assert_close(statistics["first.weight"].top(2)[1], by_svd(kept, 2)[1])
    torch.testing.assert_close(
        statistics["second.weight"].top(2)[1], by_svd(torch.tanh(model.first(kept)).detach(), 2)[1]
    )


def test_inputs_of_tied_layers_are_joined() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).double()
    model[1].weight = model[0].weight
    found = find_targets(model, "all-linear")
    x = draw(7, 4)
    [statistics] = input_statistics(model, found, [x], model).values()
    assert statistics.count == 14
    torch.testing.assert_close(statistics.top(3)[1], by_svd(torch.cat([x, model[0](x).detach()]), 3)[1])


def test_a_lightning_module_needs_no_function() -> None:
    model = Lit()
    batches = list(loader())
    statistics = input_statistics(model, find_targets(model, "all-linear"), batches)
    torch.testing.assert_close(
        statistics["net.first.weight"].top(3)[1], by_svd(torch.cat([x for x, _ in batches]), 3)[1]
    )
    assert "log" not in vars(model)


# No trace


class Noisy(nn.Module):
    """Counts its calls in a buffer, and draws random numbers from three sources."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x[0].detach()
        noise = torch.rand(1) + random.random() + numpy.random.rand()
        return self.norm(self.inner(x)) * noise.to(x)


def trace(model: nn.Module) -> list[Any]:
    """Everything that is to stay as it is, tensors by identity and value."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return [
        {name: (id(tensor), tensor.detach().clone().numpy().tobytes()) for name, tensor in tensors.items()},
        {
            name: (p.requires_grad, id(p.grad), p.grad if p.grad is None else p.grad.tolist())
            for name, p in tensors.items()
        },
        [module.training for module in model.modules()],
        [sorted(vars(module)) for module in model.modules()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()],
        torch.get_rng_state().tolist(),
        random.getstate(),
        str(numpy.random.get_state()),
    ]


def lived_in() -> Noisy:
    """A model with every state worth keeping: a gradient, a frozen weight, an inner module in eval mode."""
    model = Noisy()
    model(draw(3, 4, dtype=torch.float32)).sum().backward()
    model.inner.weight.requires_grad_(False)
    model.norm.eval()
    return model


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_statistics_leave_no_trace(fails: bool) -> None:
    model = lived_in()
    before = trace(model)

    def forward(x: Tensor) -> None:
        assert not model.training
        model(x)
        if fails:
            raise KeyError

    try:
        input_statistics(model, find_targets(model, "all-linear"), [draw(3, 4, dtype=torch.float32)], forward)
    except KeyError:
        assert fails
    assert trace(model) == before


def test_a_gradient_that_was_there_is_the_same_object_afterwards() -> None:
    model = lived_in()
    gradient = model.norm.weight.grad
    with undisturbed(model):
        model.norm.weight.grad = None
        model(draw(3, 4, dtype=torch.float32)).sum().backward()
    assert model.norm.weight.grad is gradient


# The curve over ranks


def trained(model: nn.Module, scale: float = 1.0) -> nn.Module:
    """Give all adapters factors as after training."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for site in sites(model):
            for parameter in site.slot.parameters():
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def squares(model: nn.Module) -> Callable[[Any], Tensor]:
    """A loss that any output has."""

    def loss(x: Tensor) -> Tensor:
        output = model(x)
        return (output[0] if isinstance(output, tuple) else output).square().mean()

    return loss


def cut_by_hand(delta: Tensor, rank: int) -> Tensor:
    """The best approximation of lower rank, from the dense matrix."""
    u, values, v = torch.linalg.svd(delta, full_matrices=False)
    return (u[..., :rank] * values[..., None, :rank]) @ v[..., :rank, :]


CUT: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{kind: LAYERS[kind] for kind in ("linear", "Conv1D", "convolution", "grouped", "grouped transposed")},
    "embedding": (lambda: nn.Embedding(9, 6), ()),
    "recurrent": (lambda: nn.LSTM(6, 4), (5, 2, 6)),
}


@pytest.mark.parametrize("kind", CUT)
def test_losses_are_those_of_a_plain_model_with_the_svd_cut_by_hand(kind: str) -> None:
    build, size = CUT[kind]
    x = draw(*size) if size else torch.arange(9)
    model = Wrapped(build()).double()
    plain = copy.deepcopy(model)
    inject(model, LoRA(r=3, alpha=2), ["layer"])
    trained(model)
    curve = rank_curve(model, [x, x[:1]], squares(model))
    assert list(curve.losses) == list(range(1 + min(3, *sites(model)[0].adapter("default").delta().shape[-2:])))
    deltas = {site: site.adapter("default").delta().detach() for site in sites(model)}
    for rank, loss in curve.losses.items():
        error = 0.0
        for site, delta in deltas.items():
            weight = dict(plain.named_parameters())[site.name]
            base = site.slot.layout.matrix(site.weight.detach())
            approximation = cut_by_hand(delta, rank)
            error += (delta - approximation).square().sum().item()
            with torch.no_grad():
                weight.copy_(site.slot.layout.put(weight, base + approximation))
        expected = torch.stack([squares(plain)(x), squares(plain)(x[:1])]).mean()
        assert loss == pytest.approx(expected.item(), rel=1e-9)
        assert curve.errors[rank] == pytest.approx(math.sqrt(error), rel=1e-9, abs=1e-9)


def test_the_ends_of_the_curve_are_the_base_and_the_adapter_itself() -> None:
    model = trained(adapted_net(), 0.1)
    x = draw(5, 4, dtype=torch.float32)
    curve = rank_curve(model, [x], squares(model))
    with using(model):
        assert curve.losses[0] == squares(model)(x).item()
    assert curve.losses[3] == squares(model)(x).item()
    assert curve.errors[3] == 0

    def of_its_own(x: Tensor) -> float:
        adapters = [site.adapter("default") for site in sites(model)]
        return float(all(adapter.factors()[0] is adapter.lora_B for adapter in adapters))

    assert list(rank_curve(model, [x], of_its_own).losses.values()) == [0, 0, 0, 1]


def adapted_net(**kwargs: Any) -> Net:
    model = Net()
    inject(model, LoRA(r=3, alpha=2), **kwargs)
    return model


def test_a_site_of_a_lower_rank_keeps_its_factors() -> None:
    model = trained(adapted_net(rank_pattern={"second": 1})).double()
    x = draw(5, 4)
    losses = rank_curve(model, [x], squares(model)).losses
    first = sites(model)[0].adapter("default")
    u, values, v = torch.linalg.svd(first.delta().detach(), full_matrices=False)
    with torch.no_grad():
        first.lora_B.copy_(torch.cat([u[:, :2] * values[:2], torch.zeros(8, 1)], 1) / first.scaling)
        first.lora_A.copy_(v[:3])
    assert losses[2] == pytest.approx(squares(model)(x).item(), rel=1e-9)


def test_only_the_ranks_that_were_asked_for_are_evaluated() -> None:
    model = trained(adapted_net())
    calls = []

    def loss(x: Tensor) -> float:
        calls.append(x)
        return model(x).square().mean().item()

    curve = rank_curve(model, iter([draw(5, 4, dtype=torch.float32)] * 2), loss, ranks=[3, 1])
    assert list(curve.losses) == list(curve.errors) == [1, 3]
    assert len(calls) == 4


def test_the_curve_is_that_of_one_task_and_the_tasks_in_use_stay() -> None:
    model = adapted_net()
    inject(model, LoRA(r=2, alpha=2), task="other")
    trained(model)
    x = draw(5, 4, dtype=torch.float32)
    use(model, "default", "other")
    losses = rank_curve(model, [x], squares(model), task="other").losses
    assert all(site.slot.active == ("default", "other") for site in sites(model))
    with using(model, "other"):
        assert losses[2] == squares(model)(x).item()
    assert len(losses) == 3


def test_every_rank_meets_the_same_random_numbers() -> None:
    model = adapted_net()  # lora_B is zero, so all ranks are the same function

    def loss(x: Tensor) -> Tensor:
        return (model(x) * torch.rand(1) * random.random()).sum()

    losses = rank_curve(model, [draw(5, 4, dtype=torch.float32)], loss).losses
    assert len(set(losses.values())) == 1


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_the_curve_leaves_no_trace(fails: bool) -> None:
    model = lived_in()
    inject(model, LoRA(r=2, alpha=2))
    trained(model)
    model.norm.eval()
    before = trace(model)

    def loss(x: Tensor) -> Tensor:
        output = model(x).sum()
        if fails:
            raise KeyError
        return output

    try:
        rank_curve(model, [draw(3, 4, dtype=torch.float32)], loss)
    except KeyError:
        assert fails
    assert trace(model) == before


def test_a_lightning_module_gives_its_own_loss_before_and_after_a_fit(trainer: Callable[..., Any]) -> None:
    model = Lit()
    lora = LoRACallback(LoRA(r=2, alpha=4), target_modules="all-linear")
    trainer(callbacks=[lora]).fit(model, loader())
    steps = len(model.losses)
    curve = rank_curve(model, loader())
    with torch.no_grad():
        expected = [model.loss(batch).item() for batch in loader()]
    assert curve.losses[2] == pytest.approx(sum(expected) / len(expected), rel=1e-6)
    assert curve.losses == rank_curve(model, loader(), model.loss).losses
    assert len(model.losses) == steps + 3 * 4
    assert "log" not in vars(model)


def test_the_table_and_the_plot_show_every_rank(tmp_path: Path) -> None:
    model = trained(adapted_net())
    curve = rank_curve(model, [draw(5, 4, dtype=torch.float32)], squares(model))
    header, *lines = curve.table().splitlines()
    assert header.split() == ["rank", "loss", "taken", "away"]
    assert [line.split()[0] for line in lines] == ["0", "1", "2", "3"]
    assert lines[0].endswith("100.00%")
    assert lines[-1].endswith(" 0.00%")
    curve.plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


# The table of matrices


def scores_of(recommendation: Recommendation) -> dict[str, Score]:
    return {score.name: score for score in recommendation.scores}


def mean_gradients(model: nn.Module, loss: Callable[[Any], Tensor], batches: list[Any]) -> dict[str, Tensor]:
    """From one backward pass through the mean loss of all batches, in eval mode."""
    model = copy.deepcopy(model).eval()
    named = dict(model.named_parameters())
    for parameter in named.values():
        parameter.requires_grad_()
        parameter.grad = None
    torch.stack([loss(model)(batch) for batch in batches]).mean().backward()
    return {name: parameter.grad for name, parameter in named.items() if parameter.grad is not None}


SCORED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{kind: LAYERS[kind] for kind in ("linear", "Conv1D", "convolution", "grouped", "grouped transposed")},
    "embedding": (lambda: nn.Embedding(9, 6, sparse=True), ()),
    "recurrent": (lambda: nn.LSTM(6, 4), (5, 2, 6)),
}


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("n_batches", [1, 3])
@pytest.mark.parametrize("kind", SCORED)
def test_gradient_scores_are_those_of_the_mean_loss_by_dense_svd(
    kind: str, n_batches: int, passes: int, adapted: bool
) -> None:
    build, size = SCORED[kind]
    batches = [draw(*size, seed=seed) if size else torch.arange(seed, 9) for seed in range(4)]
    model = Wrapped(build()).double()
    if adapted:
        if kind == "embedding":
            model.layer.sparse = False
        inject(model, LoRA(r=3, alpha=2), ["layer"])
        trained(model)
    recommendation = recommend_targets(
        model, batches, squares(model), r=2, n_batches=n_batches, target_modules=["layer"], passes=passes
    )
    scores = scores_of(recommendation)
    gradients = mean_gradients(model, squares, batches[:n_batches])
    found = find_targets(model, ["layer"])
    assert sorted(score.name for score in recommendation.scores) == sorted(one.site.name for one in found)
    for one in found:
        score, matrix = scores[one.site.name], one.layout.matrix(gradients[one.site.name].to_dense())
        *stack, out, into = one.shape
        assert score.shape == one.shape
        assert score.parameters == math.prod(stack) * 2 * (out + into)
        assert score.gradient == pytest.approx(matrix.norm().item())
        assert score.captured == pytest.approx(torch.linalg.svdvals(matrix)[..., :2].square().sum().item())


def test_parts_of_a_fused_matrix_are_scored_by_their_own_rows() -> None:
    model = Net().double()
    x = draw(5, 4)
    fused = {"first": {"q": 6, "k": 2}}
    recommendation = recommend_targets(
        model, [x], squares(model), r=1, target_modules=["first.q", "first.k"], fused=fused, budget=10
    )
    scores = scores_of(recommendation)
    gradient = mean_gradients(model, squares, [x])["first.weight"]
    for name, rows in (("first.weight.q", slice(0, 6)), ("first.weight.k", slice(6, 8))):
        assert scores[name].gradient == pytest.approx(gradient[rows].norm().item())
        assert scores[name].captured == pytest.approx(torch.linalg.matrix_norm(gradient[rows], 2).item() ** 2)
    inject(model, LoRA(r=1), recommendation.targets, fused=fused)
    assert [site.name for site in sites(model)] == ["first.weight[q]"]


def test_a_weight_that_is_used_twice_is_scored_once_by_the_sum_of_its_gradients() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    model[1].weight = model[0].weight
    x = draw(5, 4)
    [score] = recommend_targets(model, [x], squares(model)).scores
    assert score.gradient == pytest.approx(mean_gradients(model, squares, [x])["0.weight"].norm().item())


def test_a_layer_that_only_some_batches_reach_is_scored_by_these() -> None:
    model = Net().double()

    def loss(x: Tensor) -> Tensor:
        return squares(model.first if len(x) == 3 else model)(x)

    batches = [draw(5, 4), draw(3, 4)]
    scores = scores_of(recommend_targets(model, batches, loss))
    reached = mean_gradients(model, squares, batches[:1])["second.weight"] / 2
    assert scores["second.weight"].gradient == pytest.approx(reached.norm().item())


def test_what_no_batch_reaches_and_what_cannot_be_told_stays_empty() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4), "embedding": nn.Embedding(9, 4)})
    recommendation = recommend_targets(
        model,
        [torch.arange(9)],
        lambda index: squares(model["used"])(model["embedding"](index)),
        target_modules=["used", "unused", "embedding"],
        budget=10**6,
    )
    scores = scores_of(recommendation)
    unused = scores["unused.weight"]
    assert (unused.gradient, unused.captured, unused.inputs, unused.importance) == (None, None, None, None)
    assert scores["embedding.weight"].inputs is None
    assert scores["embedding.weight"].gradient is not None
    assert set(recommendation.targets) == {"used.weight", "embedding.weight"}
    assert recommendation.table().count(" -") == 5 + 2 + 1


def test_the_inputs_share_is_that_of_all_inputs_and_of_unmasked_tokens_only() -> None:
    model = Net().double()
    batches = [(draw(2, 5, 4, seed=seed), torch.rand(2, 5) > 0.3) for seed in range(2)]

    def loss(batch: Any) -> Tensor:
        return squares(model)(batch[0])

    score = scores_of(recommend_targets(model, batches, loss, r=2))["first.weight"]
    everything = torch.cat([x.flatten(0, 1) for x, _ in batches])
    assert score.inputs == pytest.approx(by_svd(everything, 2)[1].sum().item())
    masked = scores_of(recommend_targets(model, batches, loss, r=2, mask=lambda batch: batch[1]))["first.weight"]
    kept = torch.cat([x[mask] for x, mask in batches])
    assert masked.inputs == pytest.approx(by_svd(kept, 2)[1].sum().item())
    assert masked.gradient == score.gradient


def test_the_inputs_share_of_a_stack_weighs_each_matrix_by_its_energy() -> None:
    rows = draw(3, 20, 6) * torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    statistics = InputStatistics("layer.weight", (3, 5, 6))
    statistics.update(rows)
    squared = torch.linalg.svdvals(rows).square()
    assert statistics.explained(2) == pytest.approx((squared[:, :2].sum() / squared.sum()).item())
    assert statistics.explained(9) == pytest.approx(1)


@pytest.mark.parametrize("kind", ["linear", "convolution", "grouped", "transposed"])
def test_importance_is_the_share_of_what_the_adapters_add_to_their_outputs(kind: str) -> None:
    build, size = LAYERS[kind]
    model = nn.ModuleDict({"one": build(), "two": build()}).double()
    inject(model, LoRA(r=3, alpha=2), ["one", "two"], alpha_pattern={"two": 5})
    trained(model)
    batches = [draw(*size, seed=seed) for seed in range(2)]

    def loss(x: Tensor) -> Tensor:
        return squares(model["one"])(x) + squares(model["two"])(2 * x)

    scores = scores_of(recommend_targets(model, batches, loss, target_modules=["one", "two"]))
    added = dict.fromkeys(("one", "two"), 0.0)
    found = find_targets(model, ["one", "two"])
    for x in batches:
        for one, seen in zip(found, (x, 2 * x), strict=True):
            rows = rows_seen(model[one.site.name[:3]], [one], seen)[1][one.site.name]
            delta = one.site.adapter("default").delta().detach()
            added[one.site.name[:3]] += (rows @ delta.mT).square().sum().item()
    for name, value in added.items():
        assert scores[f"{name}.weight"].importance == pytest.approx(value / sum(added.values()))


def test_the_choice_within_a_budget_is_the_best_of_all() -> None:
    generator = random.Random(0)
    for _ in range(300):
        n = generator.randint(0, 8)
        weights = [generator.randint(1, 12) for _ in range(n)]
        values = [generator.choice([0.0, 1.0, 2.0, generator.random()]) for _ in range(n)]
        budget = generator.randint(0, 40)
        chosen = best_within(values, weights, budget)
        subsets = (subset for size in range(n + 1) for subset in itertools.combinations(range(n), size))
        best = max(sum(values[i] for i in s) for s in subsets if sum(weights[i] for i in s) <= budget)
        assert sum(weights[i] for i in chosen) <= budget
        assert sum(values[i] for i in chosen) == pytest.approx(best)
        assert all(values[i] > 0 for i in chosen)


def test_the_recommendation_chooses_by_the_column_it_is_told_and_says_so() -> None:
    model = trained(adapted_net())
    batches = [draw(5, 4, dtype=torch.float32)]
    cost = {"first.weight": 2 * (4 + 8), "second.weight": 2 * (8 + 3)}
    for by in ("captured", "importance"):
        recommendation = recommend_targets(model, batches, squares(model), r=2, budget=max(cost.values()), by=by)
        values = [getattr(score, by) for score in recommendation.scores]
        assert values == sorted(values, reverse=True)
        assert recommendation.targets == [recommendation.scores[0].name]
        assert [line.endswith("chosen") for line in recommendation.table().splitlines()] == [False, True, False]
    assert recommend_targets(model, batches, squares(model)).targets == []


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_the_recommendation_leaves_no_trace(adapted: bool, fails: bool) -> None:
    model = lived_in()
    if adapted:
        inject(model, LoRA(r=2, alpha=2))
        trained(model)
        model.norm.eval()
        model(draw(3, 4, dtype=torch.float32)).sum().backward()
    before = trace(model)
    calls = []

    def loss(x: Tensor) -> Tensor:
        calls.append(x)
        if fails and len(calls) == 2:
            raise KeyError
        return model(x).sum()

    try:
        recommend_targets(model, [draw(3, 4, dtype=torch.float32)] * 3, loss)
    except KeyError:
        assert fails
    assert trace(model) == before


def test_a_single_batch_holds_one_gradient_at_a_time() -> None:
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])
    held = []

    def take(gradient: Tensor) -> None:
        held.append(sum(p.grad is not None for p in model.parameters()))

    means = GradientMeans({layer.weight: take for layer in model}, batches=1)
    with means.hooked(model):
        means.backward(model(torch.ones(2, 4)).sum())
    assert held == [0, 0, 0, 0]
    assert not means._sums


def test_a_lightning_modules_own_training_loss_is_scored() -> None:
    model = Lit()
    batches = list(loader())
    scores = scores_of(recommend_targets(model, loader()))
    expected = mean_gradients(model, lambda module: module.loss, batches)
    for name in ("net.first.weight", "net.second.weight"):
        assert scores[name].gradient == pytest.approx(expected[name].norm().item(), rel=1e-5)


class Blocks(nn.Module):
    """Six residual blocks."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x


@pytest.mark.parametrize("seed", range(2))
def test_of_six_blocks_the_two_that_the_task_changes_come_first(seed: int) -> None:
    torch.manual_seed(seed)
    model = Blocks()
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for block, rank in ((2, 8), (4, 3)):
            change = torch.randn(32, rank) @ torch.randn(rank, 32) / math.sqrt(32 * rank)
            teacher.blocks[block].weight += change
    inject(model, LoRA(r=8, alpha=8))
    optimizer = torch.optim.Adam(param_groups(model, lr=3e-3))

    def loss(x: Tensor) -> Tensor:
        return (model(x) - teacher(x).detach()).square().mean()

    for _ in range(150):
        optimizer.zero_grad()
        loss(torch.randn(64, 32)).backward()
        optimizer.step()
    recommendation = recommend_targets(model, [torch.randn(256, 32)], loss, by="importance", budget=2 * 8 * (32 + 32))
    assert set(recommendation.targets) == {"blocks.2.weight", "blocks.4.weight"}
    assert sum(score.importance for score in recommendation.scores if score.chosen) > 0.8


def test_the_example_in_the_docs_runs_and_finds_what_it_says() -> None:
    page = (Path(__file__).parent.parent / "docs" / "choosing.md").read_text()
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(code, "docs/choosing.md", "exec"), names)
    assert set(names["after"].targets) == {"blocks.2.weight", "blocks.4.weight"}
    curve = names["curve"]
    assert curve.losses[4] < 0.01 * curve.losses[3]
    assert all(curve.errors[rank] > curve.errors[rank + 1] for rank in range(8))


@pytest.mark.parametrize(
    "method",
    [LoRA(r=3), DoRA(r=3), DeltaLoRA(r=3, start_step=0), AdaLoRA(r=3, target_r=2), VeRA(r=20)],
    ids=lambda method: type(method).__name__,
)
def test_every_method_computes_with_the_cut_product_and_what_else_it_has(method: Method) -> None:
    model = Net().double()
    inject(model, method, ["first"])
    trained(model)
    adapter = sites(model)[0].adapter("default")
    whole = adapter.delta().detach()
    weight = model.first.weight.detach()
    gain = adapter.gain(weight)
    seen = []

    def loss(x: Tensor) -> float:
        product = F.linear(x, adapter.adapted(weight), model.first.bias)
        torch.testing.assert_close(model.first(x), product)
        seen.append(adapter.delta())
        return 0.0

    curve = rank_curve(model, [draw(5, 4)], loss)
    assert list(curve.losses) == list(range(1 + min(4, adapter.factors()[1].shape[0])))
    for rank, delta in zip(curve.losses, seen, strict=True):
        torch.testing.assert_close(delta, cut_by_hand(whole, rank))
    assert (gain is None) == (not isinstance(method, DoRA))
