r"""DyLoRA (Valipour et al., 2022, arXiv:2210.07558).

Each step trains one prefix of the pair, of a rank b that is drawn anew, so that every prefix is a LoRA of its own::

       x (..., in)
       |        \
       |         down = the first b rows of lora_A       b from 1 to r, one for all layers
     W (out, in)  |
     frozen      up = the first b columns of lora_B
       |        /
       + <--- * alpha / b
       |
       y (..., out)

In evaluation b is r, or what ``at_rank`` or ``truncate_`` say.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.initialisations import KEEPS_START
from lightning_lora.methods.lora import LoRA, LoRAAdapter
from lightning_lora.schedule import Schedule

if TYPE_CHECKING:
    from lightning_lora.sites import Site


@dataclass(frozen=True, kw_only=True)
class DyLoRA(LoRA):
    """LoRA that is trained for every rank up to r at once; the other fields are those of ``LoRA``.

    A prefix of rank b is the adapter of ``LoRA(r=b)`` with the same alpha. At full rank it is LoRA. During a run and in
    training mode, all that looks at an adapter (``merged``, say) sees the prefix of the step.

    Args:
        frozen: Whether the lower ranks stay frozen while a higher one is trained: a step of rank b changes the b-th row
            and column only, and nothing of the optimizer's state of the others (the paper's FROZEN, algorithm 1).

    Raises:
        ValueError: If a value is out of its range.
    """

    refused_inits: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(KEEPS_START, "a prefix of the pair has no start of its own"),
        "orthogonal": "the product of a prefix would not be zero at the start",
    }
    frozen: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gradient != "plain":
            raise ValueError(
                f"gradient={self.gradient!r}: a step trains a prefix, and this mixes the gradients of all columns: use "
                "gradient='plain'"
            )

    @override
    def kind(self) -> type[LoRAAdapter]:
        return DyLoRAAdapter

    @override
    def schedules(self, sites: Sequence[Site], task: str, total_steps: int | None = None) -> list[Schedule]:
        adapters = [cast(DyLoRAAdapter, site.adapter(task)) for site in sites]
        sampling = LastRank if self.frozen else RankSampling
        return [*super().schedules(sites, task, total_steps), sampling(adapters)]

    def scale(self, rank: int) -> float:
        """Return the factor on the product of the first ``rank`` columns and rows."""
        return self.alpha / (math.sqrt(rank) if self.scaling == "rsqrt" else rank)

    @classmethod
    @override
    def from_peft(cls, config: Mapping[str, Any]) -> None:
        """Return None: what PEFT calls LORA is LoRA."""


class DyLoRAAdapter(LoRAAdapter):
    """The pair of LoRA, of which a prefix can be in use.

    Attributes:
        rank: The prefix that is chosen for now; None is all of it.
        sample: In a run, the factor (r,) on the columns of ``lora_B`` in training mode: 0 behind the prefix of this
            step. A product with it has the same shape at every rank, so a compiled model is compiled once.
    """

    method: DyLoRA
    rank: int | None = None
    sample: Tensor | None = None

    def choose(self, rank: int | None) -> None:
        """Use a prefix, or the whole pair."""
        self.rank = None if rank is None else min(rank, self.method.r)
        self.scaling = self.method.scale(self.rank or self.method.r)

    @torch.no_grad()
    def truncate(self, rank: int) -> None:
        """Keep a prefix only."""
        up, down = self._prefix(rank)
        self.lora_A = nn.Parameter(down.clone(), requires_grad=self.lora_A.requires_grad)
        self.lora_B = nn.Parameter(up.clone(), requires_grad=self.lora_B.requires_grad)
        self.method = self.method.at(min(rank, self.method.r), self.method.alpha)
        self.sample = None
        self.choose(None)

    def _prefix(self, rank: int) -> tuple[Tensor, Tensor]:
        return self.lora_B[..., :rank], self.lora_A[..., :rank, :]

    @override
    def factors(self) -> tuple[Tensor, Tensor]:
        """Return ``up`` (out, b) and ``down`` (b, in), or in the training of a run all of both, masked in ``up``."""
        if self.rank is not None:
            return self._prefix(self.rank)
        up, down = super().factors()
        return (up * self.sample, down) if self.training and self.sample is not None else (up, down)


class RankSampling(Schedule):
    """Draws the rank of each step: a function of the seed and the step alone, so the same on every process.

    Where adapters have different ranks, the rank is drawn up to the largest, and smaller ones have no more than theirs.

    Args:
        adapters: All of the task; the first one's seed is the run's.
    """

    def __init__(self, adapters: Sequence[DyLoRAAdapter]) -> None:
        super().__init__()
        self.adapters = adapters
        self.seed = adapters[0].seed
        self.largest = max(adapter.method.r for adapter in adapters)
        self._draw()

    def rank(self, step: int) -> int:
        """Return the rank of a step, from 1 to the largest, each as likely.

        Args:
            step: The step, counted from 0.
        """
        digest = hashlib.sha256(f"{self.seed}:{step}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % self.largest + 1

    def _draw(self) -> None:
        rank = self.rank(self.step)
        samples: dict[tuple[Any, ...], Tensor] = {}
        for adapter in self.adapters:
            method, like = adapter.method, adapter.lora_B
            key = (method, like.device, like.dtype)
            if key not in samples:
                used = min(rank, method.r)
                factor = method.scale(used) / method.scale(method.r)
                samples[key] = torch.tensor([factor] * used + [0.0] * (method.r - used), dtype=like.dtype).to(
                    like.device
                )
            adapter.sample = samples[key]

    @override
    def after_step(self, optimizer: Optimizer) -> None:
        """Draw the rank of the next step."""
        super().after_step(optimizer)
        self._draw()

    @override
    def end(self) -> None:
        """Let training mode use the whole pair again."""
        for adapter in self.adapters:
            adapter.sample = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "seed": self.seed}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.seed = state["seed"]
        self._draw()


class LastRank(RankSampling):
    """Has each step change nothing but the last row and column of the prefix that it trains.

    Their gradients are all that clipping sees. What an optimizer does besides, by momentum or weight decay, is taken
    back where it is not theirs, in its state too: each row has a history of its own steps. State that is not of the
    parameter's shape (8-bit optimizers, Adafactor) stays as the optimizer leaves it, and so does what the first step
    makes of the others.
    """

    def __init__(self, adapters: Sequence[DyLoRAAdapter]) -> None:
        super().__init__(adapters)
        self._before: list[tuple[Tensor, Tensor, Tensor]] = []

    @override
    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        """Drop the gradients of the other rows and columns, and note where these are."""
        self._before = []
        for adapter in self.adapters:
            last = min(self.rank(self.step), adapter.method.r) - 1
            for factor, dimension in ((adapter.lora_A, -2), (adapter.lora_B, -1)):
                others = torch.arange(factor.shape[dimension], device=factor.device) != last
                others = others.view(-1, 1) if dimension == -2 else others
                if factor.grad is not None:
                    factor.grad.masked_fill_(others, 0)
                state = optimizer.state.get(factor, {}).values()
                like = [one for one in state if isinstance(one, Tensor) and one.shape == factor.shape]
                self._before += [(one, one.detach().clone(), others) for one in (factor, *like)]

    @override
    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """Take back what became of the others, and draw the rank of the next step."""
        for tensor, before, others in self._before:
            tensor.copy_(torch.where(others, before, tensor))
        self._before = []
        super().after_step(optimizer)


def truncate_(model: nn.Module, rank: int) -> nn.Module:
    """Cut every DyLoRA adapter of a model to a rank, in place: what is saved then is a LoRA of that rank.

    Args:
        model: The adapted model.
        rank: The rank; adapters that have less keep theirs.

    Returns:
        The same object, for chaining: ``save_adapter(truncate_(model, 4), path)``.

    Raises:
        ValueError: If the rank is below 1, or there is no such adapter.
    """
    for adapter in _adapters(model, rank):
        adapter.truncate(rank)
    return model


@contextmanager
def at_rank(model: nn.Module, rank: int) -> Iterator[nn.Module]:
    """Use the prefix of a rank of every DyLoRA adapter of a model for the length of a ``with`` block.

    Args:
        model: The adapted model.
        rank: The rank; adapters that have less use theirs.

    Raises:
        ValueError: If the rank is below 1, or there is no such adapter.
    """
    adapters = _adapters(model, rank)
    before = [adapter.rank for adapter in adapters]
    for adapter in adapters:
        adapter.choose(rank)
    try:
        yield model
    finally:
        for adapter, earlier in zip(adapters, before, strict=True):
            adapter.choose(earlier)


def _adapters(model: nn.Module, rank: int) -> list[DyLoRAAdapter]:
    found = [module for module in model.modules() if isinstance(module, DyLoRAAdapter)]
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank={rank!r}: must be a whole number of at least 1, such as rank=4")
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no DyLoRA adapter, and of another one a prefix means nothing: train with "
            "DyLoRA, or see rank_curve for the best approximations of a lower rank"
        )
    return found
