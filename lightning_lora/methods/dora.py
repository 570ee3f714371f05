r"""DoRA (Liu et al., 2024, arXiv:2402.09353): a weight's direction and its magnitude are trained apart.

::

    V  = W + alpha / r * lora_B @ lora_A       W frozen; the direction is learned as in LoRA
    W' = magnitude * V / norm(V)               one magnitude and one norm for each output unit

The magnitudes start as the norms of the start, so the model starts as the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora.adapter import Adapter, Role, rows_at_a_time
from lightning_lora.layout import Layout
from lightning_lora.methods.lora import LoRA, LoRAAdapter


@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """Weight-decomposed low-rank adaptation: ``W' = magnitude * V / norm(V)``, ``V = W + alpha / r * lora_B @ lora_A``.

    The norm is that of a row of the (out, in) matrix: of one output unit, of all that leads to one output channel of a
    convolution, of one dimension of an embedding over the vocabulary. It adds as many parameters as there are output
    units. A unit whose weights are all zero has no direction: there the change is LoRA's, and no magnitude is trained.

    Args:
        r: Rank; 0 trains the magnitudes alone, at one site by ``rank_pattern`` or everywhere.
        detach_norm: Whether the norm counts as a constant in the backward pass (section 4.3 of the paper); the gradient
            of the magnitudes is the same with and without.
        dropout_on: ``change`` zeroes elements of the input of all that is not the base, as the paper does, and takes a
            second product with W for it; ``branch`` only of the input of ``lora_B @ lora_A``, with the same mean.

    Raises:
        ValueError: If a value is out of its range.
    """

    lowest_rank: ClassVar[int] = 0
    detach_norm: bool = True
    dropout_on: Literal["change", "branch"] = "change"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dropout_on not in ("change", "branch"):
            raise ValueError(
                f"dropout_on={self.dropout_on!r}: must be 'change' (all that is not the base, as in the paper) or "
                "'branch' (lora_B @ lora_A alone)"
            )

    def kind(self) -> type[LoRAAdapter]:
        """Return the class of its adapters."""
        return DoRAAdapter

    def build(self, shape: tuple[int, ...], **factory: Any) -> Adapter:
        """Create the adapter of one (out, in) matrix, or of a stack of them."""
        adapter: Any = super().build(shape, **factory)
        adapter.detach_norm, adapter.dropout_on = self.detach_norm, self.dropout_on
        if self.r == 0:  # what is empty gets no gradient, which the optimizer and DDP would wait for
            adapter.lora_A.requires_grad_(False)
            adapter.lora_B.requires_grad_(False)
        return adapter  # type: ignore[no-any-return]

    def peft_config(self) -> dict[str, Any]:
        """Return PEFT's names for these fields."""
        return {**(super().peft_config() or {}), "use_dora": True}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> LoRA | None:
        """Read a config of PEFT's type LORA with ``use_dora``."""
        return super().from_peft({**config, "use_dora": False}) if config.get("use_dora") else None


class WithMagnitude(Adapter):
    """Mixin in front of an adapter with ``factors``: the adapted matrix keeps its direction and gets a trained norm.

    A unit whose norm is 0 at the start gets the magnitude 0, which no gradient moves and which means a gain of 1.

    Attributes:
        magnitude: One value for each output unit, in fp32 or wider; (n, out) for a stack of matrices, and (in,) where
            rows are looked up.
        detach_norm: Whether the norm counts as a constant in the backward pass.
    """

    needs_weight = True
    detach_norm: bool = True
    layout: Layout

    def __init__(
        self,
        method: Any,
        shape: tuple[int, ...],
        *,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        layout: Layout,
    ) -> None:
        super().__init__(method, shape, seed=seed, device=device, dtype=dtype, layout=layout)
        *stack, out_features, in_features = shape
        units = in_features if layout.looked_up else out_features // layout.kernel
        dtype = torch.promote_types(dtype, torch.float32)  # in half precision the model would not start as its base
        self.magnitude = nn.Parameter(torch.ones(*stack, units, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Draw the factors anew; the magnitudes are 1 until they start from the base's weight."""
        super().reset_parameters()  # type: ignore[safe-super]
        self.waits_for_weight = True
        if "magnitude" in self._parameters and not self.magnitude.is_meta:
            nn.init.ones_(self.magnitude)

    def why_not_peft(self) -> str | None:
        """Return whether there are no factors, or a unit whose norm PEFT would divide by although it is 0."""
        if self.method.r == 0:
            return "PEFT has no adapter of rank 0"
        if (self.magnitude == 0).any():
            return "PEFT divides by the norm of an output unit whose weights are all zero"
        return super().why_not_peft()

    def start_from(self, weight: Tensor) -> None:
        """Set each magnitude to the norm that its unit has at the start."""
        super().start_from(weight)
        with torch.no_grad():
            self.magnitude.copy_(self.norm(weight))

    def gain(self, weight: Tensor) -> Tensor:
        """Return ``magnitude / norm``, and 1 where the magnitude is 0."""
        if not self.detach_norm and torch.is_grad_enabled():
            norm: Tensor = checkpoint(self.norm, weight, use_reentrant=False, preserve_rng_state=False)
        else:
            with torch.no_grad():
                norm = self.norm(weight)
        ratio = self.magnitude / torch.where(norm > 0, norm, 1.0)
        gain = torch.where(self.magnitude == 0, 1.0, ratio)
        if self.layout.looked_up:
            return gain.unsqueeze(-2)
        if self.layout.kernel > 1:
            gain = gain.repeat_interleave(self.layout.kernel, -1)
        return gain.unsqueeze(-1)

    def norm(self, weight: Tensor) -> Tensor:
        """Return the norm of each output unit of ``weight + scaling * up @ down``, in the shape of the magnitudes.

        The sum is formed block by block, so that little of it exists at a time, and squares are added up in fp64, so
        that the rounded norm is the same on every device and in every order of summation.

        Args:
            weight: The matrix (out, in), or the stack (n, out, in).
        """
        up, down = self.factors()
        if self.layout.looked_up:
            weight, up, down = weight.mT, down.mT, up.mT
        wide = torch.promote_types(torch.promote_types(weight.dtype, up.dtype), torch.float32)
        widest = wide if weight.device.type == "mps" else torch.float64  # which Apple's GPUs do not have
        rows = rows_at_a_time(weight)
        with torch.autocast(weight.device.type, enabled=False):
            up, down = self.scaling * up.to(wide), down.to(wide)
            norms = [
                torch.linalg.vector_norm((some @ down).add_(part), dim=-1, dtype=widest)
                for part, some in zip(torch.split(weight, rows, -2), torch.split(up, rows, -2), strict=True)
            ]
            per_row = norms[0] if len(norms) == 1 else torch.cat(norms, -1)
        if self.layout.kernel > 1:
            per_row = torch.linalg.vector_norm(per_row.reshape(*per_row.shape[:-1], -1, self.layout.kernel), dim=-1)
        return per_row.to(self.magnitude.dtype)


class DoRAAdapter(WithMagnitude, LoRAAdapter):
    """LoRA's pair with a magnitude for each output unit; of rank 0, the magnitudes alone."""

    roles: ClassVar[dict[str, Role]] = {**LoRAAdapter.roles, "magnitude": "magnitude"}
