r"""AdaLoRA (Zhang et al., 2023, arXiv:2303.10512): ranks are moved to the matrices where they matter most.

::

       x (..., in)
       |        \
       |         lora_A (r, in)     the right vectors Q, near orthonormal rows
     W (out, in)  |
     frozen      lora_E (r, 1)      the singular values, zero at the start, so the model starts as the base
       |          |
       |         lora_B (out, r)    the left vectors P, near orthonormal columns
       |        /
       + <--- * alpha / r           with the initial r, also when some of the singular values are masked

Where paper and released code differ, this is the code: the regulariser's norms are not squared, and averaged over the
matrices; sensitivities multiply a step's gradient by the weights after the step; the budget falls from the end of the
first phase to the beginning of the last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_lora.adapter import Adapter, Role
from lightning_lora.layout import Layout, whole_number
from lightning_lora.method import Method, check_alpha, check_fraction, check_scaling
from lightning_lora.rank_allocation import RankAllocation
from lightning_lora.schedule import Schedule

if TYPE_CHECKING:
    from lightning_lora.sites import Site

_PEFTS_GUARD = 1e-5  # PEFT divides alpha by the rank plus this


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Method):
    """Adaptive ranks: ``W' = W + alpha / r * lora_B @ (lora_E * lora_A)``, with all but the best of ``lora_E`` masked.

    All matrices start with rank ``r``. After ``initial_steps`` triplets of a singular value and its two vectors are
    masked, the least important ones of the whole model, until ``target_r`` are left per matrix on average; some keep
    all and some none. Each matrix of a stack (experts, groups of a convolution) counts as one.

    It has no use for LoRA+'s ``lr_ratio``, and its arguments have no ``init``, ``freeze_A`` or magnitude: its vectors
    start random because masking a triplet that was taken from W would delete a part of W, and importance needs both
    of them trained.

    Args:
        r: Rank at the start; the released scripts take one and a half times ``target_r``, or more.
        target_r: Rank at the end, on average over the matrices.
        alpha: Scale of the change.
        dropout: Probability with which an element of the adapter's input is zeroed during training.
        scaling: ``linear`` divides alpha by r; ``rsqrt`` by its root (rsLoRA, arXiv:2312.03732).
        initial_steps: Optimizer steps before ranks fall; None is a quarter of the run.
        final_steps: Optimizer steps after which nothing is masked anew, at the end; None is a quarter of the run.
        mask_every: Number of steps from one choice of ranks to the next while they fall.
        beta1: How much the running mean of sensitivities keeps of itself at each step.
        beta2: The same for their running deviation.
        orthogonality: Weight of the regulariser; 0.1 is that of most of the released scripts, PEFT's default is 0.5.
        sensitivity: Whether a step's gradient is multiplied by the weights after that step, as the released code does,
            or before it, as the paper defines it.
        total_steps: Optimizer steps of the run; None takes them from the Trainer.

    Raises:
        ValueError: If a value is out of its range.
    """

    needs_total_steps: ClassVar[bool] = True
    refused: ClassVar[Mapping[str, str]] = {
        "magnitude": "no paper defines magnitudes under triplet pruning",
        "freeze_A": "AdaLoRA needs a trainable Q for its orthogonality and importance",
        "init": "masking a triplet initialised from W would delete a part of the pretrained weight, and EVA would be a "
        "second one of two rank allocators on one budget",
        "threshold": "two rank allocators on one budget",
        "update_ratio": "masking makes P Lambda Q jump; Delta-LoRA would copy the jump into W",
        "gradient": "AdaLoRA's importance is made of the plain gradients",
    }

    r: int = 12
    target_r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    scaling: Literal["linear", "rsqrt"] = "linear"
    initial_steps: int | None = None
    final_steps: int | None = None
    mask_every: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.1
    sensitivity: Literal["post_step", "pre_step"] = "post_step"
    total_steps: int | None = None

    def __post_init__(self) -> None:
        least = {"r": 1, "target_r": 1, "mask_every": 1, "initial_steps": 0, "final_steps": 1, "total_steps": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if not (whole_number(value) and value >= bound) and not (value is None and name.endswith("_steps")):
                raise ValueError(f"{name}={value!r}: must be a whole number of at least {bound}, for example {name}=8")
        for name in ("dropout", "beta1", "beta2"):
            check_fraction(name, getattr(self, name), example=0.1)
        check_alpha(self.alpha)
        check_scaling(self.scaling)
        if not (isinstance(self.orthogonality, int | float) and 0 <= self.orthogonality < math.inf):
            raise ValueError(f"orthogonality={self.orthogonality!r}: must be finite and not below 0, for example 0.1")
        if self.sensitivity not in ("post_step", "pre_step"):
            raise ValueError(
                f"sensitivity={self.sensitivity!r}: must be 'post_step' (released code) or 'pre_step' (the paper)"
            )

    def build(
        self,
        shape: tuple[int, ...],
        *,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        layout: Layout | None = None,
    ) -> Adapter:
        """Create the adapter of one (out, in) matrix, or of a stack of them."""
        return AdaLoRAAdapter(self, shape, seed=seed, device=device, dtype=dtype)

    def schedules(self, sites: Sequence[Site], task: str, total_steps: int | None = None) -> list[Schedule]:
        """Return the one that adds the regulariser's gradient, watches sensitivities and masks.

        Raises:
            ValueError: If the run's length is not known, or the phases or ranks do not fit.
        """
        total = self.total_steps or total_steps
        if total is None:
            raise ValueError(
                "total_steps=None: AdaLoRA lowers ranks along the run, and this run has no end: give "
                "Trainer(max_steps=...), or AdaLoRA(total_steps=...)"
            )
        return [*super().schedules(sites, task, total_steps), RankAllocation(self, sites, task, total)]

    def why_no_ratio(self) -> str:
        """Return what LoRA+ lacks here."""
        return "AdaLoRA's P and Q are both random and its zero factor is Lambda; LoRA+ is defined for a zero B"

    def peft_config(self) -> dict[str, Any]:
        """Return PEFT's names for these fields; its alpha makes up for what it adds to the rank."""
        initial, final = self.initial_steps or 0, self.final_steps or 0
        return {
            "peft_type": "ADALORA",
            "init_r": self.r,
            "target_r": self.target_r,
            "lora_alpha": _scale(self) * (self.r + _PEFTS_GUARD),
            "lora_dropout": self.dropout,
            "tinit": initial,
            "tfinal": final,
            "deltaT": self.mask_every,
            "beta1": self.beta1,
            "beta2": self.beta2,
            "orth_reg_weight": self.orthogonality,
            "total_step": self.total_steps or initial + final + 1,  # PEFT loads no config without one that fits
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> AdaLoRA | None:
        """Read a config of PEFT's type ADALORA; its absent fields have PEFT's defaults."""
        if config.get("peft_type") != "ADALORA":
            return None
        r = config.get("init_r", 12)
        method = cls(
            r=r,
            target_r=config.get("target_r", 8),
            dropout=config.get("lora_dropout", 0.0),
            initial_steps=config.get("tinit", 0),
            final_steps=max(1, config.get("tfinal", 0)),  # PEFT's 0 leaves it to rounding whether the target is met
            mask_every=config.get("deltaT", 1),
            beta1=config.get("beta1", 0.85),
            beta2=config.get("beta2", 0.85),
            orthogonality=config.get("orth_reg_weight", 0.5),
            total_steps=config.get("total_step"),
        )
        return method.at(r, config.get("lora_alpha", 8) * r / (r + _PEFTS_GUARD))


def _scale(method: AdaLoRA) -> float:
    return method.alpha / (math.sqrt(method.r) if method.scaling == "rsqrt" else method.r)


class AdaLoRAAdapter(Adapter):
    """The triplets ``lora_A`` (r, in), ``lora_E`` (r, 1), ``lora_B`` (out, r); in a stack behind one more dimension."""

    roles: ClassVar[dict[str, Role]] = {"lora_A": "A", "lora_E": "core", "lora_B": "B"}

    def __init__(
        self, method: AdaLoRA, shape: tuple[int, ...], *, seed: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        *stack, out_features, in_features = shape
        self.method: AdaLoRA = method
        self.seed = seed
        self.dropout = method.dropout
        self.scaling = _scale(method)
        self.lora_A = nn.Parameter(torch.empty(*stack, method.r, in_features, device=device, dtype=dtype))
        self.lora_E = nn.Parameter(torch.empty(*stack, method.r, 1, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(*stack, out_features, method.r, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both sides' vectors with a standard deviation of 0.02, and set the singular values to zero."""
        if self.lora_A.is_meta:
            return
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for vectors in (self.lora_A, self.lora_B):
                vectors.copy_(torch.empty(vectors.shape, dtype=torch.float32).normal_(0, 0.02, generator=generator))
            self.lora_E.zero_()

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return ``lora_B`` (out, r) and ``lora_E * lora_A`` (r, in)."""
        return self.lora_B, self.lora_E * self.lora_A

    def extra_repr(self) -> str:
        """Show rank and scale where the model is printed."""
        return f"r={self.method.r}, scaling={self.scaling:g}, dropout={self.dropout:g}"
