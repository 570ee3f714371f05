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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_lora.adapter import Adapter, Role
from lightning_lora.layout import Layout
from lightning_lora.method import Method

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

    Raises:
        ValueError: If a value is out of its range.
    """

    lowest_rank: ClassVar[int] = 1
    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    scaling: Literal["linear", "rsqrt"] = "linear"

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < self.lowest_rank:
            raise ValueError(
                f"r={self.r!r}: the rank must be a whole number of at least {self.lowest_rank}, for example r=8"
            )
        if not (isinstance(self.alpha, int | float) and math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha={self.alpha!r}: must be a finite number above 0, for example alpha=16")
        if not (isinstance(self.dropout, int | float) and 0 <= self.dropout < 1):
            raise ValueError(f"dropout={self.dropout!r}: must be at least 0 and below 1, for example dropout=0.05")
        if self.scaling not in ("linear", "rsqrt"):
            raise ValueError(f"scaling={self.scaling!r}: must be 'linear' (alpha / r) or 'rsqrt' (alpha / sqrt(r))")

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
        return LoRAAdapter(self, shape, seed=seed, device=device, dtype=dtype, layout=layout or Layout())

    def peft_config(self) -> dict[str, Any] | None:
        """Return PEFT's names for these fields."""
        alpha = (
            int(self.alpha) if float(self.alpha).is_integer() else self.alpha
        )  # some readers take whole numbers only
        return {
            "peft_type": "LORA",
            "r": self.r,
            "lora_alpha": alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.scaling == "rsqrt",
        }

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
    """The pair ``lora_A`` (r, in), ``lora_B`` (out, r); with one more dimension in front for a stack of matrices."""

    roles: ClassVar[dict[str, Role]] = {"lora_A": "A", "lora_B": "B"}

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
        *stack, out_features, in_features = shape
        self.method = method
        self.seed = seed
        self.layout = layout
        self.dropout = method.dropout
        rank = max(method.r, 1)  # methods that allow a rank of 0 train something else there
        self.scaling = method.alpha / (math.sqrt(rank) if method.scaling == "rsqrt" else rank)
        self.lora_A = nn.Parameter(torch.empty(*stack, method.r, in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(*stack, out_features, method.r, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw ``lora_A`` as the released code does, and set ``lora_B`` to zero.

        ``lora_A`` is drawn like the weight of an ``nn.Linear`` (not by the paper's Gaussian), and from a standard
        normal distribution where rows are looked up. In an embedding it is the factor that the released code calls
        ``lora_B``: the one that is looked up starts at zero in both.
        """
        if self.lora_A.is_meta:
            return
        drawn = torch.empty(self.lora_A.shape, dtype=torch.float32, device="cpu")
        generator = torch.Generator().manual_seed(self.seed)
        if self.layout.looked_up:
            drawn.normal_(generator=generator)
        else:
            bound = 1 / math.sqrt(drawn.shape[-1])
            drawn.uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            self.lora_A.copy_(drawn)
            self.lora_B.zero_()

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return ``lora_B`` (out, r) and ``lora_A`` (r, in)."""
        return self.lora_B, self.lora_A

    def extra_repr(self) -> str:
        """Show rank and scale where the model is printed."""
        return f"r={self.method.r}, scaling={self.scaling:g}, dropout={self.dropout:g}"
