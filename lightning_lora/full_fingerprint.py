"""The full fingerprint of a base: a digest of every frozen weight. The usual one samples those that are adapted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_lora.files import AdapterError, some
from lightning_lora.fingerprint import base_values
from lightning_lora.sharding import is_flattened, whole
from lightning_lora.sites import Site, clean, join
from lightning_lora.state import base_entries

Fingerprint = Literal["sampled", "full"]
_BLOCK = 2**24  # values that are hashed at a time


def check_fingerprint(fingerprint: str) -> None:
    """Raise ``ValueError`` unless a kind of fingerprint is one that there is."""
    if fingerprint not in get_args(Fingerprint):
        raise ValueError(f"fingerprint={fingerprint!r}: must be 'sampled' or 'full'")


def frozen_digests(model: nn.Module) -> dict[str, str]:
    """Return the digest of each parameter and persistent buffer of the frozen base that has values, by clean name.

    Args:
        model: The adapted model; the base is read once.
    """
    frozen = {clean(name) for name in base_entries(model)}
    found = {site.name: full_digest(base_values(site)) for site in _entries(model) if site.name in frozen}
    return {name: digest for name, digest in found.items() if digest is not None}


def check_frozen_digests(path: object, model: nn.Module, root: str, expected: Mapping[str, str]) -> None:
    """Check all weights of a base against the digests that a file has of them; what has no values yet passes.

    Args:
        path: For the message.
        model: The base, or the model that holds it.
        root: The name, in the model, of the network that the digests are of.
        expected: What `frozen_digests` returned, by names in the network.

    Raises:
        AdapterError: If a weight has other values, or is not there.
    """
    if not expected:
        return
    live = {site.name: site for site in _entries(model)}
    other = [
        name
        for name, digest in ((join(root, name), digest) for name, digest in expected.items())
        if name not in live or full_digest(base_values(live[name])) not in (None, digest)
    ]
    if other:
        raise AdapterError(
            f"{path}: trained on another base: {len(other)} of all its {len(expected)} weights differ ({some(other)}). "
            "Load the base that it was trained on, in that precision, or pass allow_base_mismatch=True"
        )


@torch.no_grad()
def full_digest(weight: Tensor | None) -> str | None:
    """Return a digest of a weight's shape and of all its values; None where it has none that can be looked at.

    Values are hashed as fp32, which holds those of bf16 and fp16 exactly; fp64 and whole numbers as they are.

    Args:
        weight: Any tensor; if it is sharded each process has to call this.
    """
    if weight is None or weight.is_meta or is_flattened(weight) or weight.layout != torch.strided:
        return None
    found = hashlib.sha256(str(list(weight.shape)).encode())
    for block in torch.split(whole(weight.detach()).reshape(-1), _BLOCK):
        values = block.cpu().contiguous()
        values = values.float() if values.is_floating_point() and values.dtype != torch.float64 else values
        found.update(values.view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def _entries(model: nn.Module) -> Iterator[Site]:
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name in (*module._parameters, *module._buffers):
            yield Site(clean(join(prefix, name)), module, name)
