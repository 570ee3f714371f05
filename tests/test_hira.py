"""HiRA: a low-rank product multiplies the weight entry by entry, which makes a change of high rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import (
    AdapterError,
    HiRA,
    LoRA,
    inject,
    load_adapter,
    merge_,
    merged,
    offline,
    param_groups,
    save_adapter,
    sites,
    use,
)
from lightning_lora.adapter import Adapter
from lightning_lora.dropout import dropout
from lightning_lora.files import read_tensors

peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 9)
        self.second = nn.Linear(9, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(7)
    return Net().to(dtype)


def adapted(method: HiRA | None = None, model: nn.Module | None = None, start: bool = False, **options: Any) -> Any:
    model = net() if model is None else model
    inject(model, method or HiRA(r=3, alpha=6), **options)
    if not start:
        change(model)
    return model


def change(model: nn.Module, task: str = "default", seed: int = 2) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in adapters(model, task):
            for parameter in one.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def adapters(model: nn.Module, task: str = "default") -> list[Any]:
    return [site.adapter(task) for site in sites(model, task)]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# --- the formula


def test_forward_is_the_formula_in_every_layer() -> None:
    model, plain, x = adapted(), net(), draw(3, 6)
    for one, layer in zip(adapters(model), (plain.first, plain.second), strict=True):
        layer.weight.data *= 1 + 2 * (one.lora_B @ one.lora_A)
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-13)


def test_merged_computes_what_unmerged_does() -> None:
    model, x = adapted(), draw(3, 6)
    outputs = model(x)
    with merged(model):
        torch.testing.assert_close(model.eval()(x), outputs, rtol=0, atol=1e-13)
    torch.testing.assert_close(merge_(model)(x), outputs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_no_bit_of_the_output(dtype: torch.dtype) -> None:
    x = draw(3, 6).to(dtype)
    assert torch.equal(adapted(model=net(dtype), start=True)(x), net(dtype).requires_grad_(False)(x))


def test_gradients_are_those_of_the_formula() -> None:
    model, x = adapted(), draw(3, 6)
    one = adapters(model)[0]
    model(x).square().sum().backward()
    A, B = (parameter.detach().clone().requires_grad_() for parameter in (one.lora_A, one.lora_B))
    plain = net()
    second = plain.second.weight * (1 + adapters(model)[1].delta())
    hidden = nn.functional.linear(x, plain.first.weight * (1 + 2 * B @ A), plain.first.bias)
    nn.functional.linear(torch.tanh(hidden), second).square().sum().backward()
    torch.testing.assert_close(one.lora_A.grad, A.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(one.lora_B.grad, B.grad, rtol=0, atol=1e-12)


def test_the_change_has_r_times_the_rank_of_the_weight_where_loras_has_r() -> None:
    layer = nn.Linear(20, 20, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(draw(20, 3) @ draw(3, 20))  # of rank 3
    model = nn.Sequential(layer)
    for method, rank in ((HiRA(r=4, alpha=4), 3 * 4), (LoRA(r=4, alpha=4), 4)):
        task = type(method).__name__
        inject(model, method, task=task)
        change(model, task)
        (one,) = adapters(model, task)
        assert torch.linalg.matrix_rank(one.change(layer.weight)) == rank
    assert torch.linalg.matrix_rank(adapters(model, "HiRA")[0].adapted(layer.weight)) == 3 + 3 * 4


def test_an_entry_of_the_weight_that_is_zero_stays_zero() -> None:
    model = net()
    model.first.weight.data[2:4, 1] = 0
    adapted(model=model)
    assert not merge_(model).first.weight[2:4, 1].any()
    assert model.first.weight[0].all()


def test_dropout_is_on_the_input_of_the_change_alone() -> None:
    model, x = adapted(HiRA(r=3, alpha=6, dropout=0.5), nn.Sequential(nn.Linear(6, 9).double())), torch.ones(1, 6)
    torch.manual_seed(0)
    kept = dropout(x.double(), 0.5)
    torch.manual_seed(0)
    (one,) = adapters(model)
    layer = model[0]
    expected = layer.bias + layer.weight @ x[0].double() + one.change(layer.weight) @ kept[0]
    torch.testing.assert_close(model(x.double())[0], expected, rtol=0, atol=1e-13)
    assert torch.equal(model.eval()(x.double()), model(x.double()))


def test_a_second_adapter_multiplies_what_the_first_made_of_the_weight() -> None:
    model, plain, x = adapted(), net(), draw(3, 6)
    inject(model, HiRA(r=2, alpha=2), task="second")
    change(model, "second", seed=4)
    use(model, "default", "second")
    for one, other, layer in zip(adapters(model), adapters(model, "second"), (plain.first, plain.second), strict=True):
        layer.weight.data *= (1 + one.delta()) * (1 + other.delta())
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-13)


def test_as_many_parameters_as_lora_with_the_same_learning_rates() -> None:
    model = adapted()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * (6 + 9) + 3 * (9 + 4)
    assert {group["name"]: group["lr"] for group in param_groups(model, 0.1, lr_ratio=4)} == {
        "lora_A": 0.1,
        "lora_B": 0.4,
    }


# --- PEFT


class Case(NamedTuple):
    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    targets: list[str]


class Looking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 5)
        self.turned = Conv1D(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.turned(self.table(x))


CASES = {
    "linear": Case(net, lambda: draw(3, 6), ["first", "second"]),
    "embedding and Conv1D": Case(
        lambda: Looking().double(), lambda: torch.tensor([[1, 2, 2], [0, 6, 1]]), ["table", "turned"]
    ),
    "convolution, dilated with stride": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2))).double(),
        lambda: draw(2, 3, 6, 7),
        ["0"],
    ),
    "convolution 1d": Case(
        lambda: nn.Sequential(nn.Conv1d(3, 4, 3, padding="same")).double(), lambda: draw(2, 3, 6), ["0"]
    ),
}
IN_ONE_CONFIG = "ignore:fan_in_fan_out is set to:UserWarning"
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def built(case: Case) -> nn.Module:
    torch.manual_seed(7)
    return case.build()


@pytest.mark.filterwarnings(IN_ONE_CONFIG)
@cases
def test_peft_computes_the_same_from_our_folder_and_takes_the_same_steps(case: Case, tmp_path: Path) -> None:
    ours = adapted(HiRA(r=3, alpha=3), built(case), target_modules=case.targets)
    save_adapter(ours, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "HIRA"
    theirs = peft.PeftModel.from_pretrained(built(case), tmp_path, is_trainable=True)
    theirs.double()
    x = case.inputs()
    torch.testing.assert_close(theirs(x), ours(x), rtol=0, atol=1e-12)
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(theirs(x), ours(x), rtol=0, atol=1e-9)


@pytest.mark.filterwarnings(IN_ONE_CONFIG)
@cases
def test_we_compute_the_same_from_pefts_folder(case: Case, tmp_path: Path) -> None:
    config = peft.HiraConfig(r=3, target_modules=case.targets)
    theirs = peft.get_peft_model(built(case), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "hira_" in name:
                parameter.normal_(std=0.5)
    theirs.save_pretrained(tmp_path)
    ours = built(case)
    load_adapter(ours, tmp_path)
    assert {one.method for one in adapters(ours)} == {HiRA(r=3, alpha=3)}
    x = case.inputs()
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-6)


def test_a_scale_is_not_pefts_and_stays_in_a_folder_of_our_own(tmp_path: Path) -> None:
    model, fresh, x = adapted(HiRA(r=3, alpha=6)), net(), draw(3, 6)
    save_adapter(model, tmp_path)
    described = read_tensors(tmp_path / "adapter_model.safetensors")[1]
    assert described["not_for_peft"].startswith("PEFT's HiRA has no scale, and alpha=6 with r=3 is one")
    load_adapter(fresh, tmp_path)
    torch.testing.assert_close(fresh(x), model(x), rtol=0, atol=1e-13)


def test_other_ranks_are_not_pefts_which_takes_r_for_all_layers(tmp_path: Path) -> None:
    config = peft.HiraConfig(r=3, target_modules=["first"], rank_pattern={"first": 2})
    assert peft.get_peft_model(net(), config).base_model.model.first.hira_A["default"].shape[0] == 3
    ranks: dict[str, Any] = {"rank_pattern": {"first": 2}, "alpha_pattern": {"first": 2.0}}
    model, fresh, x = adapted(HiRA(r=3, alpha=3), **ranks), net(), draw(3, 6)
    save_adapter(model, tmp_path)
    why = read_tensors(tmp_path / "adapter_model.safetensors")[1]["not_for_peft"]
    assert why == "PEFT's HiRA leaves rank_pattern out: first.weight and second.weight"
    load_adapter(fresh, tmp_path)
    torch.testing.assert_close(fresh(x), model(x), rtol=0, atol=1e-13)


def test_trained_biases_are_not_pefts(tmp_path: Path) -> None:
    model = adapted(HiRA(r=3, alpha=3), bias="lora_only")
    save_adapter(model, tmp_path)
    assert read_tensors(tmp_path / "adapter_model.safetensors")[1]["not_for_peft"] == "PEFT's HIRA trains no biases"


def test_it_has_no_portable_form(tmp_path: Path) -> None:
    save_adapter(adapted(HiRA(r=3, alpha=3)), tmp_path / "hira")
    with pytest.raises(AdapterError, match="no portable form: what HiRA adds depends on the base's weight"):
        offline.export(tmp_path / "hira", tmp_path / "lora")


def test_what_peft_calls_lora_is_not_hira() -> None:
    assert HiRA.from_peft({"peft_type": "LORA", "r": 3}) is None
    assert LoRA.from_peft({"peft_type": "HIRA", "r": 3}) is None
    assert HiRA.from_peft({"peft_type": "HIRA"}) == HiRA(r=32, alpha=32)
    assert issubclass(HiRA, LoRA)
    assert not any(one.low_rank for one in adapters(adapted()) if isinstance(one, Adapter))


def test_starts_and_gradients_that_are_made_for_a_sum_are_refused() -> None:
    for init in ("pissa", "milora", "olora"):
        with pytest.raises(ValueError, match=f"init='{init}': HiRA's product multiplies the weight, and this start"):
            HiRA(init=init)
    for gradient in ("riemannian", "lora_pro"):
        with pytest.raises(ValueError, match=f"gradient='{gradient}' is derived for a change that is scale"):
            HiRA(gradient=gradient)
