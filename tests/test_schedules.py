"""When a method's schedule is called: around every real optimizer step, with true gradients, also in a resumed run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from conftest import Lit, loader
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.optim import Optimizer

from lightning_lora import LoRA, LoRACallback, sites
from lightning_lora.schedule import Schedule
from lightning_lora.sites import Site


class Watching(Schedule):
    """Notes what it sees: B's gradient before a step, and B itself after it."""

    def __init__(self, sites: Sequence[Site], total_steps: int | None) -> None:
        super().__init__()
        self.B = sites[0].adapter("default").lora_B
        self.total_steps = total_steps
        self.gradients: list[Tensor] = []
        self.values: list[Tensor] = []
        self.steps: list[int] = []

    def before_step(self, optimizer: Optimizer) -> None:
        assert self.B.grad is not None
        self.gradients.append(self.B.grad.clone())

    def after_step(self, optimizer: Optimizer) -> None:
        self.values.append(self.B.detach().clone())
        self.steps.append(self.step)
        super().after_step(optimizer)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"last": self.values[-1]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.last = state["last"]


SEEN: list[Watching] = []


@dataclass(frozen=True, kw_only=True)
class Watched(LoRA):
    needs_total_steps = True

    def schedules(self, sites: Sequence[Site], task: str, total_steps: int | None = None) -> list[Schedule]:
        SEEN.append(Watching(sites, total_steps))
        return [SEEN[-1]]


@pytest.fixture
def fit(trainer: Callable[..., L.Trainer]) -> Callable[..., tuple[Lit, Watching]]:
    def run(
        module: Lit | None = None, batch_size: int = 4, ckpt_path: Path | None = None, **options: Any
    ) -> tuple[Lit, Watching]:
        module = module or Lit(lambda self: torch.optim.SGD(self.parameters(), lr=0.1))
        callbacks = [LoRACallback(Watched(r=2)), *options.pop("callbacks", [])]
        trainer(callbacks=callbacks, **options).fit(module, loader(16 // batch_size, batch_size), ckpt_path=ckpt_path)
        return module, SEEN[-1]

    return run


def moved(seen: Watching) -> list[Tensor]:
    """How far each step moved B."""
    return [
        after - before for before, after in zip([torch.zeros_like(seen.B), *seen.values], seen.values, strict=False)
    ]


def test_a_schedule_sees_the_gradient_of_every_step_before_it_and_the_update_after_it(fit: Any) -> None:
    _, seen = fit()
    assert seen.steps == list(range(8))
    assert seen.total_steps == 8
    for gradient, change in zip(seen.gradients, moved(seen), strict=True):
        assert torch.allclose(change, -0.1 * gradient, rtol=0, atol=1e-7)


def test_gradients_are_seen_before_they_are_clipped(fit: Any) -> None:
    _, seen = fit(gradient_clip_val=1e-3)
    for gradient, change in zip(seen.gradients, moved(seen), strict=True):
        assert gradient.norm() > 1e-3
        assert change.norm() < 1.1e-4


def test_accumulated_batches_are_one_step_with_the_gradient_of_the_large_batch(fit: Any) -> None:
    _, large = fit(batch_size=4)
    _, small = fit(batch_size=2, accumulate_grad_batches=2)
    assert small.steps == large.steps
    assert small.total_steps == large.total_steps
    for one, other in zip(small.gradients, large.gradients, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-6)


class Manual(Lit):
    """Steps its own optimizer, on every other batch."""

    def __init__(self) -> None:
        super().__init__(lambda self: torch.optim.SGD(self.parameters(), lr=0.1))
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch) / 2)
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()


def test_manual_optimization_is_followed_step_by_step(fit: Any) -> None:
    _, seen = fit(Manual())
    assert seen.steps == list(range(4))
    for gradient, change in zip(seen.gradients, moved(seen), strict=True):
        assert torch.allclose(change, -0.1 * gradient, rtol=0, atol=1e-7)


class Overflowing(Lit):
    """Its second batch gives infinite gradients."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx == 1 and self.current_epoch == 0 else loss


def test_a_step_that_a_gradient_scaler_skips_is_not_counted_and_gradients_are_unscaled(fit: Any) -> None:
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))
    module = Overflowing(lambda self: torch.optim.SGD(self.parameters(), lr=0.1))
    _, seen = fit(module, plugins=[plugin])
    assert len(seen.gradients) == 8
    assert seen.steps == list(range(7))
    taken = [gradient for gradient in seen.gradients if gradient.isfinite().all()]
    for gradient, change in zip(taken, moved(seen), strict=True):
        assert torch.allclose(change, -0.1 * gradient, rtol=0, atol=1e-6)


def test_a_resumed_run_goes_on_with_the_state_that_was_saved(fit: Any, tmp_path: Path) -> None:
    _, whole = fit()
    writer = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    _, first = fit(callbacks=[writer], enable_checkpointing=True)
    path = tmp_path / "step=4.ckpt"
    module, resumed = fit(ckpt_path=path, callbacks=[copy.deepcopy(writer)], enable_checkpointing=True)
    assert resumed.steps == list(range(4, 8))
    assert torch.equal(resumed.last, first.values[3])
    assert all(torch.equal(one, other) for one, other in zip(resumed.values, whole.values[4:], strict=True))
    assert torch.load(path, weights_only=True)["callbacks"]["LoRACallback"]["schedules"][0]["step"] == 4
    assert [site.adapter("default").method for site in sites(module)] == [Watched(r=2)] * 2


def test_a_run_leaves_no_hook_on_an_optimizer_that_lives_on(fit: Any) -> None:
    module = Lit(lambda self: self.kept)
    module.kept = torch.optim.SGD(module.parameters(), lr=0.1)
    _, seen = fit(module)
    before = len(seen.steps)
    module.kept.step()
    assert len(seen.steps) == before
