r"""Delta-LoRA (Zi et al., 2023, arXiv:2309.02411).

The paper adds each step's change of the low-rank product to the base: ``W <- W + ratio * s * (B' A' - B A)``. The sum
of these differences telescopes, so after any number of steps ``W = W0 + ratio * s * (B A - B_K A_K)``, with the factors
``A_K``, ``B_K`` from just before the first of them. This is computed here beside the base, which is never written to::

       x (..., in)
       |        \
       |         down = [lora_A; snapshot_A] (2r, in)
     W (out, in)  |
     frozen      up = [(1 + ratio) * lora_B, -ratio * snapshot_B] (out, 2r)
       |        /
       + <--- * s = alpha / r        lora_A and lora_B get the gradients that they have in LoRA
       |
       y (..., out)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.adapter import Role
from lightning_lora.methods.lora import LoRA, LoRAAdapter
from lightning_lora.schedule import Schedule

if TYPE_CHECKING:
    from lightning_lora.sites import Site


@dataclass(frozen=True, kw_only=True)
class DeltaLoRA(LoRA):
    """LoRA whose product's changes are added to the base as well, in closed form: the base stays as it is.

    Args:
        r: As for ``LoRA``.
        alpha: As for ``LoRA``.
        dropout: Must be 0, as in the paper: only then is the gradient of ``lora_B @ lora_A`` that of W.
        scaling: As for ``LoRA``.
        update_ratio: The paper's lambda: how much of each change is added to the base; 0 is LoRA.
        start_step: The paper's K: the base changes in the steps t > K, where the run's first step is t = 0. So K + 1
            steps are plain LoRA; -1 starts with the first step.

    Raises:
        ValueError: If a value is out of its range.
    """

    averageable: ClassVar[Literal["all", "trained", "nothing"]] = "trained"  # the copy comes all at once
    refused: ClassVar[Mapping[str, str]] = {
        "magnitude": "Delta-LoRA adds the low-rank increment to W, DoRA renormalises W: the increment is not defined",
        "threshold": "one shared increment would be added to several W",
    }
    update_ratio: float = 2.0
    start_step: int = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dropout:
            raise ValueError(
                f"dropout={self.dropout}: with dropout on the adapter's input the gradient of lora_B @ lora_A is not "
                "that of the base's weight, which Delta-LoRA takes it for: use dropout=0"
            )
        if not (isinstance(self.update_ratio, int | float) and 0 <= self.update_ratio < math.inf):
            raise ValueError(
                f"update_ratio={self.update_ratio!r}: must be a finite number of at least 0, such as update_ratio=2"
            )
        if isinstance(self.start_step, bool) or not isinstance(self.start_step, int) or self.start_step < -1:
            raise ValueError(
                f"start_step={self.start_step!r}: must be a whole number of at least -1, which changes the base from "
                "the first step on; start_step=500 leaves 501 steps plain"
            )

    @override
    def kind(self) -> type[LoRAAdapter]:
        return DeltaLoRAAdapter

    @override
    def schedules(self, sites: Sequence[Site], task: str, total_steps: int | None = None) -> list[Schedule]:
        adapters = [cast(DeltaLoRAAdapter, site.adapter(task)) for site in sites]
        return [*super().schedules(sites, task, total_steps), Propagation(adapters, self.start_step)]

    @override
    def peft_config(self) -> None:
        """Return None: PEFT has no Delta-LoRA; ``offline.export`` writes what was trained as a LoRA of rank 2r."""

    @classmethod
    @override
    def from_peft(cls, config: Mapping[str, Any]) -> None:
        """Return None: what PEFT calls LORA is LoRA."""


class DeltaLoRAAdapter(LoRAAdapter):
    """The pair of LoRA, and a copy of it from just before the first step that changes the base.

    Attributes:
        propagates: Whether there is such a copy. It is read off the tensors where a state is loaded: both are zero
            until it is made. While they are, the adapter computes exactly what LoRA does.
    """

    roles: ClassVar[dict[str, Role]] = {**LoRAAdapter.roles, "snapshot_A": "A", "snapshot_B": "B"}

    def __init__(self, method: DeltaLoRA, shape: tuple[int, ...], **factory: Any) -> None:
        super().__init__(method, shape, **factory)
        self.update_ratio = method.update_ratio
        self.propagates = False
        self.snapshot_A = nn.Parameter(torch.zeros_like(self.lora_A), requires_grad=False)
        self.snapshot_B = nn.Parameter(torch.zeros_like(self.lora_B), requires_grad=False)

    @override
    def reset_parameters(self) -> None:
        """Start as LoRA does, without a snapshot."""
        super().reset_parameters()
        self.propagates = False
        if hasattr(self, "snapshot_A"):  # not while LoRA's own parameters are made
            with torch.no_grad():
                self.snapshot_A.zero_()
                self.snapshot_B.zero_()

    @torch.no_grad()
    def take_snapshot(self) -> None:
        """Copy the pair: what it changes by from now on is added to the base."""
        self.snapshot_A.copy_(self.lora_A)
        self.snapshot_B.copy_(self.lora_B)
        self.propagates = True

    @override
    def factors(self) -> tuple[Tensor, Tensor]:
        """Return LoRA's factors, or from the snapshot on ``up`` (out, 2r) and ``down`` (2r, in).

        The part that stands for the base's change passes gradients on to the input only. ``lora_B`` has a gradient of
        its own, that of LoRA, in ``lora_B + ratio * sg(lora_B)``. That of ``lora_A`` would be ``1 + ratio`` times
        LoRA's, so it is scaled back, in a form whose value is ``lora_A`` exactly.
        """
        if not self.propagates or self.update_ratio == 0:
            return super().factors()
        ratio, a, b = self.update_ratio, self.lora_A.detach(), self.lora_B.detach()
        up = torch.cat([self.lora_B + ratio * b, -ratio * self.snapshot_B], -1)
        down = torch.cat([a + (self.lora_A - a) / (1 + ratio), self.snapshot_A], -2)
        if self.lora_B0 is None:
            return up, down
        start = self.lora_A.detach() if self.lora_A0 is None else self.lora_A0
        return torch.cat([up, -self.lora_B0], -1), torch.cat([down, start], -2)

    @override
    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        snapshot = (self.snapshot_A, self.snapshot_B)
        self.propagates = not self.snapshot_A.is_meta and any(bool(tensor.any()) for tensor in snapshot)


class Propagation(Schedule):
    """Lets the base follow from step ``start_step + 1`` on; adapters that were loaded with a snapshot go on with it.

    Args:
        adapters: All of the task.
        start_step: The paper's K.
    """

    def __init__(self, adapters: Sequence[DeltaLoRAAdapter], start_step: int) -> None:
        super().__init__()
        self.adapters = adapters
        self.start_step = start_step

    @override
    def before_step(self, optimizer: Optimizer) -> None:
        """Copy the factors before the first step that changes the base."""
        if self.step > self.start_step:
            for adapter in self.adapters:
                if not adapter.propagates:
                    adapter.take_snapshot()
