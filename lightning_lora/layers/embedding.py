"""Adapters on embeddings: a row of B is looked up beside the row of the weight, then multiplied by A."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.functional import scaled
from lightning_lora.layers.seam import Called
from lightning_lora.layout import Layout


class AdaptedEmbedding(Called):
    """``nn.Embedding``; ``dropout`` does not apply, because the input is an index."""

    adapts = (nn.Embedding,)

    @staticmethod
    def matrices(module: nn.Module) -> list[str]:
        """Return the weight's name."""
        return ["weight"]

    @staticmethod
    def layout(module: nn.Module, parameter: str) -> Layout:
        """Return that of a (vocabulary, dim) weight whose rows are looked up."""
        return Layout(looked_up=True)

    @staticmethod
    def step(layer: nn.Module, output: Tensor, x: Tensor, up: Tensor, down: Tensor, scaling: float) -> Tensor:
        """Return the output plus the adapter's rows.

        Gradients of the factors are dense even where the layer's own would be sparse, so that any optimizer takes them.
        """
        z = scaled(AdaptedEmbedding.product(layer, x, up, output.shape).to(output.dtype), scaling)
        return output + (z @ down.to(z.dtype)).to(output.dtype)

    @staticmethod
    def product(layer: nn.Module, x: Tensor, weight: Tensor, size: torch.Size) -> Tensor:
        """Return rows of a weight, with a dense gradient."""
        return F.embedding(x, weight, layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq)  # type: ignore[arg-type]

    def forward(self: Any, input: Tensor) -> Tensor:
        """Look up, and limit the norm of the adapted rows where the layer limits that of its own.

        The plain layer would write the limited rows into the frozen weight, and its limit would not hold for the sum.
        """
        if self.max_norm is None:
            return super().forward(input)
        output = F.embedding(input, self.weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
        return _limited(self.changed(output, input), self.max_norm, self.norm_type)


def _limited(rows: Tensor, max_norm: float, norm_type: float) -> Tensor:
    """Return rows with their norm limited as PyTorch limits those of a weight: gradients pass as if it were not."""
    flat = rows.detach().reshape(-1, rows.shape[-1]).clone()
    index = torch.arange(len(flat), device=flat.device)
    limited = torch.embedding_renorm_(flat, index, max_norm, norm_type)
    return limited.view(rows.shape) + (rows - rows.detach())
