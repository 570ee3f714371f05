"""`Method`: the hyperparameters of one way to adapt a matrix, and the list of those known."""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from lightning_lora.adapter import Adapter

M = TypeVar("M", bound="Method")


class Method(ABC):
    """Hyperparameters of a method; children are frozen dataclasses that at least have ``r`` and ``alpha``."""

    r: int
    alpha: float

    @abstractmethod
    def build(
        self, shape: tuple[int, ...], *, seed: int, device: torch.device, dtype: torch.dtype, looked_up: bool = False
    ) -> Adapter:
        """Create the adapter of one matrix, or of a stack of matrices.

        Args:
            shape: (out, in) of the matrix, or (n, out, in) of the stack.
            seed: Seed of this adapter's own random numbers, drawn on the CPU so that every device gets the same.
            device: Where the parameters live.
            dtype: Their floating-point type.
            looked_up: Whether rows of the matrix are picked by index, as an embedding's are.
        """

    def at(self: M, r: int, alpha: float) -> M:
        """Return the same method with another rank and alpha, for one site."""
        return dataclasses.replace(self, r=r, alpha=alpha)  # type: ignore[type-var]

    def peft_config(self) -> dict[str, Any] | None:
        """Return the fields of PEFT's ``adapter_config.json`` that express this method, or None if it has none."""
        return None

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Method | None:
        """Return the method that a PEFT config describes, or None if it is not this one.

        Raises:
            ValueError: If it is, with an option that this library does not compute.
        """
        return None

    def hyperparameters(self) -> dict[str, Any]:
        """Return the fields as plain types, ready for a file."""
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return]


def known_methods() -> dict[str, type[Method]]:
    """Return every method that has been imported, by class name."""
    found: dict[str, type[Method]] = {}
    pending = list(Method.__subclasses__())
    while pending:
        cls = pending.pop()
        pending.extend(cls.__subclasses__())
        if not inspect.isabstract(cls):
            found[cls.__name__] = cls
    return dict(sorted(found.items()))
