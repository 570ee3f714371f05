"""Numbers about a trained adapter, from its factors alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lora.adapter import Adapter


class ThinSVD(NamedTuple):
    """Singular vectors and values of ``up @ down``, largest first, without an adapter's scaling.

    Attributes:
        left: (out, r), or (n, out, r) for a stack.
        values: (r,), or (n, r).
        right: (r, in), or (n, r, in).
    """

    left: Tensor
    values: Tensor
    right: Tensor


@torch.no_grad()
def thin_svd(adapter: Adapter) -> ThinSVD:
    """Return the singular value decomposition of an adapter's product, without forming the (out, in) matrix.

    Args:
        adapter: Any adapter of rank r.

    Returns:
        At most r values for each matrix, in float64.
    """
    return product_svd(*(factor.double() for factor in adapter.factors()))


def product_svd(up: Tensor, down: Tensor) -> ThinSVD:
    """Return the singular value decomposition of ``up @ down`` without forming it.

    With ``up = Q R`` and ``down.T = P S`` it is that of the small ``R @ S.T``, turned by Q and P.

    Args:
        up: (out, r), or (n, out, r) for a stack.
        down: (r, in), or (n, r, in).
    """
    (left, left_triangle), (right, right_triangle) = torch.linalg.qr(up), torch.linalg.qr(down.mT)
    u, values, v = torch.linalg.svd(left_triangle @ right_triangle.mT, full_matrices=False)
    return ThinSVD(left @ u, values, v @ right.mT)


def singular_values(adapter: Adapter) -> Tensor:
    """Return the singular values of an adapter's change, largest first.

    A stack of matrices is taken as one block-diagonal matrix.

    Args:
        adapter: Any adapter of rank r.

    Returns:
        At most r values for each matrix, in float64.
    """
    values: Tensor = abs(adapter.scaling) * thin_svd(adapter).values
    return values.flatten().sort(descending=True).values


def effective_rank(values: Tensor) -> float:
    """Return the exponential of the entropy of normalised singular values (Roy and Vetterli, 2007); 0 for no change.

    Args:
        values: Singular values.
    """
    share = values[values > 0] / values.sum()
    return float(torch.exp(-(share * share.log()).sum())) if len(share) else 0.0
