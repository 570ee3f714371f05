r"""ReLoRA (Lialin et al., 2023, arXiv:2307.05695).

Every ``restart_every`` steps the trained pair is folded into the base and a new one starts, so that the rank of the
whole change grows by r each time. Here it is folded into frozen factors beside the base, which is never written to::

       x (..., in)
       |        \
       |         down = [folded_A; lora_A]   (k r + r, in) after k restarts
     W (out, in)  |
     frozen      up = [folded_B, lora_B]     (out, k r + r); lora_B is zero at every start
       |        /
       + <--- * alpha / r
       |
       y (..., out)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.adapter import Role
from lightning_lora.initialisations import KEEPS_START
from lightning_lora.methods.lora import LoRA, LoRAAdapter
from lightning_lora.schedule import Schedule

if TYPE_CHECKING:
    from lightning_lora.sites import Site


@dataclass(frozen=True, kw_only=True)
class ReLoRA(LoRA):
    """LoRA that restarts: what was trained is kept in frozen factors, and a new pair is trained on top of it.

    Args:
        r: Rank of each pair; after k restarts the change has rank ``(k + 1) * r`` at most.
        alpha: As for ``LoRA``.
        dropout: Must be 0: what is folded counts as part of the base, whose input is not dropped.
        scaling: As for ``LoRA``.
        restart_every: Number of optimizer steps from one restart to the next.
        restarts: How many there are at most; the factors have room for as many.
        warmup: Number of steps over which the adapters' updates grow back to full size after a restart; 0 for none.
        prune: Share of the optimizer's state of the pair that a restart sets to zero, where the first moment is
            smallest in magnitude; 1 resets all of it. What is packed or factored (8-bit optimizers, Adafactor) stays.

    Raises:
        ValueError: If a value is out of its range.
    """

    averageable: ClassVar[Literal["all", "trained", "nothing"]] = "nothing"  # a new pair has nothing of the one before
    refused_inits: ClassVar[Mapping[str, str]] = dict.fromkeys(
        (*KEEPS_START, "orthogonal", "eva"), "a restart draws lora_A anew and sets lora_B to zero"
    )
    restart_every: int = 1000
    restarts: int = 3
    warmup: int = 50
    prune: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dropout:
            raise ValueError(
                f"dropout={self.dropout}: what is folded counts as part of the base, whose input is not dropped: use "
                "dropout=0"
            )
        if self.gradient == "fa":
            raise ValueError(
                "gradient='fa' keeps the inverse of a frozen lora_A, which a restart draws anew: use gradient='plain'"
            )
        for name, lowest in (("restart_every", 1), ("restarts", 1), ("warmup", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise ValueError(f"{name}={value!r}: must be a whole number of at least {lowest}")
        if not (isinstance(self.prune, int | float) and 0 <= self.prune <= 1):
            raise ValueError(f"prune={self.prune!r}: must be from 0 to 1, such as prune=0.99")

    @override
    def kind(self) -> type[LoRAAdapter]:
        return ReLoRAAdapter

    @override
    def schedules(self, sites: Sequence[Site], task: str, total_steps: int | None = None) -> list[Schedule]:
        adapters = [cast(ReLoRAAdapter, site.adapter(task)) for site in sites]
        return [*super().schedules(sites, task, total_steps), Restarts(adapters, self)]

    @override
    def peft_config(self) -> None:
        """Return None: PEFT has no ReLoRA; ``offline.export`` writes what was trained as a LoRA of rank (k + 1) r."""

    @classmethod
    @override
    def from_peft(cls, config: Mapping[str, Any]) -> None:
        """Return None: what PEFT calls LORA is LoRA."""


class ReLoRAAdapter(LoRAAdapter):
    """The pair that is trained, and room for those that were before it.

    Only the filled part takes part in the forward: it is LoRA until the first restart, and pays for what is there. A
    compiled model compiles again after each restart.

    Attributes:
        folds: Number of pairs folded so far. It is read off the tensors where a state is loaded: they are zero where
            nothing was folded yet.
    """

    roles: ClassVar[dict[str, Role]] = {**LoRAAdapter.roles, "folded_A": "A", "folded_B": "B"}

    def __init__(self, method: ReLoRA, shape: tuple[int, ...], **factory: Any) -> None:
        super().__init__(method, shape, **factory)
        self.restarts, self.folds = method.restarts, 0
        room = method.restarts * method.r
        self.folded_A = nn.Parameter(self.lora_A.new_zeros(*shape[:-2], room, shape[-1]), requires_grad=False)
        self.folded_B = nn.Parameter(self.lora_B.new_zeros(*shape[:-1], room), requires_grad=False)

    @override
    def reset_parameters(self) -> None:
        """Start as LoRA does, with nothing folded."""
        super().reset_parameters()
        self.folds = 0
        if hasattr(self, "folded_A"):  # not while LoRA's own parameters are made
            with torch.no_grad():
                self.folded_A.zero_()
                self.folded_B.zero_()

    @torch.no_grad()
    def restart(self) -> None:
        """Fold the pair, and draw the next one from the adapter's seed and its number."""
        begin, end = self.folds * self.method.r, (self.folds + 1) * self.method.r
        self.folded_A[..., begin:end, :] = self.lora_A
        self.folded_B[..., begin:end] = self.lora_B
        self.folds += 1
        seed = self.seed
        self.seed = int.from_bytes(hashlib.sha256(f"{seed}:{self.folds}".encode()).digest()[:8], "big") >> 1
        super().reset_parameters()
        self.seed = seed

    @override
    def factors(self) -> tuple[Tensor, Tensor]:
        """Return ``up`` (out, k r + r) and ``down`` (k r + r, in), the pairs side by side, oldest first."""
        up, down = super().factors()
        if not self.folds:
            return up, down
        filled = self.folds * self.method.r
        up = torch.cat([self.folded_B[..., :filled], up], -1)
        return up, torch.cat([self.folded_A[..., :filled, :], down], -2)

    @override
    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.folded_A.is_meta:
            return
        up = torch.unflatten(self.folded_B, -1, (self.restarts, -1)).unbind(-2)
        down = torch.unflatten(self.folded_A, -2, (self.restarts, -1)).unbind(-3)
        filled = [i for i in range(self.restarts) if bool(up[i].any()) or bool(down[i].any())]
        self.folds = max(filled, default=-1) + 1


