"""The directions that the inputs of a matrix take, from a stream of them, never storing the inputs themselves.

::

    found = find_targets(model, "all-linear")
    statistics = input_statistics(model, found, batches, forward=lambda batch: model(batch[0]))
    directions, share = statistics["layers.0.q_proj.weight"].top(8)  # (8, in) and (8,)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends import mha

from lightning_lora.candidates import Candidate
from lightning_lora.evaluation import Loss, loss_of, undisturbed
from lightning_lora.layers import kind_of
from lightning_lora.layers.attention import AdaptedMultiheadAttention
from lightning_lora.layers.convolution import AdaptedConvolution, AdaptedConvTranspose
from lightning_lora.layers.linear import AdaptedLinear

Take = Callable[[Candidate, Tensor], None]


class InputStatistics:
    """The leading right singular vectors of all rows given so far, stacked; not centred.

    Rows up to ``exact_width`` long are kept as their Gram matrix ``X.T @ X`` (in, in), which is exact. Of longer ones
    an incremental SVD keeps ``rank`` directions; it is exact while the rows have no higher rank, and otherwise gives
    shares that are too small, never too large, because the energy of all rows is counted.

    Args:
        name: What the matrix is called, for messages.
        shape: (out, in) of the matrix that the rows are multiplied with, or (n, out, in) of a stack.
        rank: Number of directions kept where rows are long.
        exact_width: Length up to which the Gram matrix is kept.

    Attributes:
        count: Number of rows seen.
        energy: Sum of their squares, for each matrix of a stack.
    """

    def __init__(self, name: str, shape: Sequence[int], rank: int = 64, exact_width: int = 2048) -> None:
        self.name = name
        self.stack, self.width = tuple(shape[:-2]), shape[-1]
        self.rank = min(rank, self.width)
        self.exact = self.width <= exact_width
        self.count = 0
        self.energy: Tensor = torch.zeros(self.stack)
        self._gram: Tensor | None = None
        self._sketch: Tensor | None = None  # singular values times right singular vectors, (rank, in)

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """Take further rows into account.

        Args:
            rows: (rows, in), or (n, rows, in) for a stack, in any floating-point type; half precision is widened, also
                under autocast.
        """
        with torch.autocast(rows.device.type, enabled=False):
            self._update(rows.to(torch.promote_types(rows.dtype, torch.float32)))

    def _update(self, rows: Tensor) -> None:
        self.count += rows.shape[-2]
        self.energy = self.energy.to(rows) + rows.square().sum((-2, -1))
        if self.exact:
            gram = rows.mT @ rows
            self._gram = gram if self._gram is None else self._gram + gram
            return
        for piece in torch.split(rows, 4 * self.rank, -2):
            joined = piece if self._sketch is None else torch.cat([self._sketch, piece], -2)
            values, directions = torch.linalg.svd(joined, full_matrices=False)[1:]
            self._sketch = values[..., : self.rank, None] * directions[..., : self.rank, :]

    @torch.no_grad()
    def all_reduce(self) -> None:
        """Take the rows that all processes were given into account; each has to call it, in the same order."""
        kept = self._gram if self.exact else self._sketch
        mine = (self.count, self.energy.cpu(), None if kept is None else kept.cpu())
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        device = self.energy.device
        seen = [(count, energy, part) for count, energy, part in everyone if part is not None]
        if not seen:
            return
        self.count, self.energy = sum(one[0] for one in seen), sum(one[1] for one in seen).to(device)
        if self.exact:
            self._gram = sum(one[2] for one in seen).to(device)
            return
        values, directions = torch.linalg.svd(torch.cat([one[2] for one in seen], -2).to(device), full_matrices=False)[
            1:
        ]
        self._sketch = values[..., : self.rank, None] * directions[..., : self.rank, :]

    @torch.no_grad()
    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """Return the directions that hold the most of the inputs' energy, largest share first.

        Args:
            k: How many.

        Returns:
            Orthonormal directions (k, in), and the share of the energy ``sum ||x||^2`` along each (k,); with one more
            dimension in front for a stack.

        Raises:
            ValueError: If no row was seen, or fewer directions than k are known.
        """
        if not self.count:
            raise ValueError(
                f"{self.name} got no input: the batches did not call its layer, or its inputs cannot be seen "
                "(embeddings, attention's out_proj, recurrent layers, experts): leave it out"
            )
        kept = self.width if self._sketch is None else self._sketch.shape[-2]
        if not 1 <= k <= kept:
            raise ValueError(
                f"k={k}: of the inputs of {self.name} (width {self.width}) 1 to {kept} directions are known after "
                f"{self.count} rows: give more batches, or keep more with a higher rank=..."
            )
        if self._gram is not None:
            squares, vectors = torch.linalg.eigh(self._gram.double())
            squares, directions = squares.flip(-1).clamp_min(0), vectors.mT.flip(-2)
        else:
            _, values, directions = torch.linalg.svd(self._sketch.double(), full_matrices=False)  # type: ignore[union-attr]
            squares = values.square()
        share = squares / self.energy.double().clamp_min(torch.finfo(torch.float64).tiny)[..., None]
        return directions[..., :k, :].to(self.energy.dtype), share[..., :k].to(self.energy.dtype)

    @torch.no_grad()
    def follow(self, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return about what ``top`` does, to be asked after each batch: of a Gram matrix by subspace iteration.

        Up to ``rank`` directions are returned. It is exact where rows are no longer than ``rank`` or an incremental SVD
        is kept; otherwise each call comes closer.

        Args:
            before: The directions that the last call returned.
        """
        if self._sketch is not None:
            return self.top(self._sketch.shape[-2])
        gram: Tensor = self._gram  # type: ignore[assignment]
        if before is None:
            before = torch.randn(*self.stack, self.rank, self.width, generator=torch.Generator().manual_seed(0)).to(
                gram
            )
        for _ in range(2):
            before = torch.linalg.qr((before @ gram).mT)[0].mT
        squares, vectors = torch.linalg.eigh(before @ gram @ before.mT)
        return vectors.mT.flip(-2) @ before, squares.flip(-1).clamp_min(0) / self.energy[..., None]

    def explained(self, k: int) -> float:
        """Return the share of the energy of all inputs that their k leading directions hold (EVA, arXiv:2410.07170).

        Args:
            k: How many directions, of each matrix of a stack; where fewer are known, all that are.
        """
        known = self.width if self._sketch is None else self._sketch.shape[-2]
        share = self.top(min(k, known))[1].double().sum(-1)
        return float((share * self.energy.double()).sum() / self.energy.double().sum())


