"""LoRA-drop (arXiv:2402.07721): what is measured, what is kept, what is shared, and one fit that does it."""

from __future__ import annotations

import copy
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from conftest import Lit, loader
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_lora import (
    AdapterError,
    LoRACallback,
    LoRADrop,
    inject,
    load_adapter,
    load_from_checkpoint,
    merged,
    save_adapter,
    sites,
    using,
)
from lightning_lora.files import read_tensors, to_bytes
from lightning_lora.importance import alike, importances, select
from lightning_lora.offline import merge
from lightning_lora.report import plot_importances
from lightning_lora.sharing import share, shares
from lightning_lora.state import mark_trained_in_full


class Blocks(nn.Module):
    """Six residual blocks of two linear layers."""

    def __init__(self, blocks: int = 6, width: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(width, 6), "down": nn.Linear(6, width)}) for _ in range(blocks)
        )
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["down"](torch.tanh(block["up"](x)))  # type: ignore[operator,index]
        return self.head(x)


TARGETS = ["up", "down"]


def blocks(method: LoRADrop | None = None, scale: float = 0.3, **options: Any) -> Blocks:
    """An adapted network whose factors are all random, as after some training."""
    torch.manual_seed(5)
    model = Blocks()
    inject(model, method or LoRADrop(r=2, alpha=4), **{"target_modules": TARGETS, "seed": 0, **options})
    with torch.no_grad():
        for site in sites(model):
            for parameter in site.adapter("default").parameters():
                parameter.normal_(0, scale * (1 + len(site.name) % 3))
    return model


