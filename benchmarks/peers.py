"""Linear layers with LoRA of other libraries, where these are installed; nothing of theirs is here.

torchtune's cannot be among them: its last version (0.6.1) imports beside torchao 0.9 but not beside 0.12 or 0.18, and
PEFT 0.21 stops where it finds a torchao before 0.16, so no process can hold both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

import torch
from torch import nn

Build = Callable[[nn.Linear, int, float], nn.Module]


def _loralib() -> Build:
    kind = import_module("loralib").Linear
    return lambda linear, r, dropout: kind(
        linear.in_features, linear.out_features, r, 16, dropout, bias=linear.bias is not None, merge_weights=False
    )


def _litgpt() -> Build:
    kind = import_module("litgpt.lora").LoRALinear
    return lambda linear, r, dropout: kind(
        linear.in_features, linear.out_features, r, 16, dropout, bias=linear.bias is not None
    )


PEERS: dict[str, Callable[[], Build]] = {"loralib": _loralib, "litgpt": _litgpt}


def installed() -> dict[str, str]:
    """Return "" for each peer that can be imported, and what its import raised for each that cannot."""
    found = {}
    for name, load in PEERS.items():
        try:
            load()
            found[name] = ""
        except (ImportError, RuntimeError, AttributeError) as error:
            found[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return found


def adapt(
    model: nn.Module, names: Sequence[str], build: Build, r: int, dropout: float, adapters: torch.dtype
) -> nn.Module:
    """Put another library's layers, with the same weights, in the place of linear ones, and train their factors alone.

    Args:
        model: The model, which is changed.
        names: The layers.
        build: An entry of ``PEERS``, called.
        r: The rank.
        dropout: Probability with which an element of a low-rank term's input is zeroed.
        adapters: The dtype of the factors.
    """
    for name in names:
        parent, _, last = name.rpartition(".")
        linear = model.get_submodule(name)
        layer = build(linear, r, dropout)  # type: ignore[arg-type]
        inner = getattr(layer, "linear", layer)
        inner.weight, inner.bias = linear.weight, linear.bias
        for key, parameter in layer.named_parameters():
            if "lora_" in key:
                parameter.data = parameter.data.to(adapters)
        setattr(model.get_submodule(parent), last, layer.to(linear.weight.device))
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in key)
    return model
