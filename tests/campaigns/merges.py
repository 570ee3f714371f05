"""Merge and unmerge a hundred times, and count the weights of the base that are not what they were."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import nn

from lightning_lora import LoRA, inject, merged

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Drift(NamedTuple):
    """What the cycles left: the share of weights that changed, and by how much, relative to their norm."""

    changed: float
    error: float


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64)).to(dtype)


def drift(before: list[torch.Tensor], after: list[torch.Tensor]) -> Drift:
    one, other = (torch.cat([weight.detach().double().flatten() for weight in weights]) for weights in (before, after))
    return Drift((one != other).double().mean().item(), ((one - other).norm() / one.norm()).item())


def trained(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape))


def ours(dtype: torch.dtype, cycles: int) -> Drift:
    model = network(dtype)
    before = copy.deepcopy([model[0].weight, model[1].weight])
    inject(model, LoRA(r=8), ["0", "1"], seed=0)
    trained(model)
    for _ in range(cycles):
        with merged(model):
            pass
    return drift(before, [model[0].weight, model[1].weight])


def by_peft(dtype: torch.dtype, cycles: int) -> Drift:
    from peft import LoraConfig, get_peft_model

    plain = network(dtype)
    before = copy.deepcopy([plain[0].weight, plain[1].weight])
    model = get_peft_model(plain, LoraConfig(r=8, lora_alpha=16, target_modules=["0", "1"]))
    trained(model)
    for _ in range(cycles):
        model.merge_adapter()
        model.unmerge_adapter()
    layers = model.base_model.model
    return drift(before, [layers[0].base_layer.weight, layers[1].base_layer.weight])
