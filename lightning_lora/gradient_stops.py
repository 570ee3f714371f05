"""Layers that no gradient passes through: adapters below them would never be trained."""

from __future__ import annotations

from torch import nn

from lightning_lora.quantized import gives_no_gradient
from lightning_lora.sites import clean

_PACKAGES = ("torch.ao.nn.quantized.", "torch.ao.nn.intrinsic.quantized.", "torch.ao.nn.sparse.quantized.")
_PASSES = {"FloatFunctional", "FXFloatFunctional"}  # stand-ins for `+` in models that may be quantized later


def why_no_gradient(module: nn.Module) -> str | None:
    """Return what a layer is, in words, if no gradient passes through it, else None.

    Args:
        module: Any layer; those of ``torch.ao`` compute on packed integers by operations without a backward, except
            for its reference layers, which compute in floating point.
    """
    for cls in type(module).__mro__:
        package = f"{cls.__module__}."
        if package.startswith(_PACKAGES) and ".reference." not in package and type(module).__name__ not in _PASSES:
            how = "dynamically quantized" if ".dynamic." in package else "quantized"
            return f"a {how} {type(module).__name__} of torch.ao, through which no gradient passes"
    if gives_no_gradient(module):
        return "a linear layer that quantizes its input by torchao, through which no gradient passes"
    return None


def gradient_stops(model: nn.Module) -> str:
    """Return a sentence, ended by a space, that names the layers which no gradient passes; empty if there are none.

    Args:
        model: The whole model; parts of such a layer are not named beside it.
    """
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        what = why_no_gradient(module)
        if what is not None and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = f"{clean(name)} is {what}"
    if not found:
        return ""
    others = f" ({len(found) - 1} more are like it)" if len(found) > 1 else ""
    return f"{next(iter(found.values()))}{others}: adapters before it cannot learn. "
