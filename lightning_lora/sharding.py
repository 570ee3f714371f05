"""Tensors of which each process holds a part (DTensors): looked at, put together, spread."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor


def is_sharded(tensor: object) -> bool:
    """Tell whether each process holds only a part of a tensor."""
    return isinstance(tensor, DTensor)


def is_flattened(tensor: object) -> bool:
    """Tell whether a parameter is this process's part of a vector that the first FSDP made of several."""
    return hasattr(tensor, "_fsdp_flattened")


def split_by_columns(model: nn.Module) -> list[str]:
    """Return the names of parameters that are divided in another way than by ``fully_shard`` over their rows.

    Such are those of tensor parallelism: what a layer gives is divided too, and an adapter's output would not fit it.

    Args:
        model: Any module.
    """
    managed = any(isinstance(module, FSDPModule) for module in model.modules())
    return [
        name
        for name, parameter in model.named_parameters()
        if isinstance(parameter, DTensor)
        and not (managed and parameter.placements[-1] == Shard(0) and set(parameter.placements[:-1]) <= {Replicate()})
    ]


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor put together from all processes, each of which has to call this; a plain one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, as the memory itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def spread(value: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor divided as another one is, without communication; as it is where that is not divided.

    Args:
        value: The whole tensor, the same on every process.
        like: A parameter.
    """
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def take(tensor: Tensor, index: Tensor) -> Tensor:
    """Return the values at positions of the flattened tensor; of a sharded one these alone are exchanged.

    Args:
        tensor: A tensor, sharded over its rows or whole; if it is sharded each process has to call this.
        index: Positions.
    """
    if not isinstance(tensor, DTensor):
        return tensor.reshape(-1)[index]
    local, rows = tensor.to_local().reshape(-1), tensor.shape[0]
    values = torch.zeros(len(index), dtype=torch.promote_types(tensor.dtype, torch.float32), device=local.device)
    divided = tensor.placements.index(Shard(0))
    per_process = -(-rows // tensor.device_mesh.size(divided)) * (tensor.numel() // max(rows, 1))
    ours = index.to(local.device) - tensor.device_mesh.get_local_rank(divided) * per_process
    here = (ours >= 0) & (ours < len(local))
    values[here] = local[ours[here]].to(values.dtype)
    dist.all_reduce(values, group=tensor.device_mesh.get_group(divided))
    return values.to(tensor.dtype)
