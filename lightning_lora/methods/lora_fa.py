r"""LoRA-FA (Zhang et al., 2023, arXiv:2308.03303): LoRA with A frozen.

::

       x (..., in)
       |        \
       |         down = lora_A (r, in)     random, frozen
     W (out, in)  |
     frozen      up = lora_B (out, r)      zero at the start; trained
       |        /
       + <--- * alpha / r

The gradient of ``lora_B`` needs ``x @ lora_A.T`` (..., r) and not ``x`` (..., in), so a layer keeps next to nothing for
the backward pass, and A has no optimizer state. In return what the change can be is bounded: of the change ``D`` that
would be best, ``D (I - P_A)`` is out of reach, where ``P_A`` projects on the rows of A. ``LoRAFA(init="eva")`` puts
these where the inputs are large, so that less is lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from typing_extensions import override

from lightning_lora.methods.lora import LoRA


@dataclass(frozen=True, kw_only=True)
class LoRAFA(LoRA):
    """LoRA that trains ``lora_B`` alone: ``LoRA(freeze_A=True)`` by its own name.

    Args:
        gradient: ``plain`` is the paper's first version, ``fa`` the second: the gradient of B that moves the weight by
            the projection of its own gradient.

    Raises:
        ValueError: If a value is out of its range.
    """

    freeze_A: bool = field(default=True, init=False)

    @classmethod
    @override
    def from_peft(cls, config: Mapping[str, Any]) -> None:
        """Return None: PEFT's files do not say that A was frozen."""
