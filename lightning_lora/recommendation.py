"""Which matrices to adapt: scores from a few batches, side by side, and the best choice within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_lora.adapter import Adapter
from lightning_lora.candidates import Candidate
from lightning_lora.evaluation import Loss, loss_of, undisturbed
from lightning_lora.gradient_means import GradientMeans
from lightning_lora.input_statistics import InputStatistics, input_hooks
from lightning_lora.knapsack import best_within
from lightning_lora.merge import check_not_merged
from lightning_lora.quantized import is_quantized
from lightning_lora.sites import sites
from lightning_lora.targets import Parts, find_targets

_DIRECTIONS = 64  # at least so many are kept of wide inputs


@dataclass(frozen=True)
class Score:
    """What a few batches say about one matrix, or a stack of them; None where it cannot be told.

    Args:
        name: The matrix, as ``target_modules`` takes it.
        shape: (out, in), or (n, out, in) of a stack.
        parameters: Number that an adapter of rank r has.
        gradient: Frobenius norm of the gradient G of the mean loss with respect to the matrix.
        captured: Energy of G that a change of rank r can follow: the sum of its r largest squared singular values.
        inputs: Share of the energy of the matrix's inputs along their r leading directions.
        importance: Share of ``sum ||dW x||^2`` of a trained adapter in that of all, over all inputs x.
        chosen: Whether it is in the best choice within the budget.
    """

    name: str
    shape: tuple[int, ...]
    parameters: int
    gradient: float | None = None
    captured: float | None = None
    inputs: float | None = None
    importance: float | None = None
    chosen: bool = False


@dataclass(frozen=True)
class Recommendation:
    """Scores of matrices, the highest first.

    Args:
        r: The rank that they were scored for.
        scores: One for each matrix.
    """

    r: int
    scores: tuple[Score, ...]

    @property
    def targets(self) -> list[str]:
        """The chosen matrices, to be passed on as ``target_modules``; empty without a budget."""
        return [score.name for score in self.scores if score.chosen]

    def table(self) -> str:
        """Return a line for each matrix; ``docs/choosing.md`` says what the columns mean."""
        total = sum(score.captured or 0 for score in self.scores) or 1.0
        head = ("matrix", "shape", "parameters", "gradient", f"in top {self.r}", "captured", "inputs", "importance", "")
        body = [head]
        for score in self.scores:
            in_top = score.captured / score.gradient**2 if score.captured is not None and score.gradient else None
            body.append(
                (
                    score.name,
                    " x ".join(map(str, score.shape)),
                    f"{score.parameters:,}",
                    "-" if score.gradient is None else f"{score.gradient:.3g}",
                    _percent(in_top),
                    _percent(None if score.captured is None else score.captured / total),
                    _percent(score.inputs),
                    _percent(score.importance),
                    "chosen" if score.chosen else "",
                )
            )
        widths = [max(len(row[column]) for row in body) for column in range(len(head))]
        lines = []
        for name, *cells, chosen in body:
            numbers = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths[1:-1], strict=True))
            lines.append(f"{name.ljust(widths[0])}  {numbers}  {chosen}".rstrip())
        return "\n".join(lines)


def recommend_targets(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    r: int = 8,
    budget: int | None = None,
    by: Literal["captured", "importance"] = "captured",
    n_batches: int = 4,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: Sequence[str] = (),
    fused: Parts | None = None,
    mask: Callable[[Any], Tensor] | None = None,
    passes: int = 1,
    task: str = "default",
) -> Recommendation:
    """Score the matrices that could be adapted by what a few batches do in them, and leave the model as it was.

    With a budget the choice is the one, of all whose adapters have no more parameters together, that maximises the sum
    of the column ``by``. ``captured`` is the energy that the gradients of the chosen matrices have in their r largest
    singular values: to first order, how fast the loss falls along steps of rank r. ``importance`` is how much trained
    adapters change the outputs of their layers.

    Runs in eval mode, with the adapters that are in use. Each gradient is reduced to numbers as soon as the backward
    pass of the last batch has it; until then the sum over the batches is kept, in fp32, of every matrix of a pass. One
    batch keeps none.

    Args:
        model: Any module, adapted or not.
        batches: Such as a training loader.
        loss: A function of a batch that returns a tensor of one number; None takes the ``training_step`` of a
            LightningModule.
        r: The rank to score for.
        budget: Highest number of parameters of the chosen adapters together; None chooses nothing.
        by: What the best choice has most of, and what the table is sorted by.
        n_batches: How many batches are taken.
        target_modules: Which matrices to score, as for ``inject``.
        exclude_modules: Likewise.
        fused: Likewise.
        mask: Gives the mask of a batch (batch, tokens), true where a token counts among the inputs.
        passes: In how many groups the matrices are scored, one after the other, each with a run over the batches: so
            many times less memory, so many times more time.
        task: Name of the trained adapters, if there are any, for their importance.

    Raises:
        ValueError: If a pattern matches nothing, a number is out of range, there are no batches, or the loss has no
            gradient.
        RuntimeError: If the model is inside ``merged``, or a part of it runs backward more than once for one loss.
    """
    for name, value in (("r", r), ("n_batches", n_batches), ("passes", passes)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: must be a whole number of at least 1, for example {name}=4")
    if budget is not None and budget < 1:
        raise ValueError(f"budget={budget!r}: must be a number of parameters, or None for the table alone")
    check_not_merged(model, "score matrices")
    if by not in ("captured", "importance"):
        raise ValueError(f"by={by!r}: must be 'captured', or 'importance' where adapters were trained")
    found = find_targets(model, target_modules, exclude_modules, fused=fused)
    adapters = {site.name: site.adapter(task) for site in sites(model, task)}
    if by == "importance" and not adapters:
        raise ValueError(
            f"by='importance' compares what trained adapters do, and the model has none of task {task!r}: inject them "
            "and train for a while, or write by='captured'"
        )
    measured: list[Score] = []
    with undisturbed(model), loss_of(model, loss) as loss_at:
        taken = list(islice(batches, n_batches))
        if not taken:
            raise ValueError("batches is empty: pass at least one, for example a training loader")
        for group in range(min(passes, len(found))):
            part = [_Measurement(one, r, adapters.get(one.site.name)) for one in found[group::passes]]
            _measure(model, part, taken, loss_at, mask)
            measured += [one.score(r) for one in part]
    if all(score.gradient is None for score in measured):
        raise ValueError(
            f"none of {len(found)} matrices (first: {found[0].site.name}) got a gradient: either the loss is detached, "
            "or the batches reach none of them, or all are packed or computed from others"
        )
    total = sum(score.importance or 0 for score in measured) or 1.0
    scores = [one if one.importance is None else replace(one, importance=one.importance / total) for one in measured]
    values = [getattr(score, by) or 0.0 for score in scores]
    if budget is not None:
        chosen = best_within(values, [score.parameters for score in scores], budget)
        scores = [replace(score, chosen=i in chosen) for i, score in enumerate(scores)]
    order = sorted(range(len(scores)), key=lambda i: -values[i])
    return Recommendation(r, tuple(scores[i] for i in order))


class _Measurement:
    """What is kept of one candidate: the sum of its gradients until the last one, and then numbers."""

    def __init__(self, candidate: Candidate, r: int, adapter: Adapter | None) -> None:
        self.candidate = candidate
        self.r = r
        self.inputs = InputStatistics(candidate.site.name, candidate.shape, max(r, _DIRECTIONS))
        self.adapter = adapter
        self.products: Tensor | None = None  # sum of z z^T, z = down x: (r, r)
        self.gradient: float | None = None
        self.captured: float | None = None

    @property
    def parameter(self) -> nn.Parameter | None:
        """The weight, if it can have a gradient: packed and computed ones cannot."""
        weight = self.candidate.site.weight
        return weight if weight is not None and weight.is_floating_point() and not is_quantized(weight) else None

    @torch.no_grad()
    def take_inputs(self, rows: Tensor) -> None:
        self.inputs.update(rows)
        if self.adapter is not None:
            down = self.adapter.factors()[1]
            z = (rows.to(down) @ down.mT).double()
            products = z.mT @ z
            self.products = products if self.products is None else self.products + products

    @torch.no_grad()
    def take_gradient(self, gradient: Tensor) -> None:
        matrix = self.candidate.layout.matrix(gradient).double()
        squares = matrix @ matrix.mT if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT @ matrix
        energies = torch.linalg.eigvalsh(squares).clamp_min(0)  # ascending
        self.gradient = math.sqrt(energies.sum().item())
        self.captured = energies[..., -self.r :].sum().item()

    @torch.no_grad()
    def score(self, r: int) -> Score:
        *stack, out_features, in_features = self.candidate.shape
        importance = None
        if self.adapter is not None and self.products is not None:
            up = self.adapter.factors()[0].double()
            importance = self.adapter.scaling**2 * ((up.mT @ up) * self.products).sum().item()
        return Score(
            name=self.candidate.site.name.replace("[", ".").rstrip("]"),  # brackets mean something in a glob
            shape=self.candidate.shape,
            parameters=math.prod(stack) * r * (in_features + out_features),
            gradient=self.gradient,
            captured=self.captured,
            inputs=self.inputs.explained(r) if self.inputs.count else None,
            importance=importance,
        )


def _measure(
    model: nn.Module,
    measured: Sequence[_Measurement],
    batches: Sequence[Any],
    loss_at: Loss,
    mask: Callable[[Any], Tensor] | None,
) -> None:
    by_name = {one.candidate.site.name: one for one in measured}
    takers: dict[nn.Parameter, Callable[[Tensor], None]] = {}
    for one in measured:
        if one.parameter is not None:
            takers[one.parameter] = partial(_to_all, [m for m in measured if m.parameter is one.parameter])
    gradients = GradientMeans(takers, len(batches))
    with gradients.hooked(model):
        for batch in batches:
            with input_hooks(
                [one.candidate for one in measured],
                lambda one, rows: by_name[one.site.name].take_inputs(rows),
                None if mask is None else mask(batch),
            ):
                value = loss_at(batch)
            gradients.backward(value)


def _to_all(measured: Sequence[_Measurement], gradient: Tensor) -> None:
    for one in measured:  # several where parts of a fused matrix are scored
        one.take_gradient(gradient)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
