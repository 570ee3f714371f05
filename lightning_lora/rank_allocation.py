"""AdaLoRA's schedule (arXiv:2303.10512, as the released code computes it): which singular values are masked, and when.

The functions are pure arithmetic on numbers and tensors; `RankAllocation` applies them around optimizer steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.schedule import Schedule

if TYPE_CHECKING:
    from lightning_lora.methods.adalora import AdaLoRA
    from lightning_lora.sites import Site


def budget(step: int, *, start: int, target: int, initial_steps: int, final_steps: int, total_steps: int) -> int:
    """Return how many ranks all matrices together may have after an optimizer step.

    It stays at the start for ``initial_steps``, falls along a cubic curve, and is the target for ``final_steps``. Whole
    numbers only, so that rounding cannot differ between machines.

    Args:
        step: Number of the step, from 0.
        start: Ranks at the start, of all matrices together.
        target: Ranks at the end, of all matrices together.
        initial_steps: Length of the first phase.
        final_steps: Length of the last phase.
        total_steps: Length of the run.
    """
    end = total_steps - final_steps
    if step >= end:
        return target
    if step <= initial_steps:
        return start
    return target + (start - target) * (end - step) ** 3 // (end - initial_steps) ** 3


def pull(vectors: Tensor) -> Tensor:
    """Return the gradient of the Frobenius norm of ``vectors @ vectors.T - I``; zero where the norm is.

    Args:
        vectors: The rows that should be orthonormal (r, n), or a stack of such matrices, each with its own norm.
    """
    excess = vectors @ vectors.mT - torch.eye(vectors.shape[-2], dtype=vectors.dtype, device=vectors.device)
    norm: Tensor = torch.linalg.matrix_norm(excess, keepdim=True)
    return excess @ vectors * (2 / norm.clamp_min(torch.finfo(excess.dtype).tiny))


def observe_(
    means: list[Tensor], spreads: list[Tensor], sensitivities: list[Tensor], beta1: float, beta2: float
) -> None:
    """Take one step's sensitivities ``|w * dL/dw|`` into their running means and running deviations, in place.

    Args:
        means: The running mean of each parameter, zero before the first step.
        spreads: The running mean of the distance to the mean, which is renewed first.
        sensitivities: Of each parameter, in its shape.
        beta1: What a mean keeps of itself.
        beta2: What a deviation keeps of itself.
    """
    torch._foreach_mul_(means, beta1)
    torch._foreach_add_(means, sensitivities, alpha=1 - beta1)
    distances = list(torch._foreach_sub(sensitivities, means))
    torch._foreach_abs_(distances)
    torch._foreach_mul_(spreads, beta2)
    torch._foreach_add_(spreads, distances, alpha=1 - beta2)


def importance(core: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Return the importance of each triplet (r), or of those of a stack (n, r).

    Args:
        core: The score, mean times deviation, of each singular value (r, 1).
        up: That of each entry of the left vectors (out, r).
        down: That of each entry of the right vectors (r, in).
    """
    return core.squeeze(-1) + up.mean(-2) + down.mean(-1)


def keep_most_important(scores: Tensor, number: int) -> Tensor:
    """Return a mask over the scores that is true for exactly this many: the largest, and of equal ones the first.

    Args:
        scores: Of all triplets of all matrices (n).
        number: How many to keep.
    """
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[scores.argsort(descending=True, stable=True)[:number]] = True
    return kept


