"""`Method`: the hyperparameters of one way to adapt a matrix, and the list of those known."""

from __future__ import annotations

import dataclasses
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from lightning_lora.adapter import Adapter
from lightning_lora.layout import Layout, whole_number
from lightning_lora.schedule import Schedule

if TYPE_CHECKING:
    from lightning_lora.sites import Site

M = TypeVar("M", bound="Method")


class Method(ABC):
    """Hyperparameters of a method; children are frozen dataclasses that at least have ``r`` and ``alpha``."""

    r: int
    alpha: float
    needs_total_steps: ClassVar[bool] = False
    refused: ClassVar[Mapping[str, str]] = {}  # options of other methods that cannot go with this one, and why
    restructures: bool = False  # whether training changes ranks, or which matrices have adapters of their own
    writes_to_base: bool = False  # whether training writes to the base's weights, which then have to be in fp32
    averageable: ClassVar[Literal["all", "trained", "nothing"]] = "all"  # over which tensors steps can be averaged

    freezes_shared: ClassVar[bool] = False  # whether an adapter that several matrices share is not trained

    def __new__(cls: type[M], *args: Any, **options: Any) -> M:
        """Refuse what other methods have and this one cannot have, with the reason.

        Raises:
            ValueError: If such an option is given.
        """
        for name, value in options.items():
            if name in cls.refused:
                raise ValueError(f"{cls.__name__}({name}={value!r}): {cls.refused[name]}")
        return super().__new__(cls)

    @abstractmethod
    def build(
        self,
        shape: tuple[int, ...],
        *,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        layout: Layout | None = None,
    ) -> Adapter:
        """Create the adapter of one matrix, or of a stack of matrices.

        Args:
            shape: (out, in) of the matrix, or (n, out, in) of the stack.
            seed: Seed of this adapter's own random numbers, drawn on the CPU so that every device gets the same.
            device: Where the parameters live.
            dtype: Their floating-point type.
            layout: How the matrix lies in its weight, and so what an output unit of it is; None is a linear layer's.
        """

    def attach(self, adapters: Mapping[str, Adapter]) -> None:
        """Tie together what adapters share, after one or more were made.

        Args:
            adapters: All of one task, by the names of their sites.

        Raises:
            ValueError: If the new ones do not fit those that were there.
        """
        return

    def redrawn(self, described: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return what adapters share, by its name there, where a file holds a description in its place.

        Args:
            described: What `Shared.described` returned.

        Raises:
            ValueError: If what is drawn is not what it was.
        """
        raise ValueError(f"the adapters of {type(self).__name__} share nothing that is drawn again")

    def schedules(self, sites: Sequence[Site], task: str, total_steps: int | None = None) -> list[Schedule]:
        """Return what the method does around the steps of an optimizer in one run.

        Args:
            sites: The adapted matrices.
            task: The adapters' name.
            total_steps: Number of optimizer steps of the run; needed where ``needs_total_steps`` says so.
        """
        return []

    def why_no_ratio(self) -> str | None:
        """Return why LoRA+'s learning-rate ratio between B and A means nothing here, or None if it does."""
        return None

    def doubts(self, lr_ratio: float = 1.0) -> list[str]:
        """Return sentences on choices that are allowed and will disappoint.

        Args:
            lr_ratio: Learning rate of B divided by that of A.
        """
        return []

    def at(self: M, r: int, alpha: float) -> M:
        """Return the same method with another rank and alpha, for one site."""
        return dataclasses.replace(self, r=r, alpha=alpha)  # type: ignore[type-var]

    def to_peft(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return an adapter's parameters as those that PEFT has for the same change: here as they are.

        Args:
            factors: All of one adapter, by name.
        """
        return dict(factors)

    def of_peft(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what ``to_peft`` was given, bit for bit.

        Args:
            factors: What it returned.
        """
        return dict(factors)

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
        """Return the fields that can be chosen as plain types, ready for a file."""
        values = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {field.name: values[field.name] for field in dataclasses.fields(self) if field.init}  # type: ignore[arg-type]


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


def check_r(r: object, lowest: int, example: int) -> None:
    """Raise ``ValueError`` if a rank is out of range.

    Args:
        r: Rank.
        lowest: The smallest there may be.
        example: One to name.
    """
    if not (whole_number(r) and r >= lowest):  # type: ignore[operator]
        raise ValueError(f"r={r!r}: the rank must be a whole number of at least {lowest}, for example r={example}")


def check_alpha(alpha: object) -> None:
    """Raise ``ValueError`` if an alpha is out of range.

    Args:
        alpha: Scale of a change.
    """
    if not (isinstance(alpha, int | float) and math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha={alpha!r}: must be a finite number above 0, for example alpha=16")


def check_fraction(name: str, value: object, example: float) -> None:
    """Raise ``ValueError`` if a field that is to be from 0 to below 1 is not.

    Args:
        name: The field's name.
        value: Its value.
        example: One to name.
    """
    if not (isinstance(value, int | float) and 0 <= value < 1):
        raise ValueError(f"{name}={value!r}: must be at least 0 and below 1, for example {name}={example}")


def check_scaling(scaling: object) -> None:
    """Raise ``ValueError`` if a scaling is not one of those known.

    Args:
        scaling: What alpha is divided by.
    """
    if scaling not in ("linear", "rsqrt"):
        raise ValueError(f"scaling={scaling!r}: must be 'linear' (alpha / r) or 'rsqrt' (alpha / sqrt(r))")
