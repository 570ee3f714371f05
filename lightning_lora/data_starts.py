"""Starts of LoRA that look at data: EVA at the inputs of the matrices, LoRA-GA at the gradients of the weights.

By hand, once the adapters are there and before the optimizer is::

    inject(model, LoRA(r=8, init="eva"))
    start_from_data(model, batches, loss=lambda batch: model(batch[0]).square().mean())
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from itertools import islice
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_lora.candidates import Candidate, of_sites
from lightning_lora.evaluation import Loss, loss_of, undisturbed
from lightning_lora.gradient_means import GradientMeans
from lightning_lora.initialisations import FROM_DATA, eva_ranks, lora_ga
from lightning_lora.input_statistics import InputStatistics, input_hooks, sees_inputs
from lightning_lora.method import Method
from lightning_lora.methods.lora import LoRA, LoRAAdapter
from lightning_lora.quantized import dense_weight, format_of
from lightning_lora.sites import Site, sites
from lightning_lora.switch import using

_END = object()


def start_from_data(
    model: nn.Module, batches: Iterable[Any], loss: Loss | None = None, *, task: str = "default"
) -> list[str]:
    """Set the factors of adapters with ``init="eva"`` or ``"lora_ga"`` by batches, before the optimizer is made.

    With ``rank_spread`` above 1 adapters are made anew, with other ranks. The rest of the model stays what it was. In a
    run of several processes each gives batches of its own, and all get the same start.

    Args:
        model: The adapted model; nothing was trained yet.
        batches: What ``loss`` takes; the first ``init_batches`` of the method are used, or fewer where EVA's directions
            have settled (``init_similarity``).
        loss: From a batch to its loss; None takes the ``training_step`` of a LightningModule.
        task: The adapters' name.

    Returns:
        The sites whose inputs, or gradients, could not be seen: they keep LoRA's own start.

    Raises:
        ValueError: If the adapters start without data, or a weight has no gradient because it is packed.
    """
    method = _method(model, task)
    with loss_of(model, loss) as loss_at:
        return start_from_losses(model, (loss_at(batch) for batch in islice(batches, method.init_batches)), task)


def start_from_losses(model: nn.Module, losses: Generator[Any, None, None], task: str = "default") -> list[str]:
    """Do as ``start_from_data`` does, with an iterator that runs the model on a batch each time it is asked.

    Args:
        model: The adapted model, on the device that it stays on.
        losses: The losses, at most as many as ``init_batches``; it is closed in the end.
        task: The adapters' name.
    """
    method = _method(model, task)
    found = {site.name: site for site in sites(model, task)}
    with undisturbed(model), using(model), closing(losses):  # the adapters add nothing yet, and are changed meanwhile
        started = _eva(model, found, losses, task) if method.init == "eva" else _lora_ga(model, found, losses, task)
    for site in found.values():
        site.slot.train(site.slot.training)  # also those that were made meanwhile
    return [name for name in found if name not in started]


def looks_at_data(method: Method) -> TypeGuard[LoRA]:
    """Tell whether adapters of a method get their start from data."""
    return isinstance(method, LoRA) and method.init in FROM_DATA


def _method(model: nn.Module, task: str) -> LoRA:
    methods = [site.adapter(task).method for site in sites(model, task)]
    if not methods or not looks_at_data(methods[0]):
        raise ValueError(
            f"the adapters of task {task!r} do not start from data: inject LoRA(init='eva') or LoRA(init='lora_ga')"
        )
    return methods[0]


@torch.no_grad()
def _eva(model: nn.Module, found: dict[str, Site], losses: Iterator[Any], task: str) -> set[str]:
    """Set each A to the directions in which its inputs are largest (EVA, arXiv:2410.07170); B is 0."""
    adapters = {name: _adapter(site, task) for name, site in found.items()}
    most = {name: _most(one) for name, one in adapters.items()}
    chosen = dict(zip(found, of_sites(model, found.values()), strict=True))
    kept = 2 * max(most.values())
    statistics = {name: InputStatistics(name, one.shape, max(64, kept)) for name, one in chosen.items()}

    def take(one: Candidate, rows: Tensor) -> None:
        statistics[one.site.name].update(rows)

    def ranks_of(shares: Mapping[str, Tensor]) -> dict[str, int]:
        ranks = {name: adapters[name].method.r for name in shares}
        if all(adapters[name].method.rank_spread == 1 for name in shares):
            return ranks
        leading = {name: share.reshape(-1, share.shape[-1]).mean(0)[: most[name]] for name, share in shares.items()}
        return eva_ranks(leading, sum(ranks.values()))

    watched = {name: statistics[name] for name, one in chosen.items() if sees_inputs(one)}
    with input_hooks(list(chosen.values()), take):
        _until_settled(losses, watched, ranks_of, _method(model, task).init_similarity)
    if dist.is_available() and dist.is_initialized():
        for one in statistics.values():
            one.all_reduce()
    seen = {name: one.top(most[name]) for name, one in statistics.items() if one.count}
    ranks = ranks_of({name: share for name, (_, share) in seen.items()})
    for name, (directions, _) in seen.items():
        adapter = _of_rank(found[name], adapters[name], ranks[name], chosen[name], task)
        adapter.start_at(directions[..., : ranks[name], :], torch.zeros_like(adapter.lora_B))
    return set(seen)


def _until_settled(
    losses: Iterator[Any],
    statistics: Mapping[str, InputStatistics],
    ranks_of: Callable[[Mapping[str, Tensor]], dict[str, int]],
    similarity: float,
) -> None:
    """Run batches until no direction that is needed moves from one to the next, or there are none left.

    Each process looks at its own data, and all stop behind the same batch, when every one of them would.

    Args:
        losses: Run the model.
        statistics: What they fill.
        ranks_of: From the shares of directions to how many of each matrix are needed.
        similarity: Cosine of the angle between a direction and itself one batch before, from which it stands still.
    """
    before: dict[str, Tensor] = {}

    def settled() -> bool:
        nonlocal before
        if similarity == 1:
            return False
        now = {name: one.follow(before.get(name)) for name, one in statistics.items() if one.count}
        ranks = ranks_of({name: share for name, (_, share) in now.items()})
        still = before.keys() == statistics.keys() and all(
            _still(before[name], directions, ranks[name], similarity) for name, (directions, _) in now.items()
        )
        before = {name: directions for name, (directions, _) in now.items()}
        return still

    while not _everywhere(next(losses, _END) is _END or settled()):
        pass


def _still(before: Tensor, now: Tensor, k: int, similarity: float) -> bool:
    """Tell whether the first k directions are where they were, whatever their signs."""
    known = min(before.shape[-2], now.shape[-2])
    return known >= k and bool(((before[..., :k, :] * now[..., :k, :]).sum(-1).abs() >= similarity).all())


def _everywhere(here: bool) -> bool:
    """Tell whether something holds in all processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return here
    there: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(there, here)
    return all(there)


