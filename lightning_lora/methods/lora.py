r"""LoRA (Hu et al., 2021, arXiv:2106.09685).

::

       x (..., in)
       |        \
       |         down = lora_A (r, in)     random at the start
     W (out, in)  |
     frozen      up = lora_B (out, r)      zero at the start, so the model starts as the base
       |        /
       + <--- * alpha / r
       |
       y (..., out)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_lora.adapter import Adapter, Role
from lightning_lora.initialisations import (
    FROM_SHAPE,
    FROM_WEIGHT,
    KEEPS_START,
    Initialisation,
    check_init,
    check_rank,
    doubled,
    family,
    from_weight,
    halved,
    kaiming,
    looked_up,
)
from lightning_lora.layout import Layout
from lightning_lora.method import Method, check_alpha, check_fraction, check_r, check_scaling
from lightning_lora.preconditioners import Gradient, Preconditioner, check_gradient
from lightning_lora.schedule import Schedule

if TYPE_CHECKING:
    from lightning_lora.sites import Site

_OTHER_COMPUTATIONS = (  # options of PEFT's LoraConfig that make it something else than W + scale * B @ A
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
)


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Low-rank adaptation: ``W' = W + alpha / r * lora_B @ lora_A``.

    Args:
        r: Rank of the change; the adapter of an (out, in) matrix has ``r * (in + out)`` parameters.
        alpha: Scale of the change.
        dropout: Probability with which an element of the adapter's input is zeroed during training.
        scaling: ``linear`` divides alpha by r, as in the paper; ``rsqrt`` divides it by the root of r, which keeps the
            change's size as the rank grows (rsLoRA, Kalajdzievski, 2023, arXiv:2312.03732).
        init: How the factors start: see ``initialisations``. Those that the papers subtract from the base (``pissa``,
            ``milora``, ``olora``, ``lora_ga``) leave it as it is here: the adapter adds ``B A`` minus what that was at
            the start. ``pissa_niter_16`` is ``pissa`` by 16 rounds of a fast SVD, and so for any number. ``eva`` and
            ``lora_ga`` look at data: a Trainer's, or what ``start_from_data`` is given.
        init_batches: How many batches of the training data they look at, at most.
        init_similarity: With ``eva``, no further batch is read once every direction that is taken has at least this
            cosine similarity to itself one batch before (the paper's tau); at 1 all batches are read.
        rank_spread: With ``eva``, up to how many times its rank a matrix may get, at the cost of others (the paper's
            rho); at 1 no rank changes.
        gradient: How the gradients of A and B are changed before each step: see ``preconditioners``; ``fa`` goes with a
            frozen A only, the others with a trained one.
        freeze_A: Whether ``lora_A`` stays as it starts (LoRA-FA).

    Raises:
        ValueError: If a value is out of its range.
    """

    lowest_rank: ClassVar[int] = 1
    refused_inits: ClassVar[Mapping[str, str]] = {}  # and why
    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    scaling: Literal["linear", "rsqrt"] = "linear"
    init: Initialisation | str = "kaiming"
    init_batches: int = 8
    init_similarity: float = 0.99
    rank_spread: float = 1.0
    gradient: Gradient = "plain"
    freeze_A: bool = False

    def __post_init__(self) -> None:
        check_r(self.r, self.lowest_rank, example=8)
        check_alpha(self.alpha)
        check_fraction("dropout", self.dropout, example=0.05)
        check_scaling(self.scaling)
        check_init(self.init, self.r, self.init_batches, self.init_similarity, self.rank_spread, self.refused_inits)
        check_gradient(self.gradient, self.freeze_A)

    @property
    def restructures(self) -> bool:  # type: ignore[override]
        """Whether the start gives matrices other ranks."""
        return self.rank_spread != 1

    def build(
        self,
        shape: tuple[int, ...],
        *,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        layout: Layout | None = None,
    ) -> Adapter:
        """Create the adapter of one (out, in) matrix, or of a stack of them, with all the directions that it takes."""
        return self.kind()(self, shape, seed=seed, device=device, dtype=dtype, layout=layout or Layout())

    def kind(self) -> type[LoRAAdapter]:
        """Return the class of its adapters."""
        return LoRAAdapter

    def schedules(self, sites: Sequence[Site], task: str, total_steps: int | None = None) -> list[Schedule]:
        """Return what changes the gradients, if anything does."""
        if self.gradient == "plain":
            return []
        return [Preconditioner(self.gradient, [site.adapter(task) for site in sites])]

    def why_no_ratio(self) -> str | None:
        """Return why the learning rates of B and A have no ratio."""
        if self.freeze_A:
            return "LoRA-FA freezes A, so lr_B/lr_A has no denominator: raise lr instead"
        if self.gradient == "lora_pro":
            return "LoRA-Pro fits the gradients of A and B to one another, for one learning rate: use lr_ratio=1"
        return None

    def doubts(self, lr_ratio: float = 1.0) -> list[str]:
        """Return what is allowed and will disappoint."""
        found = []
        if self.freeze_A and self.dropout:
            found.append(
                f"dropout={self.dropout:g}: with dropout the adapter keeps a mask of its whole input for the backward "
                "pass, or that input, so a frozen A saves less memory, or none: use dropout=0"
            )
        if lr_ratio != 1 and (self.keeps_start or self.init == "orthogonal"):
            found.append(
                f"lr_ratio={lr_ratio:g}: LoRA+ is derived for a B that starts at zero, and init={self.init!r} starts "
                "it elsewhere: take the ratio as one more thing to tune, or use lr_ratio=1"
            )
        return found

    def peft_config(self) -> dict[str, Any] | None:
        """Return PEFT's names for these fields; where the start is kept, for the LoRA of twice the rank that it is."""
        r, alpha, rsqrt = self.r, float(self.alpha), self.scaling == "rsqrt"
        if self.keeps_start:
            r, alpha, rsqrt = 2 * r, 2 * r * self.factor, False
        return {
            "peft_type": "LORA",
            "r": r,
            "lora_alpha": int(alpha) if alpha.is_integer() else alpha,  # some readers take whole numbers only
            "lora_dropout": self.dropout,
            "use_rslora": rsqrt,
        }

    def to_peft(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``[A; A0]`` and ``[B, -B0]`` where the start is kept; their product is the change."""
        return doubled(factors) if self.keeps_start else dict(factors)

    def of_peft(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what ``to_peft`` was given."""
        return halved(factors, self.freeze_A) if self.keeps_start else dict(factors)

    @property
    def keeps_start(self) -> bool:
        """Whether the adapters keep copies of their start, because its product is not 0."""
        return family(self.init) in KEEPS_START

    @property
    def factor(self) -> float:
        """The factor s on ``lora_B @ lora_A``."""
        rank = max(self.r, 1)  # methods that allow a rank of 0 train something else there
        return self.alpha / (math.sqrt(rank) if self.scaling == "rsqrt" else rank)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> LoRA | None:
        """Read a config of PEFT's type LORA; its absent fields have PEFT's defaults.

        Raises:
            ValueError: If it names a variant of LoRA that is computed in another way.
        """
        if config.get("peft_type") != "LORA" or config.get("use_dora"):
            return None
        for option in _OTHER_COMPUTATIONS:
            if config.get(option):
                raise ValueError(
                    f"{option}={config[option]!r} is not supported, because it computes something else than plain LoRA"
                    ": merge it into the base with PEFT"
                )
        init = config.get("init_lora_weights", True)
        if init not in (True, False, None, "gaussian", "orthogonal", "eva"):
            raise ValueError(
                f"init_lora_weights={init!r} changed the base's weights too: convert it to plain LoRA with PEFT's "
                "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
            )
        return cls(
            r=config.get("r", 8),
            alpha=config.get("lora_alpha", 8),
            dropout=config.get("lora_dropout", 0.0),
            scaling="rsqrt" if config.get("use_rslora") else "linear",
        )


class LoRAAdapter(Adapter):
    """The pair ``lora_A`` (r, in), ``lora_B`` (out, r); with one more dimension in front for a stack of matrices.

    ``lora_A0`` and ``lora_B0`` are frozen copies of the pair's start, where that has a product that is not 0; a frozen
    ``lora_A`` needs no copy.
    """

    roles: ClassVar[dict[str, Role]] = {"lora_A": "A", "lora_B": "B", "lora_A0": "A", "lora_B0": "B"}
    method: LoRA
    lora_A0: nn.Parameter | None
    lora_B0: nn.Parameter | None

    def __init__(
        self,
        method: LoRA,
        shape: tuple[int, ...],
        *,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        layout: Layout,
    ) -> None:
        super().__init__()
        check_rank(method.init, method.r, shape)
        *stack, out_features, in_features = shape
        self.method = method
        self.seed = seed
        self.layout = layout
        self.dropout = method.dropout
        self.scaling = method.factor
        A = torch.empty(*stack, method.r, in_features, device=device, dtype=dtype)
        B = torch.empty(*stack, out_features, method.r, device=device, dtype=dtype)
        kept = method.keeps_start
        self.lora_A = nn.Parameter(A, requires_grad=not method.freeze_A)
        self.lora_B = nn.Parameter(B)
        self.lora_A0 = nn.Parameter(torch.empty_like(A), requires_grad=False) if kept and not method.freeze_A else None
        self.lora_B0 = nn.Parameter(torch.empty_like(B), requires_grad=False) if kept else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the factors as the initialisation says; one that takes the weight is as LoRA's own until that is there.

        In an embedding ``lora_A`` is the factor that the released code calls ``lora_B``: the one that is looked up
        starts at zero in both.
        """
        init = self.method.init
        self.waits_for_weight = family(init) in FROM_WEIGHT
        if self.lora_A.is_meta:
            return
        draw = looked_up if self.layout.looked_up and init != "orthogonal" else FROM_SHAPE.get(init, kaiming)
        self.start_at(*draw(self.lora_A.shape, self.lora_B.shape, torch.Generator().manual_seed(self.seed)))

    def start_from(self, weight: Tensor) -> None:
        """Take the factors from the weight, where the initialisation says so."""
        start = from_weight(self.method.init, self.seed)
        if start is not None:
            self.start_at(*start(weight, self.method.r, self.scaling))

    @torch.no_grad()
    def start_at(self, A: Tensor, B: Tensor) -> None:
        """Set the factors and, where it is kept, their start.

        Args:
            A: As ``lora_A``.
            B: As ``lora_B``.
        """
        for value, factor, start in ((A, self.lora_A, self.lora_A0), (B, self.lora_B, self.lora_B0)):
            factor.copy_(value)
            if start is not None:
                start.copy_(factor)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return ``lora_B`` (out, r) and ``lora_A`` (r, in), or those of twice the rank where the start is kept.

        ``B A - B0 A0 = (B - B0) A + B0 (A - A0)``, whose differences are exact zeros at the start.
        """
        if self.lora_B0 is None:
            return self.lora_B, self.lora_A
        if self.lora_A0 is None:  # A is frozen, and so its own start
            return self.lora_B - self.lora_B0, self.lora_A
        up = torch.cat([self.lora_B - self.lora_B0, self.lora_B0], -1)
        return up, torch.cat([self.lora_A, self.lora_A - self.lora_A0], -2)

    def extra_repr(self) -> str:
        """Show rank and scale where the model is printed."""
        return f"r={self.method.r}, scaling={self.scaling:g}, dropout={self.dropout:g}"
