r"""HiRA (Huang et al., ICLR 2025): a low-rank factor on each entry of the weight.

::

    W' = W * (1 + alpha / r * lora_B @ lora_A)     entry by entry; W frozen, lora_B zero at the start

A product entry by entry of matrices of ranks p and q can have any rank up to p * q. So the change has a rank of up to r
times that of W with LoRA's number of parameters, and an entry of W that is zero stays zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_lora.initialisations import KEEPS_START
from lightning_lora.methods.lora import LoRA, LoRAAdapter


@dataclass(frozen=True, kw_only=True)
class HiRA(LoRA):
    """Hadamard high-rank adaptation: ``W' = W * (1 + alpha / r * B @ A)``, entry by entry.

    Args:
        r: Rank of the factor; the adapter of an (out, in) matrix has ``r * (in + out)`` parameters.
        alpha: Scale of the factor's distance from 1. Equal to r it is PEFT's HiRA, which has no scale.
        dropout: Probability with which an element of the input of the change is zeroed during training.
        scaling: As for ``LoRA``.
        init: As for ``LoRA``, but for those that take a part of the weight.
        gradient: Must be ``plain``.
        freeze_A: As for ``LoRA``.

    Raises:
        ValueError: If a value is out of its range.
    """

    refused_inits: ClassVar[Mapping[str, str]] = dict.fromkeys(
        KEEPS_START, "HiRA's product multiplies the weight, and this start is a part of it"
    )
    r: int = 32
    alpha: float = 32.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gradient != "plain":
            raise ValueError(
                f"gradient={self.gradient!r} is derived for a change that is scale * B @ A, and HiRA's is W times "
                "that: use gradient='plain'"
            )

    @override
    def kind(self) -> type[LoRAAdapter]:
        return HiRAAdapter

    @override
    def peft_config(self) -> dict[str, Any]:
        return {"peft_type": "HIRA", "r": self.r, "hira_dropout": self.dropout}

    @classmethod
    @override
    def from_peft(cls, config: Mapping[str, Any]) -> HiRA | None:
        if config.get("peft_type") != "HIRA":
            return None
        r = config.get("r", 32)
        return cls(r=r, alpha=float(r), dropout=config.get("hira_dropout", 0.0))


class HiRAAdapter(LoRAAdapter):
    """LoRA's pair, whose product multiplies the weight."""

    low_rank = False
    needs_weight = True

    @override
    def why_not_peft(self) -> str | None:
        if self.scaling != 1:
            return f"PEFT's HiRA has no scale, and alpha={self.method.alpha:g} with r={self.method.r} is one"
        return super().why_not_peft()

    @override
    def adapted(self, weight: Tensor) -> Tensor:
        return (weight + weight * self.delta()).to(weight.dtype)

    @override
    def add_change(self, weight: Tensor, up: Tensor, down: Tensor) -> None:
        weight.addcmul_(weight, up @ down, value=self.scaling)

    @override
    def change(self, weight: Tensor) -> Tensor:
        return weight * self.delta()  # not the difference of two rounded weights: exactly 0 at the start
