"""Batches in which each example has a task of its own.

The factors of the tasks lie in one stack, padded with zeros to the largest rank, and each product is one for
all tasks, as in Punica (Chen et al., 2023, arXiv:2310.18547), here by PyTorch's batched products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.adapter import Adapter
from lightning_lora.functional import are_ordinary, computed_in
from lightning_lora.layers.convolution import AdaptedConvolution, AdaptedConvTranspose
from lightning_lora.layers.linear import AdaptedLinear
from lightning_lora.layers.seam import Called, Reader, started_factors
from lightning_lora.sites import Slot, check_known, check_not_written, named_submodules, sites, slots_at


@contextmanager
def per_example(model: nn.Module, tasks: Sequence[str | None], dim: int | None = None) -> Iterator[nn.Module]:
    """Use a task for each example of a batch for the length of a ``with`` block.

    An adapted layer takes the first dimension of its input for that of the examples; where it is a multiple of their
    number (beams, flattened tokens), what belongs to one example lies together. Backward passes belong in the block too
    where activations are checkpointed.

    Args:
        model: The adapted model.
        tasks: A task for each example, added at ``inject`` or ``load_adapter``; None is the bare base, as are layers
            that have no adapter of an example's task.
        dim: The examples' dimension in the inputs of three or more dimensions of linear layers and embeddings; 1 where
            the sequence comes first. None is 0, unless something in the model has ``batch_first=False``.

    Raises:
        ValueError: If there are no tasks or the model has no adapter of one, an adapted weight is read by attention, a
            recurrent layer or another forward that does not call its layer, or it is unclear where the examples are;
            in the block, if the input of a layer cannot be divided among them.
        RuntimeError: If adapters are merged, or this is inside such a block already, or the training of a task writes
            to the base meanwhile.
    """
    if isinstance(tasks, str) or not tasks:
        raise ValueError(f"tasks={tasks!r}: must be a list with a task, or None, for each example of the batch")
    places = [(site.name, site.slot) for site in sites(model)]
    check_known([slot for _, slot in places], [task for task in dict.fromkeys(tasks) if task is not None])
    for task in dict.fromkeys(tasks):
        check_not_written(model, [] if task is None else [task])
    dim = _checked(model, places, dim)
    mixed = {name: _tasks_at(slot, tasks) for name, slot in places}
    read_by = _read_slots(model)
    for name, slot in places:
        if id(slot) in read_by and len(set(mixed[name])) > 1:
            raise ValueError(
                f"{name}: the forward of {read_by[id(slot)] or 'the model'} reads this weight once for a "
                "whole batch: run the examples of each task by themselves, in using(model, task)"
            )
    before = [(slot, slot.active) for _, slot in places]
    try:
        for name, slot in places:
            slot.use(tuple(task for task in dict.fromkeys(mixed[name]) if task is not None))
            if len(set(mixed[name])) > 1:
                slot.per_example = _PerExample(name, mixed[name], dim)
        yield model
    finally:
        for slot, active in before:
            slot.active, slot.per_example = active, None


def _checked(model: nn.Module, places: list[tuple[str, Slot]], dim: int | None) -> int:
    """Return the examples' dimension, if a block can be entered."""
    for name, slot in places:
        if slot.merged:
            raise RuntimeError(f"{name} is merged, for all examples alike: leave `merged(model)` first")
        if slot.per_example is not None:
            raise RuntimeError("per_example(model, ...) inside another such block: leave that one first")
    if dim not in (None, 0, 1):
        raise ValueError(f"dim={dim!r}: must be 0, or 1 where the sequence comes first")
    if dim is None:
        for name, module in named_submodules(model).items():
            if getattr(module, "batch_first", True) is False:
                raise ValueError(
                    f"{name or 'the model'} has batch_first=False, so adapted layers may see the sequence first: "
                    "write per_example(model, tasks, dim=1), or dim=0 if they see the examples first"
                )
    return dim or 0


def _tasks_at(slot: Slot, tasks: Sequence[str | None]) -> tuple[str | None, ...]:
    return tuple(task if task is not None and task in slot else None for task in tasks)


def _read_slots(model: nn.Module) -> dict[int, str]:
    """Return, by the id of each slot whose weight a forward reads, the name of the module that does."""
    found: dict[int, str] = {}
    for name, module in named_submodules(model).items():
        if isinstance(module, Reader):
            for owner, parameter in module.reads(module):
                found.update((id(slot), name) for slot in slots_at(owner, parameter))
    return found


