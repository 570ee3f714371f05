"""Adapters on convolutions: one factor is a kernel with the layer's own geometry, the other a 1x1 kernel."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.functional import scaled
from lightning_lora.layers.seam import Called, plain_class
from lightning_lora.layout import Layout

_CONV: tuple[Any, ...] = (F.conv1d, F.conv2d, F.conv3d)
_CONV_TRANSPOSE: tuple[Any, ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


class AdaptedConvolution(Called):
    """``nn.Conv1d``, ``2d`` and ``3d``: A is a kernel that maps to r channels per group, B mixes these."""

    adapts = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    @staticmethod
    def matrices(module: nn.Module) -> list[str]:
        """Return the weight's name."""
        return ["weight"]

    @staticmethod
    def layout(module: nn.Module, parameter: str) -> Layout:
        """Return that of an (out, in / groups, *kernel) weight."""
        return Layout(groups=module.groups)  # type: ignore[arg-type]

    @classmethod
    def computes_as_plain(cls, module: Any) -> bool:
        """Tell whether neither ``forward`` nor what it calls is another one."""
        inner = plain_class(module)._conv_forward  # type: ignore[attr-defined]
        return super().computes_as_plain(module) and any(inner is plain._conv_forward for plain in cls.adapts)

    @staticmethod
    def step(layer: Any, output: Tensor, x: Tensor, up: Tensor, down: Tensor, scaling: float) -> Tensor:
        """Return the output plus the convolution with A and the 1x1 convolution with B."""
        z = layer._conv_forward(x, down.reshape(-1, *layer.weight.shape[1:]).to(x.dtype), None)
        change = _pointwise(scaled(z, scaling), up.reshape(-1, up.shape[-1]), layer)
        return output + change.to(output.dtype)

    @staticmethod
    def product(layer: Any, x: Tensor, weight: Tensor, size: torch.Size) -> Tensor:
        """Return the convolution with another kernel, in the layer's own geometry."""
        return layer._conv_forward(x, weight.to(x.dtype), None)  # type: ignore[no-any-return]

    @staticmethod
    def along_units(layer: Any, values: Tensor) -> Tensor:
        """Return the values with a dimension for each of the kernel's behind the channels."""
        return values.reshape(-1, *[1] * len(layer.kernel_size))


class AdaptedConvTranspose(Called):
    """``nn.ConvTranspose1d``, ``2d`` and ``3d``: A maps to r channels per group, B is the kernel."""

    adapts = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

    @staticmethod
    def matrices(module: nn.Module) -> list[str]:
        """Return the weight's name."""
        return ["weight"]

    @staticmethod
    def layout(module: nn.Module, parameter: str) -> Layout:
        """Return that of an (in, out / groups, *kernel) weight."""
        return Layout(groups=module.groups, transposed=True, kernel=math.prod(module.kernel_size))  # type: ignore[arg-type]

    @staticmethod
    def step(layer: Any, output: Tensor, x: Tensor, up: Tensor, down: Tensor, scaling: float) -> Tensor:
        """Return the output plus the 1x1 convolution with A and the transposed convolution with B."""
        z = _pointwise(x, down.reshape(-1, down.shape[-1]), layer)
        kernel = up.mT.reshape(-1, *layer.weight.shape[1:])
        change = AdaptedConvTranspose.product(layer, scaled(z, scaling), kernel, output.shape)
        return output + change.to(output.dtype)

    @staticmethod
    def product(layer: Any, x: Tensor, weight: Tensor, size: torch.Size) -> Tensor:
        """Return the transposed convolution with another kernel, to the size that this call's ``output_size`` gave."""
        dims = len(layer.kernel_size)
        sizes = zip(size[-dims:], x.shape[-dims:], strict=True)
        geometry = list(zip(layer.stride, layer.padding, layer.dilation, layer.kernel_size, strict=True))
        missing = [
            out - ((into - 1) * stride - 2 * padding + dilation * (kernel_size - 1) + 1)
            for (out, into), (stride, padding, dilation, kernel_size) in zip(sizes, geometry, strict=True)
        ]
        return _CONV_TRANSPOSE[dims - 1](  # type: ignore[no-any-return]
            x, weight.to(x.dtype), None, layer.stride, layer.padding, missing, layer.groups, layer.dilation
        )

    @staticmethod
    def along_units(layer: Any, values: Tensor) -> Tensor:
        """Return the values with a dimension for each of the kernel's behind the channels."""
        return AdaptedConvolution.along_units(layer, values)


def _pointwise(x: Tensor, matrix: Tensor, layer: Any) -> Tensor:
    """Return the 1x1 convolution of ``x`` (..., in, *size) with a matrix (out, in / groups)."""
    dims = layer.weight.dim() - 2
    kernel = matrix.reshape(*matrix.shape, *[1] * dims).to(x.dtype)
    return _CONV[dims - 1](x, kernel, groups=layer.groups)  # type: ignore[no-any-return]
