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

With ``in_place=True`` the same sum is written to W while a run lasts, and only the pair is computed beside it.
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

    Written to the base, in place, they give the same numbers up to rounding. That takes a base in fp32 or fp64, and a
    copy of its adapted weights, from which they come back bit for bit when the run ends or the adapters are removed.

    Args:
        r: As for ``LoRA``.
        alpha: As for ``LoRA``.
        dropout: Must be 0, as in the paper: only then is the gradient of ``lora_B @ lora_A`` that of W.
        scaling: As for ``LoRA``.
        update_ratio: The paper's lambda: how much of each change is added to the base; 0 is LoRA.
        start_step: The paper's K: the base changes in the steps t > K, where the run's first step is t = 0. So K + 1
            steps are plain LoRA; -1 starts with the first step.
        in_place: Write the base's share of the change to its weights after every step of a run, as the paper does.

    Raises:
        ValueError: If a value is out of its range.
    """

    refused: ClassVar[Mapping[str, str]] = {
        "magnitude": "Delta-LoRA adds the low-rank increment to W, DoRA renormalises W: the increment is not defined",
        "threshold": "one shared increment would be added to several W",
    }
    update_ratio: float = 2.0
    start_step: int = 500
    in_place: bool = False

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

    @property
    def averageable(self) -> Literal["trained", "nothing"]:  # type: ignore[override]
        """What steps can be averaged over: not the copy, which comes all at once, and no factors that W goes with."""
        return "nothing" if self.in_place else "trained"

    @property
    def writes_to_base(self) -> bool:  # type: ignore[override]
        """Whether the base's share of the change is written to its weights."""
        return self.in_place

    @override
    def kind(self) -> type[LoRAAdapter]:
        return DeltaLoRAAdapter

    @override
    def schedules(self, sites: Sequence[Site], task: str, total_steps: int | None = None) -> list[Schedule]:
        adapters = [cast(DeltaLoRAAdapter, site.adapter(task)) for site in sites]
        added = Propagation(adapters, self.start_step)
        if self.in_place:
            added = InPlacePropagation(sites, adapters, self.start_step, task)
        return [*super().schedules(sites, task, total_steps), added]

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
        in_base: Whether the base's weight itself holds the base's share of the change at the moment.
    """

    roles: ClassVar[dict[str, Role]] = {**LoRAAdapter.roles, "snapshot_A": "A", "snapshot_B": "B"}

    def __init__(self, method: DeltaLoRA, shape: tuple[int, ...], **factory: Any) -> None:
        super().__init__(method, shape, **factory)
        self.update_ratio = method.update_ratio
        self.propagates = self.in_base = False
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

    @torch.no_grad()
    def change_of_base(self) -> Tensor:
        """Return the base's share of the change (out, in), ``ratio * s * (B A - B_K A_K)``."""
        change = self.lora_B @ self.lora_A - self.snapshot_B @ self.snapshot_A
        return self.update_ratio * self.scaling * change

    @override
    def factors(self) -> tuple[Tensor, Tensor]:
        """Return LoRA's factors, or from the snapshot on ``up`` (out, 2r) and ``down`` (2r, in).

        The part that stands for the base's change passes gradients on to the input only. ``lora_B`` has a gradient of
        its own, that of LoRA, in ``lora_B + ratio * sg(lora_B)``. That of ``lora_A`` would be ``1 + ratio`` times
        LoRA's, so it is scaled back, in a form whose value is ``lora_A`` exactly.
        """
        if not self.propagates or self.in_base or self.update_ratio == 0:
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


class InPlacePropagation(Propagation):
    """Writes the base's share of the change to the base after each step, and gives it its values back at the end.

    What is written is the base's own values plus the whole sum, not the step's difference added to what is there: it
    is rounded once, and a run that is resumed from the factors goes on bit for bit.

    Args:
        sites: The adapted matrices.
        adapters: Theirs.
        start_step: The paper's K.
        task: The adapters' name.

    Raises:
        ValueError: If a weight is not held in full precision.
    """

    def __init__(self, sites: Sequence[Site], adapters: Sequence[DeltaLoRAAdapter], start_step: int, task: str) -> None:
        super().__init__(adapters, start_step)
        self.places = [(site, site.slot, adapter) for site, adapter in zip(sites, adapters, strict=True)]
        self.task = task
        for site in sites:
            weight = site.weight
            if type(weight) is not nn.Parameter or weight.dtype not in (torch.float32, torch.float64):
                held = "no parameter" if weight is None else f"a {type(weight).__name__} of {weight.dtype}"
                raise ValueError(
                    f"in_place=True: {site.name} is {held}, to which the change cannot be added without loss: use "
                    "in_place=False, which computes the same and leaves the base alone"
                )

    @override
    def after_step(self, optimizer: Optimizer) -> None:
        """Write what the base changed by since the snapshot."""
        self._write()
        super().after_step(optimizer)

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._write()

    @override
    def end(self) -> None:
        """Have the base as it was: the adapters add the change from now on."""
        for site, slot, adapter in self.places:
            slot.restore(cast(nn.Parameter, site.weight))
            adapter.in_base = False

    def _write(self) -> None:
        for site, slot, adapter in self.places:
            weight = cast(nn.Parameter, site.weight)
            adapter.in_base = adapter.propagates
            if adapter.propagates:
                slot.write(weight, adapter.change_of_base(), self.task)
            else:  # back at a state from before the first write
                slot.restore(weight)
