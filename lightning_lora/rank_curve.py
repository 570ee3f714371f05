"""Which rank is enough: the loss of one trained adapter, cut to each lower rank without training anew."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.adapter import Adapter
from lightning_lora.analysis import ThinSVD, thin_svd
from lightning_lora.evaluation import Loss, loss_of, undisturbed
from lightning_lora.merge import check_not_merged
from lightning_lora.plots import empty_figure
from lightning_lora.sites import sites
from lightning_lora.switch import using


@dataclass(frozen=True)
class RankCurve:
    """The loss of a trained adapter at each rank that it was cut to.

    Args:
        losses: The mean loss over the batches, by rank; rank 0 is the base.
        errors: What the cut takes away, by rank: the Frobenius norm of the difference from the trained change over all
            sites, ``sqrt(sum of sigma_i^2, i > rank)`` (Eckart and Young, 1936).
        singular_values: Of each site's change, by name, largest first: (r,), or (n, r) for a stack.
    """

    losses: Mapping[int, float]
    errors: Mapping[int, float]
    singular_values: Mapping[str, Tensor]

    def table(self) -> str:
        """Return a line for each rank: the loss, and the error relative to the norm of the trained change."""
        whole = _error(self.singular_values, 0) or 1.0
        lines = [f"{'rank':>4}  {'loss':>10}  {'taken away':>10}"]
        lines += [f"{r:>4}  {loss:>10.4g}  {self.errors[r] / whole:>10.2%}" for r, loss in self.losses.items()]
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draw the loss over the rank into a file.

        Args:
            path: Its name; the ending says in which format.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        figure = empty_figure("RankCurve.plot", 5, 3.5)
        axes = figure.add_subplot(xlabel="rank", ylabel="loss")
        axes.plot(list(self.losses), list(self.losses.values()), marker="o")
        axes.locator_params(axis="x", integer=True)
        figure.savefig(path)


def rank_curve(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    ranks: Sequence[int] | None = None,
    task: str = "default",
) -> RankCurve:
    """Return the loss of a trained adapter at every rank that it can be cut to, without training anew.

    Every site's change is replaced by its best approximation of a lower rank; a site whose own rank is no higher keeps
    its factors as they are. What a method has besides the factors, such as magnitudes, stays. Each batch is evaluated
    at all ranks, in eval mode and with the same random numbers. The base and the adapters are never written to.

    Args:
        model: The adapted model.
        batches: Such as a validation loader; read once.
        loss: A function of a batch that returns a number; None takes the ``training_step`` of a LightningModule.
        ranks: Which ranks to evaluate; None means all from 0 to the highest of any site.
        task: The adapters' name; others are not in use meanwhile.

    Raises:
        ValueError: If there is no adapter of this task, a rank is out of range, or there are no batches.
        RuntimeError: If the model is inside ``merged``.
    """
    check_not_merged(model, "cut the ranks")
    with using(model, task):
        adapters = {site.name: site.adapter(task) for site in sites(model, task)}
    cuts = {adapter: thin_svd(adapter) for adapter in adapters.values()}
    highest = max(cut.values.shape[-1] for cut in cuts.values())
    ranks = range(highest + 1) if ranks is None else sorted(set(ranks))
    if not ranks or ranks[0] < 0 or ranks[-1] > highest:
        raise ValueError(f"ranks={list(ranks)}: must be between 0 and {highest}, the highest rank of the adapters")
    sums, count = dict.fromkeys(ranks, 0.0), 0
    with undisturbed(model), using(model, task), loss_of(model, loss) as loss_at, torch.no_grad():
        for batch in batches:
            count += 1
            for rank in ranks:
                with undisturbed(model), _cut(cuts, rank):  # every rank meets the same random numbers and buffers
                    sums[rank] += float(loss_at(batch))
    if not count:
        raise ValueError("batches is empty: pass at least one, for example a validation loader")
    values = {name: abs(adapter.scaling) * cuts[adapter].values for name, adapter in adapters.items()}
    return RankCurve(
        losses={rank: total / count for rank, total in sums.items()},
        errors={rank: _error(values, rank) for rank in ranks},
        singular_values=values,
    )


def _error(singular_values: Mapping[str, Tensor], rank: int) -> float:
    return math.sqrt(sum(values[..., rank:].square().sum().item() for values in singular_values.values()))


@contextmanager
def _cut(cuts: Mapping[Adapter, ThinSVD], rank: int) -> Iterator[None]:
    """Let adapters answer with factors of a lower rank: an attribute of the object hides the method of its class."""
    try:
        for adapter, (left, values, right) in cuts.items():
            up, down = adapter.factors()
            if rank < values.shape[-1]:
                kept = values * (torch.arange(values.shape[-1], device=values.device) < rank)
                factors = ((left * kept[..., None, :]).to(up), right.to(down))
                adapter.__dict__["factors"] = partial(tuple, factors)
        yield
    finally:
        for adapter in cuts:
            adapter.__dict__.pop("factors", None)
