r"""LoRA-drop (Zhou et al., 2024, arXiv:2402.07721): matrices whose adapters change little share one.

::

    sample steps            one look                     the rest of the run
    layer 0   B0 A0         ||s B0 A0 x||^2 small   -->  shared B A   \
    layer 1   B1 A1         ||s B1 A1 x||^2 large   -->  B1 A1         | one adapter in several places
    layer 2   B2 A2         ||s B2 A2 x||^2 small   -->  shared B A   /

The importance of a matrix is what its adapter adds to the output, squared and averaged over tokens, as a share of the
sum over like matrices: those whose names differ in layer numbers only, of one shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lightning_lora.initialisations import KEEPS_START
from lightning_lora.layout import whole_number
from lightning_lora.methods.dora import DoRAAdapter
from lightning_lora.methods.lora import LoRA, LoRAAdapter
from lightning_lora.schedule import Schedule

if TYPE_CHECKING:
    from lightning_lora.sites import Site

Rest = Literal["shared", "shared_frozen", "none"]


@dataclass(frozen=True, kw_only=True)
class LoRADrop(LoRA):
    """LoRA that, after a sample of the run, leaves adapters of their own to the matrices where they matter most.

    One ``fit`` has two phases. All adapters train for the sample steps, on the run's own first batches, which the
    sampler has shuffled if it shuffles. Then as many batches are run in eval mode without gradients to measure the
    importances (at most one epoch of them, drawn anew by a shuffling sampler), and the run goes on with fewer adapters.

    Args:
        r: As for LoRA.
        alpha: As for LoRA.
        dropout: As for LoRA.
        scaling: As for LoRA.
        init: As for LoRA, without those that look at the base or at data.
        gradient: As for LoRA.
        freeze_A: As for LoRA.
        sample_ratio: Share of the run's optimizer steps that the first phase takes.
        sample_steps: Its number of optimizer steps; None takes ``sample_ratio``. A run that ends before keeps all.
        threshold: Of each group of like matrices, the most important ones keep their adapters until together they have
            this share of the group's importance; 1 keeps all that have any.
        top_n: Keep this many of each group instead.
        rest: What the others of a group get: ``shared`` is one adapter that they train together, as in the paper;
            ``shared_frozen`` is one that stays as the first of them was trained in the sample; ``none`` is none.
        reinit: Whether adapters start anew in the second phase, from the values of the first step and without the
            optimizer's moments, or go on as they are. What is shared and trained starts anew in any case: the change
            that one matrix learned is none of the others'.
        magnitude: Whether adapters are DoRA's, with a trained magnitude for each output unit.

    Raises:
        ValueError: If a value is out of its range.
    """

    averageable: ClassVar[Literal["all", "trained", "nothing"]] = "nothing"  # adapters go, and others start anew
    refused_inits: ClassVar[Mapping[str, str]] = dict.fromkeys(
        KEEPS_START, "a shared adapter cannot equal each layer's principal part: the base residuals differ"
    )
    refused: ClassVar[Mapping[str, str]] = {
        "target_r": "two rank allocators on one budget",
        "update_ratio": "one shared increment would be added to several W",
    }

    sample_ratio: float = 0.1
    sample_steps: int | None = None
    threshold: float = 0.9
    top_n: int | None = None
    rest: Rest = "shared"
    reinit: bool = True
    magnitude: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.sample_ratio, int | float) and 0 < self.sample_ratio < 1):
            raise ValueError(
                f"sample_ratio={self.sample_ratio!r}: must be above 0 and below 1, for example sample_ratio=0.1"
            )
        for name in ("sample_steps", "top_n"):
            value = getattr(self, name)
            if value is not None and not (whole_number(value) and value >= 1):
                raise ValueError(f"{name}={value!r}: must be a whole number of at least 1, for example {name}=8")
        if not (isinstance(self.threshold, int | float) and 0 < self.threshold <= 1):
            raise ValueError(f"threshold={self.threshold!r}: must be above 0 and at most 1, for example threshold=0.9")
        if self.rank_spread != 1:
            raise ValueError(f"rank_spread={self.rank_spread:g}: two rank allocators on one budget")
        if self.rest not in ("shared", "shared_frozen", "none"):
            raise ValueError(f"rest={self.rest!r}: must be 'shared', 'shared_frozen' or 'none'")
        if self.init == "eva" and self.reinit:
            raise ValueError(
                "init='eva' with reinit=True: adapters that start anew would start as LoRA's own, without the data: "
                "use reinit=False"
            )
        if self.magnitude and self.rest != "none":
            raise ValueError(
                f"magnitude=True with rest={self.rest!r}: a shared low-rank pair with per-layer magnitudes is "
                "ambiguous: use rest='none'"
            )

    def kind(self) -> type[LoRAAdapter]:
        """Return DoRA's adapter where there are magnitudes."""
        return DoRAAdapter if self.magnitude else LoRAAdapter

    def peft_config(self) -> dict[str, Any] | None:
        """Return PEFT's names for these fields."""
        return {**(super().peft_config() or {}), **({"use_dora": True} if self.magnitude else {})}

    @property
    def needs_total_steps(self) -> bool:  # type: ignore[override]
        """Whether the sample is a share of the run."""
        return self.sample_steps is None

    @property
    def restructures(self) -> bool:  # type: ignore[override]
        """Whether training takes adapters away: it does."""
        return True

    @property
    def freezes_shared(self) -> bool:  # type: ignore[override]
        """Whether what sites share is frozen."""
        return self.rest == "shared_frozen"

    def schedules(self, sites: Sequence[Site], task: str, total_steps: int | None = None) -> list[Schedule]:
        """Return the one that counts the steps of the sample.

        Raises:
            ValueError: If the sample is a share of a run whose length is not known.
        """
        return [*super().schedules(sites, task, total_steps), Sample(self, total_steps)]

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> None:
        """Leave PEFT's configs to LoRA: PEFT knows no sharing."""
        return


class Sample(Schedule):
    """The first phase of LoRA-drop; what ends it needs training data, so it is done by who has these.

    Args:
        method: The hyperparameters.
        total_steps: Optimizer steps of the run; None if it has no end, or the sample does not depend on it.

    Attributes:
        steps: Optimizer steps of the sample.
        importances: What was measured at its end, by site; empty before that.
        was_before: Whether an earlier run selected already, so that there is nothing to sample for.

    Raises:
        ValueError: If the sample is a share of a run whose length is not known.
    """

    def __init__(self, method: LoRADrop, total_steps: int | None) -> None:
        super().__init__()
        if method.sample_steps is None and total_steps is None:
            raise ValueError(
                f"sample_ratio={method.sample_ratio:g} is a share of the run, and this run has no end: give "
                "Trainer(max_steps=...), or LoRADrop(sample_steps=...)"
            )
        self.method = method
        self.steps = method.sample_steps or max(1, math.ceil(method.sample_ratio * (total_steps or 0)))
        self.importances: dict[str, float] = {}
        self.was_before = False

    @property
    def ends_now(self) -> bool:
        """Whether all its steps are done and nothing was selected yet."""
        return self.step >= self.steps and not self.importances and not self.was_before

    def state_dict(self) -> dict[str, Any]:
        """Return the count and what was measured."""
        return {**super().state_dict(), "importances": dict(self.importances)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the count and what was measured."""
        super().load_state_dict(state)
        self.importances = dict(state["importances"])