def _lora_ga(model: nn.Module, found: dict[str, Site], losses: Iterator[Any], task: str) -> set[str]:
    """Set each pair by the mean gradient of its weight; of one batch in one process one gradient is held at a time."""
    by_weight: dict[nn.Parameter, list[str]] = {}
    for name, site in found.items():
        weight = site.weight
        if weight is None or format_of(weight) is not None:
            raise ValueError(
                f"{name}: init='lora_ga' takes the gradient of the weight, and this one is packed or computed: use "
                "init='eva', or leave it out with exclude_modules"
            )
        by_weight.setdefault(weight, []).append(name)
    several = dist.is_available() and dist.is_initialized()
    gradients: dict[nn.Parameter, Tensor] = {}
    started: set[str] = set()

    @torch.no_grad()
    def start(weight: nn.Parameter, gradient: Tensor) -> None:
        for name in by_weight[weight]:
            adapter = _adapter(found[name], task)
            matrix = found[name].slot.layout.matrix(gradient)
            if matrix.any():
                adapter.start_at(*lora_ga(matrix, adapter.method.r))
                started.add(name)

    def take(weight: nn.Parameter, gradient: Tensor) -> None:
        if several:
            gradients[weight] = gradient
        else:
            start(weight, gradient)

    takers = {weight: (lambda gradient, weight=weight: take(weight, gradient)) for weight in by_weight}
    means = GradientMeans(takers, _adapter(next(iter(found.values())), task).method.init_batches)
    with torch.enable_grad(), means.hooked(model):
        for loss in losses:
            means.backward(loss)
        means.finish()
    for weight in by_weight if several else ():  # in the same order everywhere, reached or not
        gradient = gradients.pop(weight, torch.zeros_like(weight, dtype=torch.float32))
        dist.all_reduce(gradient)
        start(weight, gradient / dist.get_world_size())
    return started


def _adapter(site: Site, task: str) -> LoRAAdapter:
    return site.adapter(task)  # type: ignore[return-value]


def _most(adapter: LoRAAdapter) -> int:
    """Return the highest rank that a matrix may get."""
    return min(adapter.lora_A.shape[-1], math.ceil(adapter.method.r * adapter.method.rank_spread))


def _of_rank(site: Site, adapter: LoRAAdapter, r: int, one: Candidate, task: str) -> LoRAAdapter:
    """Return an adapter of this rank and the same scale, made anew if it is not the one that is there."""
    method = adapter.method
    if method.r == r:
        return adapter
    alpha = method.alpha * (math.sqrt(r / method.r) if method.scaling == "rsqrt" else r / method.r)
    other: Any = method.at(r, alpha).build(
        one.shape,
        seed=adapter.seed,
        device=adapter.lora_A.device,
        dtype=adapter.lora_A.dtype,
        layout=site.slot.layout,
    )
    other.start(site.slot.layout.matrix(dense_weight(site.module, site.parameter)))
    site.slot[task] = other
    return other  # type: ignore[no-any-return]
