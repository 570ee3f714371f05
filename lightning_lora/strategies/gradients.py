"""Gradients of what every process holds whole, averaged over processes in as few messages as there are dtypes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_lora.sharding import is_sharded, local, whole


def replicated(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are trained and that every process holds whole, in an order that all agree on.

    Args:
        model: The adapted model.
    """
    return [parameter for parameter in model.parameters() if parameter.requires_grad and not is_sharded(parameter)]


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average gradients over all processes; one that no process has stays None.

    A process without a gradient that others have counts as one of zeros. Who has which travels with the gradients, so
    a process waits for the answer only where it lacks one.

    Args:
        parameters: The same on every process, in the same order.
    """
    kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in parameters:
        kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for members in kinds.values():
        _average(members)


def _average(parameters: list[nn.Parameter]) -> None:
    gradients = [parameter.grad for parameter in parameters]
    present = parameters[0].new_tensor([gradient is not None for gradient in gradients])
    parts = [
        parameter.new_zeros(parameter.numel()) if gradient is None else gradient.reshape(-1)
        for parameter, gradient in zip(parameters, gradients, strict=True)
    ]
    message = torch.cat([*parts, present])
    dist.all_reduce(message)
    *sums, holders = torch.split(message, [*(part.numel() for part in parts), len(parts)])
    torch._foreach_div_(sums, dist.get_world_size())
    averages = [total.view_as(parameter) for total, parameter in zip(sums, parameters, strict=True)]
    ours = [(gradient, average) for gradient, average in zip(gradients, averages, strict=True) if gradient is not None]
    torch._foreach_copy_([gradient for gradient, _ in ours], [average for _, average in ours])
    if len(ours) < len(parameters):
        for parameter, average, held in zip(parameters, averages, holders.tolist(), strict=True):
            if parameter.grad is None and held:
                parameter.grad = average.clone()


@torch.no_grad()
def clip_by_norm(parameters: Iterable[Tensor], max_norm: float) -> None:
    """Scale gradients down to a norm over all of them, whole ones and sharded ones together.

    Args:
        parameters: Those of an optimizer.
        max_norm: The norm.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    divided = [gradient for gradient in gradients if is_sharded(gradient)]
    plain = [gradient for gradient in gradients if not is_sharded(gradient)]
    norms = [torch.nn.utils.get_total_norm(some) for some in (plain, divided) if some]
    if not norms:
        return
    norm = torch.stack([whole(norm) for norm in norms]).norm()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1)  # as torch.nn.utils.clip_grad_norm_ does
    torch._foreach_mul_([local(gradient) for gradient in gradients], scale)