class Restarts(Schedule):
    """Restarts the adapters, prunes the optimizer's state of them, and lets their updates warm up again.

    An update is scaled after it was made. For optimizers whose update is proportional to the learning rate this is a
    lower learning rate, whatever sets that: no group, scheduler or monitor of the user's sees anything of it, and what
    is trained in full beside the adapters goes on at full rate.

    Args:
        adapters: All of the task.
        method: The hyperparameters.
    """

    def __init__(self, adapters: Sequence[ReLoRAAdapter], method: ReLoRA) -> None:
        super().__init__()
        self.adapters = adapters
        self.method = method
        self.restarted_at: int | None = None
        self._before: list[tuple[nn.Parameter, Tensor]] = []

    @property
    def rate(self) -> float:
        """The share of the next update that is made."""
        if self.restarted_at is None or not self.method.warmup:
            return 1.0
        return min(1.0, (self.step - self.restarted_at + 1) / self.method.warmup)

    @override
    def before_step(self, optimizer: Optimizer) -> None:
        """Note where the pairs are while they warm up."""
        trained = [p for adapter in self.adapters for p in adapter.parameters() if p.requires_grad]
        self._before = [(p, p.detach().clone()) for p in trained] if self.rate < 1 else []

    @override
    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """Scale the update, and restart when it is time."""
        for parameter, before in self._before:
            parameter.copy_(torch.lerp(before, parameter, self.rate))
        self._before = []
        waiting = [adapter for adapter in self.adapters if adapter.folds < adapter.restarts]
        if waiting and (self.step + 1) % self.method.restart_every == 0:
            for adapter in waiting:
                adapter.restart()
                for parameter in adapter.parameters():
                    _prune(optimizer.state.get(parameter, {}), parameter, self.method.prune)
            self.restarted_at = self.step + 1
        super().after_step(optimizer)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "restarted_at": self.restarted_at}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.restarted_at = state["restarted_at"]


def _prune(state: Mapping[str, Any], parameter: Tensor, share: float) -> None:
    """Set a share of a parameter's state to zero, in place: where the first tensor, Adam's first moment, is smallest.

    All its tensors are pruned at the same places. Pruned by themselves, some entries would keep a first moment and lose
    the second, and lora_A has a gradient of zero in the step after a restart: the update would be divided by epsilon.
    """
    tensors = [one for one in state.values() if isinstance(one, Tensor) and one.is_floating_point()]
    tensors = [one for one in tensors if one.shape == parameter.shape]
    pruned = int(share * parameter.numel())
    if tensors and pruned:
        size = tensors[0].abs()
        places = size <= size.flatten().kthvalue(pruned).values
        for one in tensors:
            one.masked_fill_(places, 0)
