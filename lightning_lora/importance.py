"""How much each adapter changes what its layer gives, by LoRA-drop (Zhou et al., 2024, arXiv:2402.07721).

::

    found = importances(model, batches, forward=lambda batch: model(batch[0]))
    kept = select(found, alike(model), threshold=0.9)
    share(model, kept)  # of lightning_lora.sharing
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_lora.adapter import Adapter
from lightning_lora.candidates import Candidate, of_sites
from lightning_lora.evaluation import Loss, loss_of, undisturbed
from lightning_lora.input_statistics import input_hooks, sees_inputs
from lightning_lora.sites import Site, named_submodules, pattern, sites, tied_names


class Importance(Metric):
    """Mean over tokens of ``||scaling * B A x||^2`` for each adapter, as a share of the sum over like ones.

    No activations are kept: with ``z = A x`` a token costs ``z.T (B.T B) z``, so r^2 after the product with A.

    Args:
        model: The adapted model; the sites that it has now are measured.
        task: Their task.

    Raises:
        ValueError: If the inputs of a site cannot be seen.
    """

    full_state_update = False

    def __init__(self, model: nn.Module, task: str = "default") -> None:
        super().__init__()
        check_measurable(model, task)
        self.names = [site.name for site in sites(model, task)]
        self._measured = [(one, one.site.adapter(task)) for one in _candidates(model, task)]
        self._groups = alike(model, task)
        for state in ("sums", "tokens"):
            self.add_state(state, torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")
        self.sums: Tensor
        self.tokens: Tensor

    def update(self, index: int, total: Tensor, tokens: int) -> None:
        """Add what tokens gave.

        Args:
            index: Place of the site in ``names``.
            total: Sum of squares over the tokens.
            tokens: Their number.
        """
        self.sums[index] += total.to(self.sums)
        self.tokens[index] += tokens

    def compute(self) -> dict[str, float]:
        """Return the shares by site name, over all processes; they sum to 1 in each group that adds anything.

        Raises:
            ValueError: If one is not finite.
        """
        means = dict(zip(self.names, (self.sums / self.tokens.clamp_min(1)).tolist(), strict=True))
        for name, mean in means.items():
            if not math.isfinite(mean):
                raise ValueError(
                    f"what the adapter of {name} adds is not finite: the run has diverged, lower its learning rate"
                )
        totals = {name: sum(means[n] for n in group) for group in self._groups for name in group}
        return {name: mean / totals[name] if totals[name] else 0.0 for name, mean in means.items()}

    @contextmanager
    def watching(self, mask: Tensor | None = None) -> Iterator[None]:
        r"""Measure at each call of an adapted layer in a ``with`` block.

        Args:
            mask: Which tokens count, (\*inputs.shape[:-1]); None counts all, padding too.
        """
        places = {one.site.name: (i, adapter) for i, (one, adapter) in enumerate(self._measured)}

        def take(one: Candidate, rows: Tensor) -> None:
            index, adapter = places[one.site.name]
            up, down = adapter.factors()
            wide = torch.promote_types(rows.dtype, torch.float32)
            self._add(index, adapter, rows.to(wide) @ down.to(wide).mT, up)

        with ExitStack() as stack:
            multiplied = [one for one, _ in self._measured if not one.layout.looked_up]
            stack.enter_context(input_hooks(multiplied, take, mask))
            for index, (one, adapter) in enumerate(self._measured):
                for site in (one.site, *one.tied) if one.layout.looked_up else ():
                    hook = self._lookup(index, adapter, mask)
                    stack.callback(site.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    def _lookup(self, index: int, adapter: Adapter, mask: Tensor | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tokens = args[0] if args else next(iter(kwargs.values()))
            up, down = adapter.factors()
            chosen = tokens[mask.bool()] if mask is not None and mask.shape == tokens.shape else tokens.reshape(-1)
            self._add(index, adapter, up[chosen], down.mT)

        return hook

    @torch.no_grad()
    def _add(self, index: int, adapter: Adapter, z: Tensor, factor: Tensor) -> None:
        """Add ``||scaling * factor @ z||^2`` of all rows of ``z`` (..., tokens, r)."""
        factor = factor.to(z.dtype)
        squares = ((z @ (factor.mT @ factor)) * z).sum().clamp_min(0)
        self.update(index, adapter.scaling**2 * squares, z.shape[-2])


def importances(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Loss | None = None,
    *,
    task: str = "default",
    mask: Callable[[Any], Tensor] | None = None,
) -> dict[str, float]:
    """Return the importance of every adapted matrix, by site name, and leave the model as it was.

    Runs in eval mode without gradients. The importances of like matrices (``alike``) sum to 1.

    Args:
        model: The adapted model, after some training: fresh adapters change nothing.
        batches: What ``forward`` takes.
        forward: Runs the model on a batch; None takes the ``training_step`` of a LightningModule.
        task: The adapters' task.
        mask: Gives the mask of a batch, true where a token counts.

    Raises:
        ValueError: If the inputs of a site cannot be seen, or what an adapter adds is not finite.
    """
    found = Importance(model, task).to(next(model.parameters()).device)
    with undisturbed(model), loss_of(model, forward) as run, torch.no_grad():
        for batch in batches:
            with found.watching(None if mask is None else mask(batch)):
                run(batch)
    return found.compute()


def alike(model: nn.Module, task: str = "default") -> list[list[str]]:
    """Return the names of the sites in groups: names that differ in layer numbers only, of one shape, rank and alpha.

    Args:
        model: The adapted model.
        task: The adapters' task.
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    for site in sites(model, task):
        adapter = site.adapter(task)
        up, down = adapter.factors()
        key = (pattern(site.name), tuple(up.shape), tuple(down.shape), adapter.method.r, adapter.method.alpha)
        groups.setdefault(key, []).append(site.name)
    return list(groups.values())