def numel(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# ---- importance


def test_importance_is_the_mean_squared_change_of_the_output_as_a_share_of_its_group() -> None:
    model = blocks()
    batches = [torch.randn(5, 3, 4), torch.randn(2, 3, 4)]
    raw: dict[str, float] = {}
    hooks = []
    for site in sites(model):

        def add(module: nn.Module, args: tuple[Tensor], site: Any = site) -> None:
            change = args[0].double() @ site.adapter("default").delta().double().mT
            raw[site.name] = raw.get(site.name, 0.0) + change.square().sum().item()

        hooks.append(site.module.register_forward_pre_hook(add))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    found = importances(model, batches, model)
    for group in alike(model):
        total = sum(raw[name] for name in group)
        assert [found[name] for name in group] == pytest.approx([raw[name] / total for name in group], rel=1e-5)


def test_importances_sum_to_one_in_each_group() -> None:
    model = blocks()
    found = importances(model, [torch.randn(8, 4)], model)
    assert [len(group) for group in alike(model)] == [6, 6]
    assert [sum(found[name] for name in group) for group in alike(model)] == pytest.approx([1, 1])


def test_groups_are_of_one_name_but_for_numbers_and_of_one_shape_rank_and_alpha() -> None:
    model = blocks(rank_pattern={"blocks.0.up": 1}, alpha_pattern={"blocks.5.down": 1})
    assert sorted(map(len, alike(model))) == [1, 1, 5, 5]


def test_importance_does_not_depend_on_a_common_rescale_of_the_activations() -> None:
    model = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    inject(model, LoRADrop(r=2), seed=0)
    for site in sites(model):
        nn.init.normal_(site.adapter("default").lora_B)
    x = torch.randn(9, 4)

    def forward(factor: float) -> Callable[[Tensor], Any]:
        return lambda batch: [layer(factor * batch) for layer in model]

    one, hundred = importances(model, [x], forward(1)), importances(model, [x], forward(128))
    assert one == pytest.approx(hundred, rel=1e-6)


def test_padding_that_a_mask_leaves_out_does_not_count() -> None:
    model = blocks()
    x = torch.randn(2, 5, 4)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    masked = importances(model, [x], model, mask=lambda _: mask)
    short = importances(model, [x[:1, :3], x[1:]], model)
    assert masked == pytest.approx(short, rel=1e-6)
    assert masked != pytest.approx(importances(model, [x], model), rel=1e-3)


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "convolution": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), lambda: torch.randn(2, 4, 5, 5)),
    "embedding": (lambda: nn.Embedding(9, 4), lambda: torch.randint(0, 9, (3, 5))),
    "linear": (lambda: nn.Linear(4, 3), lambda: torch.randn(7, 4)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_cheap_form_is_the_norm_of_what_the_adapter_adds(kind: str) -> None:
    make, draw = KINDS[kind]
    model = nn.ModuleList([make(), make()])
    inject(model, LoRADrop(r=2), ".*", seed=0)
    for site in sites(model):
        nn.init.normal_(site.adapter("default").lora_B)
    x = draw()
    found = importances(model, [x], lambda batch: [layer(batch) for layer in model])
    changes = []
    for layer in model:
        adapted = layer(x)
        with using(model):
            changes.append((adapted - layer(x)).double().square().sum().item())
    assert list(found.values()) == pytest.approx([one / sum(changes) for one in changes], rel=1e-4)


class Attends(nn.Module):
    """Two encoder layers of PyTorch's, whose fused kernel in eval mode calls none of their children."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_what_attention_and_fused_encoders_read_is_measured_but_for_its_output_projection() -> None:
    model = Attends()
    inject(model, LoRADrop(r=2), exclude_modules=["out_proj"], seed=0)
    for site in sites(model):
        nn.init.normal_(site.adapter("default").lora_B)
    found = importances(model, [torch.randn(3, 5, 4)], model)
    assert len(found) == 6
    assert all(value > 0 for value in found.values())
    whole = Attends()
    inject(whole, LoRADrop(r=2), seed=0)
    with pytest.raises(ValueError, match=r"2 matrices \(first: layers\.0\.self_attn\.out_proj\.weight\)"):
        importances(whole, [torch.randn(3, 5, 4)], whole)


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = blocks().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    importances(model, [torch.randn(8, 4)], model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


# ---- selection


def test_a_threshold_of_one_keeps_all_that_have_any_importance() -> None:
    found = {"a": 0.7, "b": 0.3 - 1e-15, "c": 1e-15, "d": 0.0}
    assert select(found, [list(found)], threshold=1) == ["a", "b", "c"]


def test_a_threshold_near_zero_keeps_exactly_one() -> None:
    found = {"a": 0.2, "b": 0.5, "c": 0.3}
    assert select(found, [list(found)], threshold=1e-9) == ["b"]
    assert select(dict.fromkeys(found, 0.0), [list(found)], threshold=1e-9) == ["a"]


def test_the_kept_ones_are_the_minimal_prefix_that_reaches_the_threshold() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        values = torch.rand(8, generator=generator, dtype=torch.float64).pow(3).tolist()
        found = {f"layer{i}": value for i, value in enumerate(values)}
        kept = select(found, [list(found)], threshold=0.9)
        total, reached = math.fsum(values), math.fsum(found[name] for name in kept)
        assert reached >= 0.9 * total - 1e-12
        assert reached - min(found[name] for name in kept) < 0.9 * total
        assert min(found[name] for name in kept) >= max([v for n, v in found.items() if n not in kept], default=0)


def test_a_threshold_that_is_reached_exactly_is_reached() -> None:
    found = {"a": 0.5, "b": 0.4, "c": 0.1}
    assert select(found, [list(found)], threshold=0.9) == ["a", "b"]


def test_equal_importances_count_in_the_order_of_their_names() -> None:
    found = {"c": 0.25, "b": 0.25, "a": 0.25, "d": 0.25}
    assert set(select(found, [list(found)], threshold=0.5)) == {"a", "b"}


def test_top_n_keeps_as_many_of_each_group_as_there_are() -> None:
    found = {"a": 0.1, "b": 0.9, "c": 0.4, "d": 0.6, "e": 1.0}
    assert select(found, [["a", "b"], ["c", "d"], ["e"]], top_n=1) == ["b", "d", "e"]
    assert select(found, [["a", "b"], ["c", "d"], ["e"]], top_n=2) == list("abcde")


# ---- sharing


KEPT = ["blocks.1.up.weight", "blocks.4.up.weight", "blocks.0.down.weight"]


def test_the_dropped_ones_of_a_group_share_one_object_and_the_kept_have_their_own() -> None:
    model = blocks()
    share(model, KEPT)
    adapters = {site.name: site.adapter("default") for site in sites(model)}
    assert len(adapters) == 12
    assert len(set(map(id, adapters.values()))) == 3 + 2
    assert shares(model, "default") == {
        **{f"blocks.{i}.up.weight": "blocks.0.up.weight" for i in (0, 2, 3, 5)},
        **{f"blocks.{i}.down.weight": "blocks.1.down.weight" for i in (1, 2, 3, 4, 5)},
    }


@pytest.mark.parametrize(("rest", "adapters"), [("shared", 3 + 2), ("shared_frozen", 3), ("none", 3)])
def test_parameters_are_those_of_the_kept_and_one_more_per_group_where_it_is_trained(rest: Any, adapters: int) -> None:
    model = blocks(LoRADrop(r=2, alpha=4, rest=rest))
    share(model, KEPT)
    assert numel(model) == adapters * 2 * (4 + 6)
    assert len(sites(model)) == (3 if rest == "none" else 12)


def test_half_of_the_parameters_of_roberta_base_are_left_at_ten_of_24() -> None:
    with torch.device("meta"):
        layers = [nn.ModuleDict({"query": nn.Linear(768, 768), "value": nn.Linear(768, 768)}) for _ in range(12)]
        model = nn.ModuleDict({"layer": nn.ModuleList(layers)})
    inject(model, LoRADrop(r=8), seed=0)
    assert numel(model) == 294_912
    share(model, [f"layer.{i}.{name}.weight" for i in range(5) for name in ("query", "value")])
    assert numel(model) == 147_456


def test_starting_anew_gives_the_values_of_the_first_step() -> None:
    fresh, model = Blocks(), blocks()
    inject(fresh, LoRADrop(r=2, alpha=4), TARGETS, seed=0)
    share(model, KEPT)
    first = {site.name: site.adapter("default").state_dict() for site in sites(fresh)}
    firsts = {name: name for name in KEPT} | shares(model, "default")
    for site in sites(model):
        for name, value in site.adapter("default").state_dict().items():
            assert torch.equal(value, first[firsts[site.name]][name])


def test_magnitudes_that_start_anew_are_those_of_the_base_at_once() -> None:
    model = blocks(LoRADrop(r=2, alpha=4, rest="none", magnitude=True))
    share(model, KEPT)
    for site in sites(model):
        assert torch.allclose(site.adapter("default").magnitude, site.weight.norm(dim=1))


def test_going_on_keeps_the_values_of_the_kept_and_starts_the_shared_one_anew() -> None:
    model, before = blocks(LoRADrop(r=2, alpha=4, reinit=False)), blocks()
    share(model, KEPT)
    for site, other in zip(sites(model), sites(before), strict=True):
        adapter = site.adapter("default")
        if site.name in KEPT:
            assert torch.equal(adapter.lora_B, other.adapter("default").lora_B)
        else:
            assert not adapter.lora_B.any()


def test_what_is_shared_and_frozen_stays_as_the_first_of_them_was() -> None:
    model, before = blocks(LoRADrop(r=2, alpha=4, rest="shared_frozen")), blocks()
    share(model, KEPT)
    ours, theirs = sites(model)[0].adapter("default"), sites(before)[0].adapter("default")
    assert torch.equal(ours.lora_B, theirs.lora_B)
    assert not any(parameter.requires_grad for parameter in ours.parameters())


@pytest.mark.parametrize("rest", ["shared", "shared_frozen", "none"])
def test_the_base_stays_as_it_was(rest: Any) -> None:
    model = blocks(LoRADrop(r=2, alpha=4, rest=rest))
    base = {name: p.clone() for name, p in model.named_parameters() if "lora_" not in name}
    share(model, KEPT)
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if "lora_" not in name)


def test_a_gradient_of_what_is_shared_is_the_sum_over_its_places() -> None:
    model = blocks()
    share(model, KEPT)
    shared = sites(model)[0].adapter("default")
    x = torch.randn(8, 4)
    model(x).square().sum().backward()
    total = shared.lora_B.grad.clone()
    apart = blocks()
    share(apart, KEPT)
    places = [site for site in sites(apart) if site.adapter("default") is sites(apart)[0].adapter("default")]
    for site in places:
        site.slot["default"] = copy.deepcopy(site.adapter("default"))
    apart(x).square().sum().backward()
    assert torch.allclose(total, sum(site.adapter("default").lora_B.grad for site in places), atol=1e-5)


# ---- one fit


class Deep(Lit):
    """A LightningModule around the six blocks, with dropout, a metric that it logs and an optimizer of its own."""

    def build(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return Blocks()


def fit(
    trainer: Callable[..., L.Trainer],
    method: LoRADrop | None = None,
    module: Lit | None = None,
    data: Any = None,
    ckpt_path: Any = None,
    callback: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Lit, L.Trainer]:
    module = module or Deep()
    lora = LoRACallback(method or LoRADrop(r=2, alpha=4, sample_steps=3), TARGETS, **(callback or {}))
    run = trainer(callbacks=[lora, *options.pop("callbacks", [])], **options)
    run.fit(module, data or loader(8), ckpt_path=ckpt_path)
    return module, run


def sample_of(run: L.Trainer) -> Any:
    return run.callbacks[0]._schedules[-1]  # type: ignore[attr-defined]


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


class Watches(L.Callback):
    """Notes how many adapter parameters there are after each step."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.sizes.append(numel(pl_module))


@pytest.mark.parametrize("rest", ["shared", "shared_frozen", "none"])
def test_one_fit_samples_selects_and_trains_on(rest: Any, trainer: Callable[..., L.Trainer]) -> None:
    watch = Watches()
    module, run = fit(trainer, LoRADrop(r=2, alpha=4, sample_steps=3, top_n=2, rest=rest), callbacks=[watch])
    per_adapter = 2 * (4 + 6)
    left = (4 if rest != "shared" else 6) * per_adapter
    assert watch.sizes == [12 * per_adapter] * 2 + [left] * 14
    assert sum(sample_of(run).importances.values()) == pytest.approx(2)
    held = [p for group in run.optimizers[0].param_groups for p in group["params"]]
    trained = [p for p in module.parameters() if p.requires_grad]
    assert set(held) == set(trained)
    assert len(held) == len(trained) == len(run.optimizers[0].state)
    assert all(state["step"] == 13 for state in run.optimizers[0].state.values())
    assert all(site.adapter("default").lora_B.any() for site in sites(module))


@pytest.mark.parametrize("rest", ["shared", "none"])
def test_testing_after_the_fit_keeps_the_adapters_that_it_left(rest: Any, trainer: Callable[..., L.Trainer]) -> None:
    module, run = fit(trainer, LoRADrop(r=2, alpha=4, sample_steps=3, top_n=2, rest=rest))
    before, sharing = values(module), shares(module, "default")
    run.test(module, loader(1))
    assert same(values(module), before)
    assert shares(module, "default") == sharing


@pytest.mark.parametrize("rest", ["shared", "shared_frozen", "none"])
@pytest.mark.parametrize("again", ["the same module", "a copy", "loaded from its folder"])
def test_a_second_fit_keeps_the_selection_and_says_so(
    again: str, rest: Any, trainer: Callable[..., L.Trainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    method = LoRADrop(r=2, alpha=4, sample_steps=3, top_n=2, rest=rest)
    module, run = fit(trainer, method)
    assert "an earlier run" not in caplog.text
    if again == "loaded from its folder":
        save_adapter(module, tmp_path / "a")
        module = Deep()
        load_adapter(module, tmp_path / "a")
    elif again == "a copy":
        module.trainer = None
        module = copy.deepcopy(module)
    before, sharing = values(module), shares(module, "default")
    watch = Watches()
    with caplog.at_level("INFO"):
        _, run = fit(trainer, method, module, callbacks=[watch])
    assert caplog.text.count("LoRA-drop selected in an earlier run: its selection stays") == 1
    assert watch.sizes == [(4 if rest != "shared" else 6) * 2 * (4 + 6)] * 16
    assert shares(module, "default") == sharing
    assert sample_of(run).importances == {}
    assert all(state["step"] == 16 for state in run.optimizers[0].state.values()), "nothing started anew"
    assert values(module).keys() == before.keys()
    assert not same(values(module), before)


@pytest.mark.parametrize("rest", ["shared", "none"])
def test_a_second_fit_samples_where_the_first_one_dropped_nothing(rest: Any, trainer: Callable[..., L.Trainer]) -> None:
    method = LoRADrop(r=2, alpha=4, sample_steps=3, top_n=2, rest=rest)
    module, run = fit(trainer, method, max_steps=2)
    assert not sample_of(run).importances
    _, run = fit(trainer, method, module)
    assert sample_of(run).importances
    assert len({id(site.adapter("default")) for site in sites(module)}) == (4 if rest == "none" else 6)


@pytest.mark.parametrize("rest", ["shared", "none"])
def test_a_second_fit_that_is_resumed_is_the_uninterrupted_one(
    rest: Any, trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    method = LoRADrop(r=2, alpha=4, sample_steps=3, top_n=2, rest=rest)
    first, _ = fit(trainer, method)
    first.trainer = None
    whole, part = copy.deepcopy(first), copy.deepcopy(first)
    fit(trainer, method, whole, max_epochs=2)
    _, run = fit(trainer, method, part, max_epochs=1)
    run.save_checkpoint(tmp_path / "a.ckpt")
    rest_of_it, _ = fit(trainer, method, ckpt_path=tmp_path / "a.ckpt", max_epochs=2)
    assert same(values(rest_of_it), values(whole))


def test_the_sample_is_a_share_of_the_steps_of_the_run(trainer: Callable[..., L.Trainer]) -> None:
    _, run = fit(trainer, LoRADrop(r=2, sample_ratio=0.25), accumulate_grad_batches=2)
    assert sample_of(run).steps == 2  # of 2 epochs of 4 steps


def test_going_on_keeps_the_optimizers_moments_of_the_kept(trainer: Callable[..., L.Trainer]) -> None:
    module, run = fit(trainer, LoRADrop(r=2, alpha=4, sample_steps=3, top_n=2, reinit=False))
    steps = {p: int(state["step"]) for p, state in run.optimizers[0].state.items()}
    shared = shares(module, "default")
    for site in sites(module):
        for parameter in site.adapter("default").parameters():
            assert steps[parameter] == (13 if site.name in shared else 16)


def test_the_ratio_of_learning_rates_holds_and_the_schedulers_see_their_groups(
    trainer: Callable[..., L.Trainer],
) -> None:
    def configure(module: Any) -> Any:
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, 16), "interval": "step"}
        ]

    plain = Lit(configure)
    trainer().fit(plain, loader(8))
    module, run = fit(trainer, module=Deep(configure), callback={"lr_ratio": 4.0})
    roles = {p: name for name, p in module.named_parameters()}
    groups = run.optimizers[0].param_groups
    assert [group["lr"] / groups[0]["lr"] for group in groups] == pytest.approx([1, 4])
    assert groups[0]["lr"] == plain.trainer.optimizers[0].param_groups[0]["lr"]
    assert all("lora_A" in roles[p] for p in groups[0]["params"])
    assert all("lora_B" in roles[p] for p in groups[1]["params"])


def test_importances_are_shown_once_and_can_be_drawn(
    tmp_path: Path, trainer: Callable[..., L.Trainer], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        _, run = fit(trainer, LoRADrop(r=2, alpha=4, sample_steps=3, top_n=2))
    shown = [record.message for record in caplog.records if "importances by LoRA-drop" in record.message]
    assert len(shown) == 1
    assert len([line for line in shown[0].splitlines() if "blocks." in line]) == 12
    assert shown[0].count(" own ") == 4
    plot_importances(sample_of(run).importances, tmp_path / "importances.png")
    assert (tmp_path / "importances.png").stat().st_size > 1000


def test_optimizers_that_keep_sums_from_the_start_go_on(trainer: Callable[..., L.Trainer]) -> None:
    module, run = fit(trainer, module=Deep(lambda module: torch.optim.Adagrad(module.parameters(), lr=0.05)))
    assert len(run.optimizers[0].state) == len([p for p in module.parameters() if p.requires_grad])


def test_the_look_leaves_no_trace_in_logs(tmp_path: Path, trainer: Callable[..., L.Trainer]) -> None:
    logger = CSVLogger(tmp_path)
    fit(trainer, logger=logger, log_every_n_steps=1)
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + 16


RESUMES = {"in the sample": (5, 4), "right after the selection": (4, 4), "in the second phase": (5, 8)}


@pytest.mark.parametrize("rest", ["shared", "shared_frozen", "none"])
@pytest.mark.parametrize("when", RESUMES)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    when: str, rest: Any, tmp_path: Path, trainer: Callable[..., L.Trainer], caplog: pytest.LogCaptureFixture
) -> None:
    sample, stop = RESUMES[when]
    method = LoRADrop(r=2, alpha=4, sample_steps=sample, top_n=2, rest=rest)
    options: dict[str, Any] = {"callback": {"lr_ratio": 4.0}, "data": loader(4), "max_epochs": 4}

    options |= {"enable_checkpointing": True, "default_root_dir": tmp_path}
    whole, run = fit(trainer, method, callbacks=[ModelCheckpoint(tmp_path, "{step}", save_top_k=-1)], **options)
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1)
    path = tmp_path / f"step={stop}.ckpt"
    torch.manual_seed(1)  # another process may be anywhere in its random numbers
    with caplog.at_level("INFO"):
        resumed, again = fit(trainer, method, ckpt_path=path, callbacks=[saver], **options)
    assert "an earlier run" not in caplog.text
    assert sample_of(again).importances == sample_of(run).importances
    assert same(values(resumed), values(whole))
    assert shares(resumed, "default") == shares(whole, "default")
    assert [p.requires_grad for p in resumed.parameters()] == [p.requires_grad for p in whole.parameters()]