def input_statistics(
    model: nn.Module,
    found: Sequence[Candidate],
    batches: Iterable[Any],
    forward: Loss | None = None,
    *,
    rank: int = 64,
    exact_width: int = 2048,
    mask: Callable[[Any], Tensor] | None = None,
) -> dict[str, InputStatistics]:
    """Return the statistics of the inputs of matrices, by site name, and leave the model as it was.

    Runs in eval mode without gradients. A matrix whose inputs cannot be seen (``sees_inputs``), or that the batches
    did not reach, has a ``count`` of 0.

    Args:
        model: Any module, adapted or not.
        found: Its matrices, from ``find_targets`` or ``candidates``.
        batches: What ``forward`` takes.
        forward: Runs the model on a batch; None takes the ``training_step`` of a LightningModule.
        rank: As for ``InputStatistics``.
        exact_width: Likewise.
        mask: Gives the mask of a batch, true where a token counts; as for ``input_hooks``.
    """
    statistics = {one.site.name: InputStatistics(one.site.name, one.shape, rank, exact_width) for one in found}

    def take(one: Candidate, rows: Tensor) -> None:
        statistics[one.site.name].update(rows)

    with undisturbed(model), loss_of(model, forward) as run, torch.no_grad():
        for batch in batches:
            with input_hooks(found, take, None if mask is None else mask(batch)):
                run(batch)
    return statistics


def sees_inputs(one: Candidate) -> bool:
    """Tell whether a matrix's inputs can be seen.

    They can of linear layers (transformers' ``Conv1D`` too), of convolutions, and of the input projections of
    attention. They cannot where rows are looked up (an embedding's input is an index), and not of what is multiplied
    out of sight: attention's ``out_proj``, recurrent layers, experts and other named parameters.
    """
    return _rows_of(one) is not None


