"""`Layout`: how a weight lies in memory as the (out, in) matrix, or the stack of them, that an adapter changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    r"""The matrix view of a weight.

    =============================== ============================ =======================
    weight                          fields                       matrix
    =============================== ============================ =======================
    linear (out, in)                                             (out, in)
    transposed linear (in, out)     transposed                   (out, in)
    embedding (vocabulary, dim)     looked_up                    (vocabulary, dim)
    convolution (out, in/g, \*k)     groups=g                     (g, out/g, in/g * k)
    transposed one (in, out/g, \*k)  groups=g, transposed, kernel (g, out/g * k, in/g)
    experts (n, out, in)            stacked                      (n, out, in)
    =============================== ============================ =======================

    A leading dimension of one group is left out.

    Args:
        groups: Number of matrices that lie one behind the other in the first dimension.
        transposed: Whether the weight has a matrix's input dimension first.
        stacked: Whether the first dimension counts matrices.
        looked_up: Whether rows are picked by index rather than multiplied with an input.
        kernel: Number of rows that lead to one output channel, one for each place of a transposed convolution's kernel.
        rows: First and one past the last row of the part that is changed, where it is not the whole matrix.
    """

    groups: int = 1
    transposed: bool = False
    stacked: bool = False
    looked_up: bool = False
    kernel: int = 1
    rows: tuple[int, int] | None = None

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the matrix, or the stack of matrices (n, out, in), in a weight.

        Args:
            weight: As it lies in memory.
        """
        matrix = weight
        if self.groups > 1:
            matrix = weight.reshape(self.groups, weight.shape[0] // self.groups, -1)
        elif weight.dim() > 2 and not self.stacked:
            matrix = weight.flatten(1)
        matrix = matrix.mT if self.transposed else matrix
        return matrix if self.rows is None else matrix[slice(*self.rows)]

    def shape(self, size: Iterable[int]) -> tuple[int, ...]:
        """Return the shape of the matrix in a weight of this size."""
        return tuple(self.matrix(torch.empty(tuple(size), device="meta")).shape)

    def put(self, weight: Tensor, matrix: Tensor) -> Tensor:
        """Return a weight with another matrix in it.

        Args:
            weight: The weight; it stays as it is.
            matrix: What to put in the place of ``self.matrix(weight)``.
        """
        if self.rows is not None:
            whole = dataclasses.replace(self, rows=None).matrix(weight)
            matrix = torch.cat([whole[: self.rows[0]], matrix, whole[self.rows[1] :]])
        return (matrix.mT if self.transposed else matrix).reshape(weight.shape)

    def per_unit(self, gain: Tensor) -> Tensor:
        """Return a factor on each of the layer's output units, in their order, from one that fits the matrix.

        Args:
            gain: (out, 1), or (1, in) where rows are looked up, with a stack's dimension in front.
        """
        return gain.reshape(-1) if self.looked_up else gain[..., :: self.kernel, 0].reshape(-1)

    def described(self) -> dict[str, Any]:
        """Return the fields that differ from a linear layer's, as plain types for a file."""
        values = dataclasses.asdict(self)
        return {f.name: values[f.name] for f in dataclasses.fields(self) if values[f.name] != f.default}

    @classmethod
    def from_description(cls, fields: Mapping[str, Any]) -> Layout:
        """Return the layout that ``described`` wrote.

        Raises:
            ValueError: If a field is unknown or out of range.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        for name, value in fields.items():
            if name == "rows":
                right = isinstance(value, list | tuple) and len(value) == 2 and all(map(whole_number, value))
                right = right and 0 <= value[0] < value[1]
            elif name in ("groups", "kernel"):
                right = whole_number(value) and value >= 1
            else:
                right = name in known and isinstance(value, bool)
            if not right:
                raise ValueError(f"layout: {name}={value!r} is no field of a layout, or out of its range")
        rows = fields.get("rows")
        return cls(**{**fields, "rows": None if rows is None else (rows[0], rows[1])})


def whole_number(value: object) -> bool:
    """Tell whether a value from a file is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)
