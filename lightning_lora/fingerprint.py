"""A short digest of the base weight at each site, by which files tell the base that their adapters belong to."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from lightning_lora.layers import kind_of
from lightning_lora.layers.seam import AdaptedLayer
from lightning_lora.quantized import identifying_values
from lightning_lora.sharding import take
from lightning_lora.sites import BaseWeight, Site, slots_at, slots_of

_BLOCKS, _BLOCK = 64, 64


def base_weights(found: list[Site]) -> dict[str, BaseWeight]:
    """Return what there is to say of each site's base weight, by site name, as noted or as it is now.

    Args:
        found: Sites whose weights hold the base's values; if these are sharded each process has to call this.
    """
    return {site.name: _noted(site) or _base_weight(site) for site in found}


def note_base_weights(found: list[Site]) -> None:
    """Keep what there is to say of each site's base weight now, for a time when it cannot be looked at.

    Args:
        found: As for `base_weights`.
    """
    for site in found:
        site.slot.base_weight = _noted(site) or _base_weight(site)


def _noted(site: Site) -> BaseWeight | None:
    slot = slots_of(site.module).get(site.name.rpartition(".")[2])
    return None if slot is None else slot.base_weight


def _base_weight(site: Site) -> BaseWeight:
    size = (kind_of(site.module) or AdaptedLayer).size(site.module, site.parameter)
    return BaseWeight(digest(base_values(site)), tuple(size))


def base_values(site: Site) -> Tensor | None:
    """Return a base parameter's or buffer's values, without what a task wrote to it; None if there are none."""
    buffer = site.module._buffers.get(site.parameter)
    values = identifying_values(site.module, site.parameter) if buffer is None else buffer
    for slot in slots_at(site.module, site.parameter):
        values = values if values is None else slot.unwritten(values)
    return values


@torch.no_grad()
def digest(weight: Tensor | None) -> str | None:
    """Return a short digest of a weight's shape and of 64 evenly spaced blocks of 64 of its values.

    Values are rounded to bf16 first, so a weight has the same digest in fp32 and in bf16. On the meta device there is
    none.

    Args:
        weight: Any tensor, also a sharded one; None is a weight that is computed, which has no digest.
    """
    if weight is None or weight.is_meta:
        return None
    last = max(0, weight.numel() - _BLOCK)
    starts = torch.arange(_BLOCKS, device=weight.device) * last // (_BLOCKS - 1)  # whole numbers: alike on every device
    index = (starts[:, None] + torch.arange(min(_BLOCK, weight.numel()), device=weight.device)).reshape(-1)
    sample = take(weight.detach(), index)
    sample = sample.to(torch.bfloat16) if sample.is_floating_point() else sample
    digest = hashlib.sha256(str(list(weight.shape)).encode())
    digest.update(sample.cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