class _Rows(NamedTuple):
    """Where examples are.

    Attributes:
        group: The number of its group, for each example.
        order: The examples, group by group, each group filled up to the size of the largest.
        back: The place of each example in that order.
    """

    group: Tensor
    order: Tensor
    back: Tensor


class _Stacks(NamedTuple):
    """The factors of all groups, ``up`` (groups, out, r) and ``down`` (groups, r, in), and the one on their product."""

    up: Tensor
    down: Tensor
    scaling: float


@dataclass
class _Kept:
    """Stacks from one forward to the next, and what they were made from."""

    adapters: list[Adapter | None]
    parameters: list[nn.Parameter]
    state: object = None
    stacks: _Stacks | None = None


class _PerExample:
    """What changes the outputs of the layers at one site.

    Args:
        name: The site's.
        tasks: One for each example, of which there are at least two; None is no change.
        dim: The examples' dimension.
    """

    def __init__(self, name: str, tasks: tuple[str | None, ...], dim: int) -> None:
        self.name, self.tasks, self.dim = name, tasks, dim
        self.groups = list(dict.fromkeys(tasks))
        members = [[i for i, task in enumerate(tasks) if task == group] for group in self.groups]
        self.largest = max(map(len, members))
        padded = [inside + inside[:1] * (self.largest - len(inside)) for inside in members]
        self.order = [example for inside in padded for example in inside]
        self.in_order = self.order == list(range(len(tasks)))
        self.rows: dict[tuple[torch.device, bool], _Rows] = {}
        self.kept: _Kept | None = None

    def __call__(self, layer: nn.Module, slot: Slot, output: Tensor, input: Tensor) -> Tensor:
        """Return an output as the adapter of each example changes its part of it.

        Args:
            layer: The layer.
            slot: The site's.
            output: What the layer gave, or those of its units that are changed.
            input: What the layer was given.
        """
        assert isinstance(layer, Called)
        adapters = [None if task is None else cast(Adapter, slot[task]) for task in self.groups]
        change = self._stacked if _stackable(layer, adapters) else self._one_by_one
        if self._dim(layer, output):
            return change(layer, slot, adapters, output.transpose(0, 1), input.transpose(0, 1)).transpose(0, 1)
        return change(layer, slot, adapters, output, input)

    def _dim(self, layer: Called, output: Tensor) -> int:
        """Return the examples' dimension in this output."""
        if isinstance(layer, AdaptedConvolution | AdaptedConvTranspose):  # channels come second in all of them
            fewest, dim = len(layer.kernel_size) + 2, 0  # type: ignore[arg-type]
        else:
            fewest, dim = 2, self.dim if output.dim() > 2 else 0
        examples = output.shape[dim] if output.dim() >= fewest else 0
        flattened = dim != self.dim and fewest == 2 and examples != len(self.tasks)  # by places, not by examples
        if not examples or examples % len(self.tasks) or flattened:
            raise ValueError(
                f"{self.name}: an output of size {list(output.shape)} cannot be divided among {len(self.tasks)} "
                f"examples along dimension {dim}: give one task for each example of the batch, or run the examples of "
                "each task by themselves, in using(model, task)"
            )
        return dim

    def _stacked(
        self, layer: Called, slot: Slot, adapters: list[Adapter | None], output: Tensor, input: Tensor
    ) -> Tensor:
        """Return the output of a linear layer, changed by two batched products.

        Gathered by group is the smaller one of the factors, of which an example moves r rows, and the rows themselves.
        """
        examples, groups = len(self.tasks), len(self.groups)
        dtype = computed_in(input)
        up, down, scaling = self._factors(layer, slot, adapters, input, dtype)
        rows = self._rows_on(input.device)
        y = output.reshape(examples, -1, output.shape[-1])
        x = input.reshape(examples, -1, input.shape[-1]).to(dtype)
        if self.in_order:
            y, x = y.reshape(groups, -1, y.shape[-1]), x.reshape(groups, -1, x.shape[-1])
        elif x.shape[1] * len(self.order) < down.shape[1] * examples:
            x = x.index_select(0, rows.order).view(groups, -1, x.shape[-1])
            change = torch.bmm(torch.bmm(x, down.mT), up.mT).view(len(self.order), -1, y.shape[-1])
            change = change.index_select(0, rows.back).to(y.dtype)
            return torch.add(y, change, alpha=scaling).view(output.shape)
        else:
            up, down = up.index_select(0, rows.group), down.index_select(0, rows.group)
        z = torch.bmm(x, down.mT)
        if y.dtype == dtype:
            return torch.baddbmm(y, z, up.mT, alpha=scaling).view(output.shape)
        return torch.add(y, torch.bmm(z, up.mT).to(y.dtype), alpha=scaling).view(output.shape)

    def _factors(
        self, layer: Called, slot: Slot, adapters: list[Adapter | None], input: Tensor, dtype: torch.dtype
    ) -> _Stacks:
        """Return the stacks: made once where no gradient is wanted, and again if parameters were written to since.

        In training mode they are made for each forward, because methods may compute others every time.
        """
        if torch.compiler.is_compiling() or slot.training:
            return _stacks(layer, slot, adapters, dtype)
        if self.kept is None or self.kept.adapters != adapters:
            own = [p for adapter in adapters if adapter is not None for p in adapter.parameters()]
            self.kept = _Kept(adapters, own)
        kept = self.kept
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in kept.parameters)
        if trained or not are_ordinary(*kept.parameters):
            return _stacks(layer, slot, adapters, dtype)
        written = [0 if p.is_inference() else p._version for p in kept.parameters]
        chosen = [getattr(adapter, "rank", None) for adapter in adapters]  # DyLoRA's part of its factors
        state = (dtype, input.device, torch.is_inference_mode_enabled(), written, chosen)
        if kept.stacks is None or kept.state != state:
            kept.state, kept.stacks = state, _stacks(layer, slot, adapters, dtype)
        return kept.stacks

    def _rows_on(self, device: torch.device) -> _Rows:
        """Return where the examples are: made once, and again for inference mode, whose tensors autograd refuses."""
        if torch.compiler.is_compiling():
            return self._made_rows(device)
        kind = (device, torch.is_inference_mode_enabled())
        if kind not in self.rows:
            self.rows[kind] = self._made_rows(device)
        return self.rows[kind]

    def _made_rows(self, device: torch.device) -> _Rows:
        number = {group: i for i, group in enumerate(self.groups)}
        back = [self.order.index(i) for i in range(len(self.tasks))]
        lists = ([number[task] for task in self.tasks], self.order, back)
        return _Rows(*(torch.tensor(one, device=device) for one in lists))

    def _one_by_one(
        self, layer: Called, slot: Slot, adapters: list[Adapter | None], output: Tensor, input: Tensor
    ) -> Tensor:
        """Return the output of any layer, changed group by group as in a batch of that task alone."""
        each = torch.arange(len(output), device=output.device).view(len(self.tasks), -1)
        parts, members = [], []
        for group, adapter in zip(self.groups, adapters, strict=True):
            index = each[[i for i, task in enumerate(self.tasks) if task == group]].flatten()
            part = output.index_select(0, index)
            if adapter is not None:
                part = layer.changed_by(slot, [adapter], part, input.index_select(0, index))
            parts.append(part)
            members.append(index)
        return torch.cat(parts).index_select(0, torch.cat(members).argsort())