class RankAllocation(Schedule):
    """What AdaLoRA does around optimizer steps: pull vectors apart, watch sensitivities, mask singular values.

    Args:
        method: Its hyperparameters; the ranks are those of the sites.
        sites: The adapted matrices.
        task: Their task.
        total_steps: Optimizer steps of the run.

    Attributes:
        mean: The running mean of each parameter's sensitivities, by site and factor; empty in the final phase.
        spread: Their running deviation, likewise.
        kept: Which triplets of each site were kept when they were last chosen; empty before that.
        total: How many these are.

    Raises:
        ValueError: If the phases do not fit in the run, or there are fewer ranks at the start than at the end.
    """

    def __init__(self, method: AdaLoRA, sites: Sequence[Site], task: str, total_steps: int) -> None:
        super().__init__()
        self.method = method
        self.adapters: dict[str, Any] = {site.name: site.adapter(task) for site in sites}
        quarter = total_steps // 4
        self.total_steps = total_steps
        self.initial_steps = quarter if method.initial_steps is None else method.initial_steps
        self.final_steps = max(1, quarter) if method.final_steps is None else method.final_steps
        chosen = method.initial_steps is not None or method.final_steps is not None
        if chosen and self.initial_steps >= total_steps - self.final_steps:
            raise ValueError(
                f"initial_steps={self.initial_steps} and final_steps={self.final_steps} leave no step of "
                f"total_steps={total_steps} in which ranks fall: shorten them, leave them out (a quarter of the run "
                "each), train longer, or give total_steps where this run is a part of a longer one"
            )
        ranks = [(adapter.lora_E.numel(), adapter.method.r) for adapter in self.adapters.values()]
        self.start = sum(rank for rank, _ in ranks)
        self.matrices = sum(rank // r for rank, r in ranks)
        self.target = method.target_r * self.matrices
        if self.target > self.start:
            raise ValueError(
                f"target_r={method.target_r} for {self.matrices} matrices is {self.target} ranks at the end, but r and "
                f"rank_pattern give {self.start} at the start: lower target_r or raise r"
            )
        self.mean: dict[str, Tensor] = {}
        self.spread: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}
        self.total = self.start
        self._weights: dict[str, Tensor] = {}

    def budget(self, step: int) -> int:
        """Return how many ranks all matrices together may have after a step; each matrix of a stack counts.

        Args:
            step: Number of the step, from 0.
        """
        return budget(
            step,
            start=self.start,
            target=self.target,
            initial_steps=self.initial_steps,
            final_steps=self.final_steps,
            total_steps=self.total_steps,
        )

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        """Add the gradient of the regulariser: the mean over all A and B of the norm that `pull` lowers."""
        if self.method.sensitivity == "pre_step":
            self._weights = {name: parameter.detach().clone() for name, parameter in self._parameters()}
        weight = self.method.orthogonality / (2 * self.matrices)
        for factors, transposed in self._alike() if weight else ():
            vectors = torch.stack([factor.detach().mT if transposed else factor.detach() for factor in factors])
            gradients = weight * pull(vectors.to(torch.promote_types(vectors.dtype, torch.float32)))
            for factor, gradient in zip(factors, (gradients.mT if transposed else gradients).unbind(), strict=True):
                factor.grad = gradient.to(factor.dtype) if factor.grad is None else factor.grad.add_(gradient)

    def _alike(self) -> Iterator[tuple[list[nn.Parameter], bool]]:
        """Yield the vectors in groups of one shape, type and device, and whether they are columns."""
        groups: dict[tuple[Any, ...], list[nn.Parameter]] = {}
        for adapter in self.adapters.values():
            for factor, columns in ((adapter.lora_A, False), (adapter.lora_B, True)):
                groups.setdefault((columns, factor.shape, factor.dtype, factor.device), []).append(factor)
        for (columns, *_), factors in groups.items():
            yield factors, columns

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """Take the step's sensitivities in, and mask what the budget has no room for."""
        step, last = self.step, self.total_steps - self.final_steps
        if step < last:
            self._observe()
        if step == last or (self.initial_steps < step < last and step % self.method.mask_every == 0):
            self._choose(self.budget(step))
        if step >= last:
            self._mask()
            self.mean, self.spread = {}, {}  # not needed any more, nor in checkpoints
        super().after_step(optimizer)

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, adapter in self.adapters.items():
            for factor, parameter in adapter.named_parameters():
                yield f"{name}.{factor}", parameter

    def _observe(self) -> None:
        weights, gradients = [], []
        for name, parameter in self._parameters():
            if name not in self.mean:
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                self.mean[name] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
                self.spread[name] = self.mean[name].clone()
            mean = self.mean[name]
            weights.append(self._weights.get(name, parameter.detach()).to(mean.dtype))
            gradients.append(torch.zeros_like(mean) if parameter.grad is None else parameter.grad.to(mean.dtype))
        sensitivities = list(torch._foreach_mul(weights, gradients))
        torch._foreach_abs_(sensitivities)
        means, spreads = ([kept[name] for name, _ in self._parameters()] for kept in (self.mean, self.spread))
        observe_(means, spreads, sensitivities, self.method.beta1, self.method.beta2)
        self._weights = {}

    def _choose(self, number: int) -> None:
        """Note which triplets are the most important ones, and mask the others."""
        if number == self.start:
            return
        self.total = number
        scores = [self._scores(name, adapter.lora_E) for name, adapter in self.adapters.items()]
        kept = keep_most_important(torch.cat([one.flatten().to(scores[0].device) for one in scores]), number)
        parts = torch.split(kept, [one.numel() for one in scores])
        self.kept = {
            name: part.view(one.shape).to(one.device)
            for name, part, one in zip(self.adapters, parts, scores, strict=True)
        }
        self._mask()

    def _scores(self, name: str, values: Tensor) -> Tensor:
        if f"{name}.lora_E" not in self.mean:  # a run so short that it ends before anything was seen
            return torch.zeros_like(values[..., 0])
        return importance(*(self.mean[key] * self.spread[key] for key in (f"{name}.lora_{f}" for f in "EBA")))

    def _mask(self) -> None:
        for name, kept in self.kept.items():
            self.adapters[name].lora_E.masked_fill_(~kept[..., None], 0)

    def ranks(self) -> dict[str, int]:
        """Return how many triplets each site kept when they were last chosen, by the site's name."""
        return {
            name: int(self.kept[name].sum()) if name in self.kept else adapter.lora_E.numel()
            for name, adapter in self.adapters.items()
        }

    def metrics(self) -> dict[str, float]:
        """Return the ranks of all sites together."""
        return {"rank/total": float(self.total)}

    def state_dict(self) -> dict[str, Any]:
        """Return the phases, the sensitivities while they are needed, and what was kept last."""
        return {
            **super().state_dict(),
            "phases": [self.initial_steps, self.final_steps, self.total_steps],
            "total": self.total,
            "mean": dict(self.mean),
            "spread": dict(self.spread),
            "kept": {f"{name}.lora_E": kept for name, kept in self.kept.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the run would have that wrote the state; its phases hold, also if this run is longer."""
        super().load_state_dict(state)
        self.initial_steps, self.final_steps, self.total_steps = state["phases"]
        self.total = state["total"]
        device = {name: parameter.device for name, parameter in self._parameters()}
        self.mean = {name: tensor.to(device[name], copy=True) for name, tensor in state["mean"].items()}
        self.spread = {name: tensor.to(device[name], copy=True) for name, tensor in state["spread"].items()}
        self.kept = {name.removesuffix(".lora_E"): kept.to(device[name]) for name, kept in state["kept"].items()}
