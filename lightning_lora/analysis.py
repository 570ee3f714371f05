"""Numbers about a trained adapter, from its factors alone."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lora.adapter import Adapter


@torch.no_grad()
def singular_values(adapter: Adapter) -> Tensor:
    """Return the singular values of an adapter's change, largest first, without forming the (out, in) matrix.

    With ``up = Q R`` and ``down.T = P S``, those of ``up @ down`` are those of the small ``R @ S.T``. A stack of
    matrices is taken as one block-diagonal matrix.

    Args:
        adapter: Any adapter of rank r.

    Returns:
        At most r values for each matrix, in float64.
    """
    up, down = (factor.double() for factor in adapter.factors())
    left, right = torch.linalg.qr(up).R, torch.linalg.qr(down.mT).R
    values: Tensor = abs(adapter.scaling) * torch.linalg.svdvals(left @ right.mT)
    return values.flatten().sort(descending=True).values


def effective_rank(values: Tensor) -> float:
    """Return the exponential of the entropy of normalised singular values (Roy and Vetterli, 2007); 0 for no change.

    Args:
        values: Singular values.
    """
    share = values[values > 0] / values.sum()
    return float(torch.exp(-(share * share.log()).sum())) if len(share) else 0.0
