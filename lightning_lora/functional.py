"""The low-rank step: what an adapter adds to the output of a layer that it sits on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def low_rank_step(y: Tensor, x: Tensor, up: Tensor, down: Tensor, scaling: float) -> Tensor:
    """Return ``y + scaling * (x @ down.T) @ up.T`` in the dtype of ``y``.

    The small factors are cast to the dtype of ``x``, never ``x`` to theirs.

    Args:
        y: The base layer's output (..., out).
        x: Its input (..., in).
        up: (out, r).
        down: (r, in).
        scaling: The factor on the low-rank term.
    """
    z = F.linear(x, down.to(x.dtype))
    return torch.add(y, F.linear(z, up.to(z.dtype)).to(y.dtype), alpha=scaling)
