"""One cast of an input for all layers that are given it one after the other, as q, k and v are under autocast.

Only the copy is shared. Each layer keeps a node of its own in the autograd graph, so gradients are cast and added as
they are without sharing, and every result is the same bit for bit.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Cast(NamedTuple):
    source: weakref.ref[Tensor]
    made_at: tuple[object, ...]
    copy: Tensor


class _Last:
    """The last cast of one thread, until its source is gone or there is another."""

    cast: _Cast | None = None

    def forget(self, source: weakref.ref[Tensor]) -> None:
        """Let go of the copy."""
        self.cast = None


class _Thread(threading.local):
    def __init__(self) -> None:
        self.last = _Last()


_thread = _Thread()


def shared_cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x.to(dtype)``, with the memory of the last such cast of this thread if it was of the same values.

    That is told by the tensor object and PyTorch's count of in-place changes to it. What writes to ``x`` behind that
    count, as ``x.data`` does, is not seen.

    Args:
        x: A tensor of another dtype; nothing else may hold or write to what is returned.
        dtype: A floating-point type.
    """
    if not _can_share(x):
        return x.to(dtype)
    last = _thread.last
    made_at = (x._version, dtype, torch.cuda.current_stream(x.device) if x.is_cuda else None)
    found = last.cast
    if found is not None and found.source() is x and found.made_at == made_at:
        needs_grad = torch.is_grad_enabled() and x.requires_grad
        return _Copied.apply(x, found.copy) if needs_grad else found.copy  # type: ignore[no-untyped-call]
    cast = x.to(dtype)
    last.cast = _Cast(weakref.ref(x, last.forget), made_at, cast.detach())
    return cast


def _can_share(x: Tensor) -> bool:
    """Tell whether changes are counted, and a copy that is made now has its values now: in a CUDA graph it has not."""
    if torch.is_inference_mode_enabled() or x.is_inference():
        return False
    return x.is_cpu or (x.is_cuda and not torch.cuda.is_current_stream_capturing())


class _Copied(torch.autograd.Function):
    """A cast of which the values are there already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return copy.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None
