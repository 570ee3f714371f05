"""Dropout of an adapter's input, which a CPU draws quickly, and its mask of one byte for each element."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dropout(x: Tensor, p: float) -> Tensor:
    """Return ``x`` with elements zeroed and the others divided by ``1 - p``.

    Args:
        x: Of a floating-point type.
        p: Probability with which an element is zeroed, from 0 to below 1.
    """
    looked_at = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return dropped(x, p)[0] if x.is_cpu and type(x) is Tensor and not looked_at else F.dropout(x, p)


def dropped(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Return what ``dropout`` does, and the mask of what it left.

    On a CPU PyTorch draws a mask element by element; here each 64 bits that its generator gives decide on two.

    Args:
        x: As for ``dropout``.
        p: Likewise.
    """
    if not x.is_cpu:
        return torch.native_dropout(x, p, True)
    least = min(round(p * 2**32), 2**32 - 1) - 2**31  # a comparison with a larger number would wrap around
    mask = (_bits(x.numel()) >= least).view(x.shape)
    return (x * factor(mask, x)).mul_(1 / (1 - p)), mask


def _bits(n: int) -> Tensor:
    """Return n random numbers of 32 bits."""
    return torch.empty((n + 1) // 2, dtype=torch.int64).random_(-(2**63), None).view(torch.int32)[:n]


def factor(mask: Tensor, x: Tensor) -> Tensor:
    """Return a mask as what is quickly multiplied by a tensor: in its dtype on a CPU, as it is elsewhere.

    Args:
        mask: Of booleans.
        x: The tensor.
    """
    return mask.view(torch.uint8).to(x.dtype) if x.is_cpu else mask