def _stackable(layer: Called, adapters: list[Adapter | None]) -> bool:
    """Tell whether the layer is a product with a matrix, and all changes to it are low-rank terms on the same input."""
    return isinstance(layer, AdaptedLinear) and all(
        adapter is None or (adapter.low_rank and not adapter.needs_weight and not adapter.drops())
        for adapter in adapters
    )


def _stacks(layer: Called, slot: Slot, adapters: list[Adapter | None], dtype: torch.dtype) -> _Stacks:
    found = [None if adapter is None else adapter(started_factors, layer, slot) for adapter in adapters]
    rank = max(len(pair[1]) for pair in found if pair is not None)
    if None in found:
        up, down = next(pair for pair in found if pair is not None)
        nothing = up.new_zeros(len(up), rank), down.new_zeros(rank, down.shape[1])
        found = [nothing if pair is None else pair for pair in found]
    ups, downs = zip(*found, strict=True)
    up = torch.stack([F.pad(up, (0, rank - up.shape[1])) if up.shape[1] < rank else up for up in ups])
    down = torch.stack([F.pad(down, (0, 0, 0, rank - len(down))) if len(down) < rank else down for down in downs])
    scalings = [math.nan if adapter is None else adapter.scaling for adapter in adapters]
    (scaling, *others) = dict.fromkeys(one for one in scalings if not math.isnan(one))
    if others:
        factors = [scaling if math.isnan(one) else one for one in scalings]
        up, scaling = up * torch.tensor(factors, device=up.device, dtype=up.dtype).view(-1, 1, 1), 1.0
    return _Stacks(up.to(dtype), down.to(dtype), scaling)
