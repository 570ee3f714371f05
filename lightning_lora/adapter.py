"""`Adapter`: a change to one (out, in) matrix, ``W' = gain * (W + scaling * up @ down)``, or to a stack of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from lightning_lora.dropout import dropout

if TYPE_CHECKING:
    from lightning_lora.method import Method

Role = Literal["A", "B", "magnitude", "scale", "core"]
T = TypeVar("T")
BLOCK_ON_CPU, BLOCK = 2**16, 2**24  # numbers of entries of a matrix that are computed at a time
SHARED = "shared."  # what the names of tensors that adapters have in common begin with in a state dict


class Adapter(nn.Module):
    """A low-rank change to one matrix, or one to each of a stack of matrices, holding its factors as parameters.

    A method's file subclasses it, declares what each parameter is in ``roles``, and writes ``reset_parameters`` and
    ``factors``; everything else follows. Parameters are raw ``nn.Parameter``s, never ``nn.Linear``s, so that sweeps
    over linear layers (quantizers, initialisers, wrapping policies) pass by.

    Attributes:
        method: The hyperparameters that it was built from, with the rank and alpha of its own site.
        scaling: The factor on ``up @ down``.
        dropout: Probability with which an element of the adapter's input is zeroed in training mode.
        dropout_on: Whether that is the input of the whole change or of ``up @ down`` alone: see ``DoRA``.
        roles: What each parameter is, by name; the optimizer groups, and nothing else, look at it.
        low_rank: Whether ``factors`` and ``gain`` say all; if not, the class writes ``adapted``.
        needs_weight: Whether the change depends on the base's weight: there is a ``gain``, or it is not low-rank.
        waits_for_weight: Whether ``start_from`` is still to be called, once the base has its values.
        shares_inputs: Whether its layer shares a cast of its input with others that are given the same one.
        is_shared: Whether this very module is in the place of every adapter that was dropped in its group.
    """

    roles: ClassVar[Mapping[str, Role]] = {}
    low_rank: ClassVar[bool] = True
    needs_weight: bool = False
    waits_for_weight: bool = False
    is_shared: bool = False
    shares_inputs: bool = True
    method: Method
    scaling: float = 1.0
    dropout: float = 0.0
    dropout_on: Literal["change", "branch"] = "change"

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw the parameters anew, from the shapes and the adapter's own seed alone."""

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """Return ``up`` (out, r) and ``down`` (r, in); those of a stack have one more dimension in front."""

    def start_from(self, weight: Tensor) -> None:
        """Set the parameters that start from the base's values; what is loaded from a file does without.

        Args:
            weight: The base matrix (out, in), or the stack (n, out, in).
        """

    def gain(self, weight: Tensor) -> Tensor | None:
        """Return the factor on each output unit, (out, 1), or (1, in) where rows are looked up; None is 1.

        Args:
            weight: As for ``start_from``.
        """
        return None

    def why_not_peft(self) -> str | None:
        """Return why PEFT cannot hold this adapter although it has the method, or None if it can."""
        return None

    def delta(self) -> Tensor:
        """Return the dense low-rank term (out, in), ``scaling * up @ down``."""
        up, down = self.factors()
        return self.scaling * (up @ down)

    def adapted(self, weight: Tensor) -> Tensor:
        """Return the adapted matrix in the dtype of ``weight``, rounded once.

        Args:
            weight: As for ``start_from``.
        """
        changed, gain = weight + self.delta(), self.gain(weight)
        return (changed if gain is None else gain * changed).to(weight.dtype)

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Put the adapted matrix in the place of a matrix, rounded once, some rows at a time: no second one exists.

        Args:
            weight: As for ``start_from``.
        """
        (up, down), gain = self.factors(), self.gain(weight)
        wide = torch.promote_types(torch.promote_types(weight.dtype, up.dtype), torch.float32)
        down = down.to(wide)
        rows = rows_at_a_time(weight)
        for start in range(0, weight.shape[-2], rows):
            some = slice(start, start + rows)
            part = weight[..., some, :]
            changed = part.to(wide)  # the part itself where it is wide enough
            self.add_change(changed, up[..., some, :].to(wide), down)
            if gain is not None:
                changed.mul_(gain if gain.shape[-2] == 1 else gain[..., some, :])
            if changed is not part:
                part.copy_(changed)

    def add_change(self, weight: Tensor, up: Tensor, down: Tensor) -> None:
        """Add the change without its gain to some rows of a matrix, in place.

        Args:
            weight: The rows.
            up: The same rows of that factor.
            down: The other factor.
        """
        (weight.addmm_ if weight.dim() == 2 else weight.baddbmm_)(up, down, alpha=self.scaling)

    def change(self, weight: Tensor) -> Tensor:
        """Return ``adapted(weight) - weight`` without the rounding of a weight in half precision.

        Args:
            weight: As for ``start_from``.
        """
        if not self.needs_weight:
            return self.delta()
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return self.adapted(weight) - weight

    @torch.no_grad()
    def start(self, weight: Tensor) -> None:
        """Call ``start_from`` if it was not called before and nothing was loaded; on the meta device it still waits.

        Args:
            weight: As for ``start_from``.
        """
        if self.waits_for_weight and not weight.is_meta:
            self.start_from(weight)
            self.waits_for_weight = False

    def dropped(self, x: Tensor) -> Tensor:
        """Return ``x`` after the adapter's dropout; an index passes."""
        return dropout(x, self.dropout) if self.drops() and x.is_floating_point() else x

    def drops(self) -> float:
        """Return the probability with which an element of the input is zeroed now."""
        return self.dropout if self.training else 0.0

    def drops_for_gain(self) -> bool:
        """Tell whether the gain's part of the change, ``(gain - 1) * W x``, is of an input with zeroed elements now."""
        return self.needs_weight and self.dropout_on == "change" and self.drops() > 0

    def forward(self, compute: Callable[..., T], *args: object) -> T:
        """Run ``compute(self, *args)`` as this module's forward.

        A host reaches the parameters only through this call, so that hooks on the adapter (FSDP's gather, say)
        surround every use of them.
        """
        return compute(self, *args)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if any(name.startswith(prefix) for name in state_dict):
            self.waits_for_weight = False
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        """Let moves between devices pass but never lose precision: fp32 adapters stay fp32 over a bf16 base."""

        def keep_precision(tensor: Tensor) -> Tensor:
            probe = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
            if probe.dtype == tensor.dtype:
                return fn(tensor)
            return tensor.to(probe.device, torch.promote_types(probe.dtype, tensor.dtype))

        was_meta = any(parameter.is_meta for parameter in self.parameters())
        super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        if was_meta and not any(parameter.is_meta for parameter in self.parameters()):
            self.reset_parameters()
        return self


