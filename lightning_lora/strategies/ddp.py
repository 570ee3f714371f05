"""``lora_ddp``: a copy of the model on every process, of which what is frozen need not be sent at the start."""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_lora.files import some
from lightning_lora.sites import clean, join
from lightning_lora.state import marked

_CHUNK = 2**22
_MODULUS = 2**62
_SPREAD = 0x1E3779B97F4A7C15  # odd, with bits all over


class LoRADDPStrategy(DDPStrategy):
    """DDP for adapters over a frozen base.

    As ``ddp``, but that buffers are not sent before each forward where none of them can change, and that messages name
    adapters.

    Args:
        broadcast_base: Send what is frozen from rank 0 to all others when the fit starts, as ``ddp`` does. Without
            that only what is trained is sent, and the ranks compare checksums of the rest.
        kwargs: As for Lightning's ``DDPStrategy``, those of PyTorch's ``DistributedDataParallel`` among them.
    """

    def __init__(self, broadcast_base: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.broadcast_base = broadcast_base

    @override
    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        """Wrap the model.

        Raises:
            ValueError: If nothing in it is trained, or what is not sent differs between ranks.
        """
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                f"strategy={type(self).__name__}: no parameter of {type(model).__name__} requires a gradient, so there "
                "is nothing to train: give Trainer(callbacks=[LoRACallback(...)]), or call inject(model, LoRA()) first"
            )
        if not self.broadcast_base:
            unsent = _frozen(model)
            check_alike(unsent, self.root_device)
            model._ddp_params_and_buffers_to_ignore = list(unsent)  # type: ignore[assignment]
        try:
            wrapped = super()._setup_model(model)
        finally:
            model.__dict__.pop("_ddp_params_and_buffers_to_ignore", None)
        if not {"broadcast_buffers", "forward_sync_buffers"} & self._ddp_kwargs.keys() and not _changing(model):
            wrapped.broadcast_buffers = False
        return wrapped

    @override
    def on_exception(self, exception: BaseException) -> None:
        """Name the adapters where DDP found that parameters took no part in the last step."""
        if "Expected to have finished reduction in the prior iteration" not in str(exception):
            return
        assert self.lightning_module is not None
        trained = {name: one for name, one in self.lightning_module.named_parameters() if one.requires_grad}
        idle = [clean(name) for name, one in trained.items() if one.grad is None]
        exception.args = (
            f"{len(idle)} of {len(trained)} trained parameters got no gradient from the last batch: {some(idle)}. "
            "Leave out layers that no batch uses with LoRACallback(exclude_modules=[...]); if they are used by turns, "
            f"set LoRACallback(audit=False) and strategy={type(self).__name__}(find_unused_parameters=True)",
        )


def check_alike(tensors: dict[str, Tensor], device: torch.device) -> None:
    """Check that all ranks hold the same tensors, of which only checksums are compared.

    Args:
        tensors: By name, in the same order on every rank.
        device: Where the process group communicates.

    Raises:
        ValueError: If they do not.
    """
    count = torch.tensor([len(tensors), -len(tensors)], device=device)
    dist.all_reduce(count, dist.ReduceOp.MAX)
    most, least = count[0].item(), -count[1].item()
    if most != least:
        raise ValueError(
            f"broadcast_base=False: one rank has {least} frozen tensors and another {most}, so their models differ: "
            "build the same model on every rank"
        )
    sums = torch.stack([checksum(name, tensor).to(device) for name, tensor in tensors.items()])
    both = torch.cat([sums, -sums])
    dist.all_reduce(both, dist.ReduceOp.MAX)
    highest, lowest = both[: len(sums)], -both[len(sums) :]
    differing = [name for name, differs in zip(tensors, (highest != lowest).tolist(), strict=True) if differs]
    if differing:
        raise ValueError(
            f"broadcast_base=False: {len(differing)} of {len(tensors)} frozen tensors differ between ranks, the first "
            f"is {clean(differing[0])}: load the same weights on every rank, or leave broadcast_base=False out"
        )


def checksum(name: str, tensor: Tensor) -> Tensor:
    """Return a number that changes with any byte of a tensor, its name, shape and dtype: below 2 ** 62, int64.

    Every byte is multiplied by an odd number of its place, so that a change of one of them never cancels.

    Args:
        name: The tensor's name.
        tensor: Any dense tensor.
    """
    if hasattr(tensor, "__tensor_flatten__"):  # packed: several tensors in the form of one
        parts = [checksum(f"{name}.{part}", getattr(tensor, part)) for part in tensor.__tensor_flatten__()[0]]
        return torch.stack(parts).sum() % _MODULUS
    total = torch.tensor(zlib.crc32(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode()), device=tensor.device)
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for number, part in enumerate(torch.split(data, _CHUNK)):
        place = torch.arange(number * _CHUNK, number * _CHUNK + len(part), device=tensor.device)
        total += ((part.long() + 1) * (place * _SPREAD % _MODULUS * 2 + 1)).sum()
    return total % _MODULUS


def _frozen(model: nn.Module) -> dict[str, Tensor]:
    """Return what training leaves as it is, by name."""
    changing = _changing(model)
    frozen = {name: parameter.data for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return frozen | {name: buffer for name, buffer in model.named_buffers() if name not in changing}


def _changing(model: nn.Module) -> set[str]:
    """Return the names of buffers that a forward may change: none of a norm held still, nor any that is not stored."""
    found: set[str] = set()
    for prefix, module in model.named_modules():
        held_still = "train" in module.__dict__  # as LoRACallback does to norms with frozen statistics
        for name, buffer in module._buffers.items():
            stored = name not in module._non_persistent_buffers_set
            if buffer is not None and stored and (name in marked(module) or not held_still):
                found.add(join(prefix, name))
    return found