@contextmanager
def input_hooks(found: Sequence[Candidate], take: Take, mask: Tensor | None = None) -> Iterator[None]:
    r"""Call ``take(candidate, rows)`` with the inputs of each matrix, at each call of its layer in a ``with`` block.

    Rows are (rows, in) for a matrix and (n, rows, in) for a stack, detached: tokens of a linear layer, patches of a
    convolution, positions of a transposed one, and of attention the query, key or value that the projection reads.

    Args:
        found: The matrices; those whose inputs cannot be seen are passed over.
        take: What is called.
        mask: Which tokens count: inputs (\*mask.shape, in) lose the rows where it is false; others are taken whole.
    """
    with ExitStack() as hooks:
        # the fused inference path of PyTorch's encoder calls none of its layers
        hooks.callback(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
        mha.set_fastpath_enabled(False)
        for one in found:
            rows_of = _rows_of(one)
            for site in (one.site, *one.tied) if rows_of else ():
                hook = _hook(one, rows_of, take, mask)
                hooks.callback(site.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _hook(one: Candidate, rows_of: Any, take: Take, mask: Tensor | None) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch.no_grad():
            take(one, rows_of(one, module, args, kwargs, mask))

    return hook


def _rows_of(one: Candidate) -> Any:
    kind = kind_of(one.site.module)
    if kind is None or one.layout.looked_up or one.read:
        return None
    if issubclass(kind, AdaptedMultiheadAttention):
        return _attention_rows
    if issubclass(kind, AdaptedLinear):
        return _linear_rows
    if issubclass(kind, AdaptedConvolution):
        return _patches
    return _positions if issubclass(kind, AdaptedConvTranspose) else None


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return (args[0] if args else next(iter(kwargs.values()))).detach()


def _tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None and mask.shape == x.shape[:-1]:
        return x[mask.to(x.device).bool()]
    return x.reshape(-1, x.shape[-1])


def _linear_rows(one: Candidate, module: nn.Module, args: Any, kwargs: Any, mask: Tensor | None) -> Tensor:
    return _tokens(_first(args, kwargs), mask)


def _attention_rows(one: Candidate, module: nn.Module, args: Any, kwargs: Any, mask: Tensor | None) -> Tensor:
    """Return what a projection reads; a packed one reads all three, once where they are one tensor."""
    named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
    read = [named["query"], named["key"], named["value"]]
    if one.site.parameter != "in_proj_weight":  # one of q_proj_weight, k_proj_weight, v_proj_weight
        return _tokens(read["qkv".index(one.site.parameter[0])].detach(), mask)
    first, last = one.layout.rows or (0, one.size[0])
    width = one.size[0] // 3
    read = read[first // width : -(-last // width)]
    distinct = {id(x): x.detach() for x in read}.values()
    return torch.cat([_tokens(x, mask) for x in distinct])


def _patches(one: Candidate, module: Any, args: Any, kwargs: Any, mask: Tensor | None) -> Tensor:
    """Return the unfolded input, (rows, in / groups * kernel) for each group."""
    dims = module.weight.dim() - 2
    x = _first(args, kwargs)
    x = x.reshape(-1, *x.shape[-dims - 1 :])  # also takes what has no batch dimension
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    geometry = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    for dim, (size, stride, dilation) in enumerate(geometry, start=2):
        x = x.unfold(dim, (size - 1) * dilation + 1, stride)[..., ::dilation]
    return _by_group(x.movedim(1, dims + 1).flatten(0, dims).flatten(1), module.groups)


def _positions(one: Candidate, module: Any, args: Any, kwargs: Any, mask: Tensor | None) -> Tensor:
    """Return the channels at each position, (rows, in / groups) for each group."""
    dims = module.weight.dim() - 2
    x = _first(args, kwargs)
    x = x.reshape(-1, *x.shape[-dims - 1 :])
    return _by_group(x.movedim(1, -1).flatten(0, -2), module.groups)


def _by_group(rows: Tensor, groups: int) -> Tensor:
    return rows if groups == 1 else rows.reshape(len(rows), groups, -1).movedim(1, 0)