def rows_at_a_time(weight: Tensor) -> int:
    """Return how many rows of a matrix, or of each of a stack, are computed at a time, so that little of it is new."""
    block = BLOCK_ON_CPU if weight.device.type == "cpu" else BLOCK
    return max(1, block * weight.shape[-2] // max(1, weight.numel()))


def stored_factors(adapter: Adapter) -> list[str]:
    """Return the names of an adapter's tensors that files hold."""
    redrawn = not getattr(getattr(adapter, "shared", None), "stored", True)
    return [name for name in adapter.state_dict() if not (redrawn and name.startswith(SHARED))]


def fits(name: str, shape: Sequence[int], needed: Sequence[int]) -> bool:
    """Tell whether a tensor in a file can be an adapter's: a shared one serves in part where it is larger.

    Args:
        name: The adapter's name of it.
        shape: The shape in the file.
        needed: The shape that the adapter has.
    """
    if not name.startswith(SHARED):
        return tuple(shape) == tuple(needed)
    return len(shape) == len(needed) and all(have >= need for have, need in zip(shape, needed, strict=True))


class Shared(nn.Module):
    """Frozen tensors that all adapters of a task hold as their child ``shared``: once in memory and once in a file.

    Attributes:
        stored: Whether files hold the tensors; if not they hold what ``described`` returns, from which the method's
            ``redrawn`` makes them again.
    """

    stored: bool = True

    def reset_parameters(self) -> None:
        """Draw the tensors anew, on whatever device they are."""
        raise NotImplementedError

    def described(self) -> dict[str, Any]:
        """Return, in plain types, what it takes to draw the tensors again and to know that they are the same."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Shared:
        """Move once: every adapter brings its own call, and the second ``to_empty`` would lose what the first drew."""
        first = next(self.parameters())
        was_meta = first.is_meta
        probe = fn(torch.empty(0, dtype=first.dtype, device=first.device))
        if (probe.device, probe.dtype) != (first.device, first.dtype):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            if was_meta and not probe.is_meta:
                self.reset_parameters()
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Take tensors that are larger than the adapters here need, as those of a larger model are."""
        for name, parameter in self._parameters.items():
            given = state_dict.get(prefix + name)
            if parameter is not None and given is not None and fits(SHARED + name, given.shape, parameter.shape):
                self._parameters[name] = nn.Parameter(parameter.new_empty(given.shape), requires_grad=False)
        super()._load_from_state_dict(state_dict, prefix, *args)