# ---- files


def dropped(rest: Any = "shared") -> Blocks:
    """A network after the selection, with values as after more training."""
    model = blocks(LoRADrop(r=2, alpha=4, rest=rest))
    share(model, KEPT)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


def plain() -> Blocks:
    torch.manual_seed(5)
    return Blocks()


@pytest.mark.parametrize("rest", ["shared", "shared_frozen", "none"])
def test_a_folder_loads_as_it_was_saved_with_what_is_shared(rest: Any, tmp_path: Path) -> None:
    model, other = dropped(rest), plain()
    save_adapter(model, tmp_path / "a")
    load_adapter(other, tmp_path / "a")
    assert shares(other, "default") == shares(model, "default")
    assert same(values(other), values(model))
    assert numel(other) == numel(model)


def test_a_folder_under_another_root_shares_too(tmp_path: Path) -> None:
    save_adapter(dropped(), tmp_path / "a")
    outer = nn.ModuleDict({"inner": plain()})
    load_adapter(outer, tmp_path / "a")
    assert shares(outer, "default")["inner.blocks.2.up.weight"] == "inner.blocks.0.up.weight"


@pytest.mark.parametrize("rest", ["shared", "none"])
def test_peft_loads_the_folder_with_a_copy_for_each_matrix_and_computes_the_same(rest: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = dropped(rest)
    save_adapter(model, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(plain(), tmp_path / "a")
    x = torch.randn(5, 4)
    assert torch.allclose(theirs(x), model(x), atol=1e-5)


@pytest.mark.parametrize("rest", ["shared", "shared_frozen"])
def test_a_folder_of_our_own_form_holds_what_is_shared_once(rest: Any, tmp_path: Path) -> None:
    model, other = dropped(rest), plain()
    for network in (model, other):
        network.register_parameter("extra", nn.Parameter(torch.ones(2)))
    mark_trained_in_full(model, ["extra"])  # which PEFT cannot hold
    save_adapter(model, tmp_path / "a")
    tensors, described = read_tensors(tmp_path / "a" / "adapter_model.safetensors")
    assert described is not None
    assert "not_for_peft" in described
    assert sum("lora_" in name for name in tensors) == 2 * len({id(site.adapter("default")) for site in sites(model)})
    load_adapter(other, tmp_path / "a")
    assert shares(other, "default") == shares(model, "default")
    assert same(values(other), values(model))
    torch.save(plain().state_dict() | {"extra": torch.zeros(2)}, tmp_path / "base.pt")
    merge(tmp_path / "a", tmp_path / "base.pt", tmp_path / "merged.pt")
    x, merged_state = torch.randn(5, 4), torch.load(tmp_path / "merged.pt")
    other = plain()
    other.load_state_dict({name: value for name, value in merged_state.items() if name != "extra"})
    assert torch.allclose(other(x), model(x), atol=1e-5)


@pytest.mark.parametrize("rest", ["shared", "none"])
def test_merging_gives_each_matrix_the_shared_change_in_the_model_and_from_files(rest: Any, tmp_path: Path) -> None:
    model, x = dropped(rest), torch.randn(5, 4)
    save_adapter(model, tmp_path / "a")
    torch.save(plain().state_dict(), tmp_path / "base.pt")
    merge(tmp_path / "a", tmp_path / "base.pt", tmp_path / "merged.pt")
    loaded = plain()
    loaded.load_state_dict(torch.load(tmp_path / "merged.pt"))
    expected = model(x)
    assert torch.allclose(loaded(x), expected, atol=1e-5)
    with merged(model):
        assert torch.allclose(model.eval()(x), expected, atol=1e-5)


def test_a_checkpoint_holds_what_is_shared_once_and_loads_by_itself(
    tmp_path: Path, trainer: Callable[..., L.Trainer]
) -> None:
    sizes = {}
    for rest in ("none", "shared"):
        method = LoRADrop(r=2, alpha=4, sample_steps=3, top_n=2, rest=rest)  # type: ignore[arg-type]
        module, run = fit(trainer, method, max_epochs=1)
        run.save_checkpoint(tmp_path / f"{rest}.ckpt", weights_only=True)
        state = torch.load(tmp_path / f"{rest}.ckpt", weights_only=True)["state_dict"]
        sizes[rest] = len({value.untyped_storage().data_ptr() for name, value in state.items() if "lora_" in name})
        loaded = load_from_checkpoint(Deep, tmp_path / f"{rest}.ckpt")
        assert same(values(loaded), values(module))
        assert shares(loaded, "default") == shares(module, "default")
    assert sizes == {"none": 8, "shared": 12}


def test_copies_and_pickles_share_too() -> None:
    model = dropped()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert shares(other, "default") == shares(model, "default")
        assert numel(other) == numel(model)


@pytest.mark.parametrize(
    "change",
    [
        {"shares": "blocks.9.up.weight"},
        {"shares": "blocks.1.up.weight"},
        {"shares": 3},
        {"r": 1},
    ],
)
def test_a_description_whose_sharing_makes_no_sense_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    save_adapter(dropped(), tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors, described = read_tensors(path)
    assert described is not None
    described["sites"]["blocks.2.up.weight"] |= change
    path.write_bytes(to_bytes(tensors, described))
    with pytest.raises(AdapterError, match=r"blocks\.2\.up\.weight"):
        load_adapter(plain(), tmp_path / "a")


# ---- several processes

RANK = """
import sys
sys.path.insert(0, {tests!r})
import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader
from conftest import loader
from test_lora_drop import Deep, TARGETS, values
from lightning_lora import LoRACallback, LoRADrop
from lightning_lora.sharing import shares

torch.set_num_threads(1)
found = {{}}
for rest in ("shared", "shared_frozen", "none"):
    lora = LoRACallback(LoRADrop(r=2, alpha=4, sample_steps=3, top_n=2, rest=rest), TARGETS, lr_ratio=4.0)
    run = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False, callbacks=[lora],
                    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    module = Deep()
    run.fit(module, DataLoader(loader(8).dataset, batch_size=4, shuffle=True))
    sample = lora._schedules[-1]
    found[rest] = {{"values": values(module), "importances": sample.importances, "shares": shares(module, "default"),
                   "steps": {{int(state["step"]) for state in run.optimizers[0].state.values()}}}}
torch.save(found, sys.argv[1] + f"/{{run.global_rank}}.pt")
"""


def test_two_processes_select_the_same_and_their_parameters_stay_equal(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(RANK.format(tests=str(Path(__file__).parent)))
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
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    for rest in ("shared", "shared_frozen", "none"):
        one, other = (rank[rest] for rank in ranks)
        assert one["importances"] == other["importances"]
        assert one["shares"] == other["shares"]
        assert same(one["values"], other["values"])
        assert one["steps"] == {5}  # 8 in all, 3 of them in the sample
        assert all(value.any() for name, value in one["values"].items() if "lora_B" in name)
