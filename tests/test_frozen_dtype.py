"""Frozen weights stored in the dtype that autocast computes in: the same bits, and no step casts or copies them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from conftest import Lit, assert_same_bits, loader
from test_functional import costs
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from lightning_lora import (
    LoRA,
    LoRACallback,
    Method,
    functional,
    inject,
    known_methods,
    load_adapter,
    save_adapter,
    sites,
)
from lightning_lora.adapter import Adapter
from lightning_lora.fingerprint import base_weights

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HALF = [BF16, FP16]


class Block(nn.Module):
    """An embedding, a norm, layers that are adapted and one that is not, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 16)
        self.norm = nn.LayerNorm(16)
        self.first, self.second = nn.Linear(16, 24), Conv1D(16, 24)
        self.plain = nn.Linear(16, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, tokens: Tensor, offset: Tensor) -> Tensor:
        x = self.norm(self.embed(tokens) + offset)
        return self.head(self.plain(x + self.second(torch.tanh(self.first(x)))))


METHODS = {
    name: cls().at(2, 1.0)
    for name, cls in known_methods().items()
    if cls.__module__.startswith("lightning_lora.methods.")
} | {"dropout": LoRA(r=2, dropout=0.3), "pissa": LoRA(r=2, init="pissa")}
LORA = LoRA(r=2)


def adapted(model: nn.Module, method: Method, dtype: torch.dtype | None, **options: Any) -> Any:
    """A model with adapters that change it; the weights that they need in full stay so."""
    inject(model, method, seed=1, frozen_dtype=dtype, **options)
    generator = torch.Generator().manual_seed(2)
    for adapter in (module for module in model.modules() if isinstance(module, Adapter)):
        shapes = {name: parameter.shape for name, parameter in adapter.named_parameters(recurse=False)}
        adapter.load_state_dict({n: 0.3 * torch.randn(s, generator=generator) for n, s in shapes.items()}, strict=False)
    return model


def results(model: nn.Module, dtype: torch.dtype, rows: int = 48) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(11, (rows,), generator=generator)
    offset = torch.randn(rows, 16, generator=generator).requires_grad_()
    torch.manual_seed(4)
    with torch.autocast("cpu", dtype):
        logits = model(tokens, offset)
    logits.float().sin().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"logits": logits.detach(), "offset": offset.grad, **gradients}


# The same bits


@pytest.mark.parametrize("rows", [48, 1024])  # in the plain form and in the fused one
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_logits_and_all_gradients_are_the_same_bit_for_bit(method: Method, dtype: torch.dtype, rows: int) -> None:
    options = {"bias": "lora_only", "modules_to_save": ["head"], "exclude_modules": ["plain"]}
    stored, full = (adapted(Block(), method, chosen, **options) for chosen in (dtype, None))
    assert stored.plain.weight.dtype == dtype
    assert_same_bits(results(stored, dtype, rows), results(full, dtype, rows))


def test_at_any_size_the_bits_are_those_of_the_same_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for least in (0, math.inf):
        monkeypatch.setattr(functional, "_FEWEST_ROWS", least)
        monkeypatch.setattr(functional, "_MANY_ROWS", least)
        stored, full = (adapted(Block(), LORA, chosen) for chosen in (BF16, None))
        assert_same_bits(results(stored, BF16, 300), results(full, BF16, 300))


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_computes_the_same_bits(tied: bool) -> None:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    found = []
    for dtype in (BF16, None):
        torch.manual_seed(0)
        model = adapted(LlamaForCausalLM(config), LoRA(r=2), dtype, target_modules=["q_proj", "v_proj", "down_proj"])
        tokens = torch.arange(2 * 512).view(2, 512) % 32
        with torch.autocast("cpu", BF16):
            output = model(input_ids=tokens, labels=tokens)
        output.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({"logits": output.logits.detach(), **gradients})
        if dtype is not None:
            halved = {name for name, p in model.named_parameters() if p.dtype == BF16}
            assert len(halved) == 2 * 7 + (not tied)
            assert all("proj" in name or name == "lm_head.weight" for name in halved)
    assert_same_bits(*found)


def test_a_run_trains_the_same_adapters_bit_for_bit(tmp_path: Path) -> None:
    trained = []
    for dtype in ("bfloat16", None):
        module = fit(tmp_path, Lit(), dtype)
        assert module.net.first.weight.dtype == (FP32 if dtype is None else BF16)
        trained.append({name: p.detach() for name, p in module.named_parameters() if "adapters" in name})
    assert_same_bits(*trained)


def test_a_start_from_data_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    trained = []
    for dtype in ("bfloat16", None):
        module = fit(tmp_path, Lit(), dtype, LoRA(r=1, init="lora_ga", init_batches=2))
        trained.append({name: p.detach() for name, p in module.named_parameters() if "adapters" in name})
    assert_same_bits(*trained)


def fit(folder: Path, module: Any, dtype: Any, method: Method = LORA, **options: Any) -> Any:
    trainer = L.Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[LoRACallback(method, frozen_dtype=dtype)],
        **options,
    )
    trainer.fit(module, loader())
    return module


