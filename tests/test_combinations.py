"""Which methods go together: the table of docs/methods.md, every pair that goes and every reason why one does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as L
import pytest
import torch
from conftest import Lit, Net, loader
from torch import Tensor, nn

from lightning_lora import (
    AdaLoRA,
    DeltaLoRA,
    DoRA,
    LoRA,
    LoRACallback,
    LoRADrop,
    LoRAFA,
    Method,
    VeRA,
    inject,
    load_adapter,
    merge_,
    merged,
    param_groups,
    remove,
    save_adapter,
    sites,
)
from lightning_lora.data_starts import looks_at_data, start_from_data

PAGE = Path(__file__).parent.parent / "docs/methods.md"
X = torch.linspace(-1, 1, 64).view(16, 4)
BATCHES = [X[:8], X[8:]]


class Pair(NamedTuple):
    method: Method
    lr_ratio: float = 1.0


def plus(method: Method) -> Pair:
    return Pair(method, lr_ratio=16)


GO: dict[str, Pair] = {
    "LoRA+ and rsLoRA": plus(LoRA(r=2, scaling="rsqrt")),
    "LoRA+ and DoRA": plus(DoRA(r=2)),
    "LoRA+ and EVA": plus(LoRA(r=2, init="eva")),
    "LoRA+ and LoRA-drop": plus(LoRADrop(r=2, sample_steps=2)),
    "LoRA+ and Delta-LoRA": plus(DeltaLoRA(r=2, start_step=1)),
    "rsLoRA and DoRA": Pair(DoRA(r=2, scaling="rsqrt")),
    "rsLoRA and LoRA-FA": Pair(LoRAFA(r=2, scaling="rsqrt")),
    "rsLoRA and PiSSA": Pair(LoRA(r=2, init="pissa", scaling="rsqrt")),
    "rsLoRA and LoRA-GA": Pair(LoRA(r=1, init="lora_ga", scaling="rsqrt")),
    "rsLoRA and EVA": Pair(LoRA(r=2, init="eva", scaling="rsqrt")),
    "rsLoRA and AdaLoRA": Pair(AdaLoRA(r=3, target_r=2, scaling="rsqrt")),
    "rsLoRA and LoRA-drop": Pair(LoRADrop(r=2, sample_steps=2, scaling="rsqrt")),
    "rsLoRA and Delta-LoRA": Pair(DeltaLoRA(r=2, start_step=1, scaling="rsqrt")),
    "DoRA and LoRA-FA": Pair(DoRA(r=2, freeze_A=True)),
    "DoRA and LoRA-FA's gradient": Pair(DoRA(r=2, freeze_A=True, gradient="fa")),
    "DoRA and PiSSA": Pair(DoRA(r=2, init="pissa")),
    "DoRA and OLoRA": Pair(DoRA(r=2, init="olora")),
    "DoRA and MiLoRA": Pair(DoRA(r=2, init="milora")),
    "DoRA and EVA": Pair(DoRA(r=2, init="eva")),
    "DoRA and LoRA-drop without the rest": Pair(LoRADrop(r=2, sample_steps=2, magnitude=True, rest="none")),
    "DoRA and VeRA": Pair(VeRA(r=4, magnitude=True)),
    "LoRA-FA and PiSSA": Pair(LoRAFA(r=2, init="pissa")),
    "LoRA-FA and EVA": Pair(LoRAFA(r=2, init="eva", gradient="fa")),
    "LoRA-FA and LoRA-drop": Pair(LoRADrop(r=2, sample_steps=2, freeze_A=True)),
    "LoRA-FA and Delta-LoRA": Pair(DeltaLoRA(r=2, start_step=1, freeze_A=True)),
    "PiSSA and Delta-LoRA": Pair(DeltaLoRA(r=2, start_step=1, init="pissa")),
    "EVA and Delta-LoRA": Pair(DeltaLoRA(r=2, start_step=1, init="eva")),
    "EVA and LoRA-drop": Pair(LoRADrop(r=2, sample_steps=2, init="eva", reinit=False)),
    "LoRA-Pro and DoRA": Pair(DoRA(r=2, gradient="lora_pro")),
    "Riemannian and LoRA+": plus(LoRA(r=2, gradient="riemannian")),
}

NO: dict[int, list[Callable[[], object]]] = {
    1: [lambda: LoRACallback(LoRAFA(), lr_ratio=16), lambda: LoRACallback(DoRA(freeze_A=True), lr_ratio=16)],
    2: [lambda: LoRACallback(AdaLoRA(), lr_ratio=16)],
    3: [lambda: LoRACallback(VeRA(), lr_ratio=16)],
    4: [lambda: VeRA(scaling="rsqrt"), lambda: VeRA(alpha=16)],
    5: [lambda: AdaLoRA(magnitude=True)],
    6: [lambda: LoRADrop(magnitude=True), lambda: LoRADrop(magnitude=True, rest="shared_frozen")],
    7: [lambda: DeltaLoRA(magnitude=True)],
    8: [lambda: AdaLoRA(freeze_A=True)],
    9: [lambda: VeRA(freeze_A=True), lambda: VeRA(gradient="fa")],
    11: [lambda: AdaLoRA(init="pissa")],
    12: [lambda init=init: LoRADrop(init=init) for init in ("pissa", "milora", "olora", "lora_ga")],
    13: [lambda: VeRA(init="pissa"), lambda: VeRA(init="eva")],
    14: [
        lambda: AdaLoRA(init="eva"),
        lambda: LoRADrop(init="eva", reinit=False, rank_spread=2.0),
        lambda: AdaLoRA(threshold=0.9),
    ],
    15: [lambda: AdaLoRA(update_ratio=2.0)],
    16: [lambda: VeRA(target_r=2)],
    17: [lambda: DeltaLoRA(threshold=0.9)],
    18: [lambda: VeRA(threshold=0.9)],
    19: [lambda: VeRA(update_ratio=2.0)],
}


def base() -> nn.Module:
    torch.manual_seed(3)
    return Net().double()


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(X.double())


def train(model: nn.Module, pair: Pair, steps: int = 4) -> list[dict[str, float]]:
    """Train by hand, and return the learning rate of each group at every step."""
    found = sites(model)
    optimizer = torch.optim.AdamW(param_groups(model, lr=0.01, lr_ratio=pair.lr_ratio))
    schedules = pair.method.schedules(found, "default", steps)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X.double()) - 1).square().mean().backward()
        for schedule in schedules:
            schedule.before_step(optimizer)
        optimizer.step()
        for schedule in schedules:
            schedule.after_step(optimizer)
    for schedule in schedules:
        schedule.end()
    return [{group["name"]: group["lr"]} for group in optimizer.param_groups]


@pytest.mark.parametrize("pair", GO.values(), ids=GO)
def test_a_pair_that_goes_starts_as_the_base_trains_merges_and_is_saved_whole(pair: Pair, tmp_path: Path) -> None:
    model, plain = base(), base()
    before = outputs(plain)
    inject(model, pair.method, seed=1)
    if looks_at_data(pair.method):
        start_from_data(model, BATCHES, loss=lambda batch: (model(batch.double()) - 1).square().mean())
    assert torch.allclose(outputs(model), before, rtol=0, atol=1e-12)
    rates = train(model, pair)
    assert {"lora_B": 0.01 * pair.lr_ratio} in rates or isinstance(pair.method, VeRA)
    assert {"magnitude": 0.01} in rates or not any("magnitude" in name for name, _ in model.named_parameters())
    after = outputs(model)
    assert not torch.allclose(after, before, rtol=0, atol=1e-3)
    with merged(model):
        assert torch.allclose(outputs(model), after, rtol=0, atol=1e-12)
    save_adapter(model, tmp_path / "adapter")
    load_adapter(plain, tmp_path / "adapter")
    for site in sites(plain):
        site.slot["default"].double()
    assert torch.allclose(outputs(plain), after, rtol=0, atol=1e-6)
    twin = base()
    remove(model)
    assert torch.equal(outputs(model), before)
    load_adapter(twin, tmp_path / "adapter")
    assert torch.allclose(outputs(merge_(twin)), after, rtol=0, atol=1e-6)


def test_lora_plus_and_a_start_that_is_not_zero_go_with_a_warning(trainer: Callable[..., L.Trainer]) -> None:
    with pytest.warns(UserWarning, match=r"LoRA\+ is derived for a B that starts at zero"):
        trainer(max_epochs=1, callbacks=[LoRACallback(LoRA(r=2, init="pissa"), lr_ratio=16)]).fit(Lit(), loader(1))


def reasons() -> dict[int, str]:
    """The numbered list of the page."""
    lines = PAGE.read_text().splitlines()
    return {int(line.split(". ")[0]): line.split(". ", 1)[1] for line in lines if line.split(". ")[0].isdigit()}


@pytest.mark.parametrize(
    ("number", "make"), [(number, make) for number, cases in NO.items() for make in cases], ids=lambda one: str(one)[:3]
)
def test_a_pair_that_does_not_go_raises_with_the_reason_on_the_page(number: int, make: Callable[[], object]) -> None:
    with pytest.raises(ValueError) as raised:
        make()
    assert reasons()[number][:40].rstrip(".").casefold() in str(raised.value).casefold()


def test_every_reason_of_the_page_is_tried_but_that_of_two_values_for_one_field() -> None:
    assert set(reasons()) == {*NO, 10}


def test_the_loop_by_hand_on_the_page_runs_and_ends_at_the_ranks_that_it_asks_for() -> None:
    loop = PAGE.read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(loop, names)
    assert sum(names["schedules"][0].ranks().values()) == 2 * names["method"].target_r
