"""The mean gradient of each weight over some batches, handed on and let go of as soon as it is complete."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Take = Callable[[Tensor], None]


class GradientMeans:
    """Takes gradients off parameters as the backward pass makes them.

    Those of all but the last batch are summed, in fp32 or wider; in the backward pass of the last one each mean is
    handed on at once, so of a single batch no more than one gradient is held at a time.

    Args:
        takers: What gets the mean gradient of each parameter.
        batches: How many batches will come.
    """

    def __init__(self, takers: Mapping[nn.Parameter, Take], batches: int) -> None:
        self.takers = takers
        self.batches = self.left = batches
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._seen: set[nn.Parameter] = set()

    @contextmanager
    def hooked(self, model: nn.Module) -> Iterator[None]:
        """Have the model's backward passes compute these gradients and no others; the flags stay so on leaving.

        Args:
            model: The model that has the parameters.
        """
        handles = []
        for parameter in model.parameters():
            parameter.grad = None
            parameter.requires_grad_(parameter in self.takers)
            if parameter in self.takers:
                handles.append(parameter.register_post_accumulate_grad_hook(self._take))  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def backward(self, loss: Any) -> None:
        """Run the backward pass of the next batch; a loss that no taken parameter is part of counts as a gradient of 0.

        Args:
            loss: Its loss.

        Raises:
            ValueError: If it is not one number in a tensor.
            RuntimeError: If a parameter gets its gradient in several parts.
        """
        if not (isinstance(loss, Tensor) and loss.numel() == 1):
            raise ValueError(
                f"the loss of a batch is {loss!r}, but a tensor of one number is needed: return what training_step does"
            )
        self.left -= 1
        self._seen.clear()
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        if not self.left:  # what the last batch did not reach
            self.finish()

    def finish(self) -> None:
        """Hand on the means of the batches that came, where those are fewer than were announced."""
        for parameter, total in self._sums.items():
            self.takers[parameter](total / (self.batches - self.left))
        self._sums.clear()

    def _take(self, parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        if parameter in self._seen:
            raise RuntimeError(
                f"a weight of shape {list(parameter.shape)} got its gradient in several parts in one batch, as "
                "reentrant checkpointing gives it to a layer that is used twice: pass use_reentrant=False"
            )
        self._seen.add(parameter)
        total: Tensor = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).to_dense()  # type: ignore[union-attr]
        if parameter in self._sums:
            total = total + self._sums.pop(parameter)
        if self.left:
            self._sums[parameter] = total
        else:
            self.takers[parameter](total / self.batches)