# What is stored, and what is left alone


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.clamp(-1, 1), self.bias)


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.adapted, self.plain = nn.Linear(4, 4), nn.Linear(4, 4)
        self.conv1d = Conv1D(4, 4)
        self.embed, self.tied = nn.Embedding(4, 4), nn.Linear(4, 4, bias=False)
        self.tied.weight = self.embed.weight
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = nn.Parameter(self.one.weight.detach())  # the same memory
        self.norm, self.conv = nn.LayerNorm(4), nn.Conv1d(4, 4, 1)
        self.attention = nn.MultiheadAttention(4, 1)
        self.own = OwnForward(4, 4)
        self.computed = parametrizations.weight_norm(nn.Linear(4, 4))
        self.wide = nn.Linear(4, 4).double()
        self.trained = nn.Linear(4, 4)
        self.patched = nn.Linear(4, 4)
        self.patched.forward = lambda x: F.linear(x, self.patched.weight.sin())  # type: ignore[method-assign]
        self.empty = nn.Linear(4, 4, device="meta")


STORED = {"adapted.weight", "plain.weight", "conv1d.weight"}


def halved(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.dtype in HALF}


def everything(method: Method, dtype: torch.dtype | None = BF16) -> nn.Module:
    model = Everything()
    inject(model, method, ["adapted"], modules_to_save=["trained"], frozen_dtype=dtype)
    return model


def test_only_frozen_weights_that_nothing_but_their_product_needs_are_stored() -> None:
    assert halved(everything(LORA)) == STORED
    assert halved(everything(LORA, None)) == set()


NEED_THEIRS = {name: METHODS[name] for name in ("DoRA", "HiRA")} | {
    "Delta-LoRA in place": known_methods()["DeltaLoRA"](r=2, in_place=True)
}


@pytest.mark.parametrize("method", NEED_THEIRS.values(), ids=NEED_THEIRS.keys())
def test_weights_that_their_adapters_need_are_left_in_full(method: Method) -> None:
    assert halved(everything(method)) == STORED - {"adapted.weight"}


def test_a_start_from_the_weight_sees_it_in_full() -> None:
    stored, full = (Block().requires_grad_(False) for _ in range(2))
    inject(stored, LoRA(r=2, init="pissa"), frozen_dtype=BF16)
    inject(full, LoRA(r=2, init="pissa"))
    factors = [{n: p for n, p in model.named_parameters() if "adapters" in n} for model in (stored, full)]
    assert_same_bits(*factors)
    assert stored.first.weight.dtype == BF16


def test_parameters_stay_the_same_objects_and_a_second_call_changes_nothing() -> None:
    model = Block()
    before = dict(model.named_parameters())
    inject(model, LORA, frozen_dtype=BF16)
    values = copy.deepcopy(model.state_dict())
    inject(model, LORA, frozen_dtype=BF16)
    assert all(model.get_parameter(name) is parameter for name, parameter in before.items())
    assert_same_bits(model.state_dict(), values)


# What a step costs


IN, OUT, R = 20, 12, 4
COSTS = [  # rows, adapted: launches forward and backward, bytes kept, each with the weight in fp32 and in bf16
    (1024, True, (7, 13, 2 * 1024 * (IN + R)), (6, 12, 2 * 1024 * (IN + R))),
    (1024, False, (3, 2, 2 * IN * OUT), (2, 2, 0)),
]


@pytest.mark.parametrize(("rows", "has_adapter", "full", "stored"), COSTS)
def test_no_step_casts_or_keeps_a_frozen_weight(
    rows: int, has_adapter: bool, full: tuple[int, int, int], stored: tuple[int, int, int]
) -> None:
    for dtype, expected in ((None, full), (BF16, stored)):
        model = nn.ModuleDict({"one": nn.Linear(IN, OUT, bias=False), "two": nn.Linear(IN, OUT, bias=False)})
        inject(model, LoRA(r=R), ["one"], frozen_dtype=dtype)
        x = torch.randn(rows, IN).requires_grad_()
        assert costs(model["one" if has_adapter else "two"], x, amp=True) == expected


def test_a_weight_takes_half_the_memory() -> None:
    model = Block()
    before = model.plain.weight.untyped_storage().nbytes()
    inject(model, LORA, frozen_dtype=BF16)
    assert model.plain.weight.untyped_storage().nbytes() == before // 2


# Files


@pytest.mark.parametrize("dtype", HALF)
def test_an_adapter_loads_onto_the_base_in_full_and_the_other_way_round(dtype: torch.dtype, tmp_path: Path) -> None:
    stored, full = adapted(Block(), LORA, dtype), adapted(Block(), LORA, None)
    assert base_weights(sites(stored)) == base_weights(sites(full))
    for model, name in ((stored, "stored"), (full, "full")):
        save_adapter(model, tmp_path / name)
    fresh: list[Callable[[], nn.Module]] = [Block, lambda: adapted(Block(), LORA, dtype)]
    for name in ("stored", "full"):
        for build in fresh:
            other = build()
            load_adapter(other, tmp_path / name)
            assert_same_bits(
                {n: p for n, p in other.named_parameters() if "adapters" in n},
                {n: p for n, p in stored.named_parameters() if "adapters" in n},
            )


def test_a_run_goes_on_from_a_checkpoint_with_or_without(tmp_path: Path) -> None:
    module = fit(tmp_path, Lit(), "bfloat16")
    path = tmp_path / "one.ckpt"
    module.trainer.save_checkpoint(path)
    for dtype in ("bfloat16", None):
        other = Lit()
        trainer = L.Trainer(
            accelerator="cpu",
            precision="bf16-mixed",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=[LoRACallback(LORA, frozen_dtype=dtype)],
        )
        trainer.validate(other, loader(), ckpt_path=path, verbose=False, weights_only=True)
        assert_same_bits(
            {n: p for n, p in other.named_parameters() if "adapters" in n},
            {n: p for n, p in module.named_parameters() if "adapters" in n},
        )