def select(
    importances: Mapping[str, float],
    groups: Iterable[Sequence[str]],
    *,
    threshold: float = 0.9,
    top_n: int | None = None,
) -> list[str]:
    """Return the names of those that keep adapters of their own: at least one of each group.

    Args:
        importances: By name; of each group, shares or any multiple of them.
        groups: Names of like matrices.
        threshold: The most important are kept until together they reach this share of their group, no more than
            needed; equal ones count in the order of their names.
        top_n: Keep this many of each group instead.
    """
    kept: list[str] = []
    share = Fraction(repr(threshold))  # exact, so that 0.5 + 0.4 of 1 reaches 0.9
    for group in groups:
        ranked = sorted(group, key=lambda name: (-importances[name], name))
        exact = {name: Fraction(repr(importances[name])) for name in group}
        number, reached = 0, Fraction(0)
        while number == 0 or (reached < share * sum(exact.values()) if top_n is None else number < top_n):
            if number == len(ranked):
                break
            reached += exact[ranked[number]]
            number += 1
        kept += [name for name in group if name in ranked[:number]]
    return kept


def check_measurable(model: nn.Module, task: str = "default") -> None:
    """Raise ``ValueError`` if there are adapted matrices whose inputs cannot be seen.

    Args:
        model: The adapted model.
        task: The adapters' task.
    """
    unseen = [one.site for one in _candidates(model, task) if not (one.layout.looked_up or sees_inputs(one))]
    if unseen:
        layers = sorted({site.name.rpartition(".")[0] for site in unseen})
        raise ValueError(
            f"LoRADrop measures what adapters add to outputs, and {len(unseen)} matrices (first: {unseen[0].name}) are "
            "read by their layer's forward, where that cannot be seen (attention's out_proj, recurrent layers, "
            f"experts): leave them out with exclude_modules={layers}, or use LoRA"
        )


def _candidates(model: nn.Module, task: str) -> list[Candidate]:
    """Return the sites as ``input_hooks`` takes them, each with the tied layers that use its adapter."""
    tied, modules = tied_names(model), named_submodules(model)
    found: list[Candidate] = []
    for one in of_sites(model, sites(model, task)):
        others = [Site(name, modules[name.rpartition(".")[0]], one.site.parameter) for name in tied[one.site.name]]
        found.append(one._replace(tied=tuple(others)))
    return found
