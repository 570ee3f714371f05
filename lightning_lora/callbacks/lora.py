"""`LoRACallback`: LoRA for a LightningModule, by one more callback of its Trainer. Glue only, no arithmetic."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.adapter import Role
from lightning_lora.callbacks.audit import Audit, FrozenWeights
from lightning_lora.callbacks.averaging import (
    averaging_callbacks,
    check_averageable,
    check_divided,
    check_norms,
    check_order,
    extend_rates,
    leave_frozen_weights,
)
from lightning_lora.callbacks.conflicts import check_conflicts
from lightning_lora.callbacks.data_starts import start_when_restored
from lightning_lora.callbacks.dropping import check_droppable, drop_if_due, keep_selection
from lightning_lora.callbacks.guards import (
    check_base_untied,
    check_connected,
    check_frozen_dtype,
    check_present,
    check_strategy,
    frozen_norms,
    hold_still,
)
from lightning_lora.callbacks.injection import adapt
from lightning_lora.callbacks.optimizers import Replacements, built_optimizers
from lightning_lora.callbacks.random_states import restore_random_states, save_random_states
from lightning_lora.callbacks.replaced_methods import ReplacedMethods
from lightning_lora.callbacks.schedules import Schedules
from lightning_lora.checkpoints import TASK, AdapterCheckpointIO, tolerate_missing_base
from lightning_lora.derived_groups import LR_EMBEDDING, check_ratio, link, split
from lightning_lora.full_fingerprint import Fingerprint, check_fingerprint
from lightning_lora.inject import Bias, inject
from lightning_lora.merge import check_not_merged
from lightning_lora.method import Method
from lightning_lora.methods.lora import LoRA
from lightning_lora.resuming import Mismatch
from lightning_lora.sites import Site, sites
from lightning_lora.strategies.replication import ReplicatesAdapters
from lightning_lora.targets import find_targets


class LoRACallback(Callback):
    """Adapt a LightningModule: inject adapters, freeze the base, split its optimizers, write adapter-only checkpoints.

    The module and its ``configure_optimizers`` stay as they are.

    Args:
        method: What to inject.
        target_modules: ``all-linear``, a list of names or globs, or one regular expression for whole names.
        exclude_modules: Names or globs to leave out.
        modules_to_save: Names or globs of what is trained in full and saved too, such as a new head.
        bias: Which biases are trained in full: none, those of adapted modules, or all.
        rank_pattern: Other ranks, by name or glob; the first that fits decides.
        alpha_pattern: Other alphas, likewise.
        fused: Layers that hold several matrices in one, by name or glob, with the names of their equal parts in order
            or with the rows of each part; each part has an adapter of its own.
        lr_ratio: Learning rate of B divided by that of A (LoRA+); 1 is plain LoRA.
        official_grouping: Group parameters as LoRA+'s released code does, not by what they are: biases and other
            vectors learn ``lr_ratio`` times as fast too, and embeddings' adapters at ``lr_embedding``.
        lr_embedding: See there.
        weight_decay: Weight decay by role (A, B, ...) where it differs from the optimizer's.
        dtype: Floating-point type of the adapters; by default fp32, or wider where the layer is.
        share_inputs: Under autocast, cast an input once for all layers that are given it one after the other, such as
            q, k and v; no result changes.
        frozen_dtype: With ``precision="bf16-mixed"`` or ``"16-mixed"``, store frozen fp32 weights of linear layers in
            this dtype, so that no step casts them or keeps a copy. Results stay the same, and the module then runs
            under autocast only.
        audit: Stop after the first batch if an adapter got no gradient, and after an epoch in which something wrote to
            the frozen weights.
        allow_base_mismatch: Resume although the checkpoint was trained on another base.
        resume_mismatch: What ``fit`` does with a checkpoint of another rank, alpha, method or choice of matrices:
            ``error``; ``reinit`` starts fresh what does not fit, and resumes the rest; ``resize`` also brings factors
            to another rank or scale.
        on_save_error: What follows if a checkpoint could not be written, as on a full disk: ``raise``, or ``warn`` and
            train on; no checkpoint is then removed until one was written again.
        fingerprint: How a later load knows the base: by samples of the adapted weights, or, with ``full``, by every
            value of every frozen weight. That costs reading the base at the first save of a run and at each load.

    Raises:
        ValueError: If a value is out of its range.
    """

    def __init__(
        self,
        method: Method = LoRA(),  # noqa: B008 - frozen, and the command line shows it as the default
        target_modules: str | list[str] = "all-linear",
        exclude_modules: list[str] | None = None,
        modules_to_save: list[str] | None = None,
        bias: Bias = "none",
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        fused: dict[str, list[str] | dict[str, int]] | None = None,
        lr_ratio: float = 1.0,
        official_grouping: bool = False,
        lr_embedding: float = LR_EMBEDDING,
        weight_decay: dict[Role, float] | None = None,
        dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None,
        share_inputs: bool = True,
        frozen_dtype: Literal["bfloat16", "float16"] | None = None,
        audit: bool = True,
        allow_base_mismatch: bool = False,
        resume_mismatch: Mismatch = "error",
        on_save_error: Literal["raise", "warn"] = "raise",
        fingerprint: Fingerprint = "sampled",
    ) -> None:
        check_fingerprint(fingerprint)
        if frozen_dtype is not None and fingerprint == "full":
            raise ValueError(
                f"frozen_dtype={frozen_dtype!r} rounds the weights that fingerprint='full' is to tell apart: leave one "
                "of them out"
            )
        if resume_mismatch not in get_args(Mismatch):
            raise ValueError(f"resume_mismatch={resume_mismatch!r}: must be 'error', 'reinit' or 'resize'")
        if on_save_error not in ("raise", "warn"):
            raise ValueError(f"on_save_error={on_save_error!r}: must be 'raise' or 'warn'")
        if not isinstance(method, Method):
            raise ValueError(f"method={method!r}: give a method, for example LoRACallback(LoRA(r=8))")
        check_ratio(lr_ratio, [method])
        self.method = method
        self.target_modules = target_modules
        self.exclude_modules = exclude_modules or []
        self.modules_to_save = modules_to_save or []
        self.bias = bias
        self.rank_pattern = rank_pattern
        self.alpha_pattern = alpha_pattern
        self.fused = fused
        self.lr_ratio = lr_ratio
        self.official_grouping = official_grouping
        self.lr_embedding = lr_embedding
        self.weight_decay = weight_decay
        self.dtype = dtype
        self.share_inputs = share_inputs
        self.frozen_dtype = frozen_dtype
        self.audit = audit
        self.allow_base_mismatch = allow_base_mismatch
        self.resume_mismatch = resume_mismatch
        self.on_save_error = on_save_error
        self.fingerprint: Fingerprint = fingerprint
        self._undo: list[Callable[[], None]] = []
        self._audit: Audit | None = None
        self._frozen: FrozenWeights | None = None
        self._found: list[Site] = []
        self._adapted_before = False
        self._replaced_methods = ReplacedMethods()
        self._schedules = Schedules()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wait for the module to be whole: its own ``setup`` and ``configure_model`` come after this hook."""
        self._undo_all()
        check_strategy(trainer.strategy, self.fingerprint)
        check_frozen_dtype(trainer, self.frozen_dtype)
        self._adapted_before = bool(sites(pl_module))
        self._replacements = Replacements(pl_module)
        self._replaced_methods.replace(
            pl_module, "configure_model", lambda build: self._configure_model(trainer, pl_module, stage, build)
        )
        if stage == "fit":
            check_conflicts(trainer)
            check_order(trainer, self)
            check_averageable(trainer, self.method)
            check_divided(trainer, self.method)
            self._replaced_methods.replace(
                pl_module, "configure_optimizers", lambda build: self._configure_optimizers(trainer, pl_module, build)
            )
        tolerant = pl_module.register_load_state_dict_post_hook(tolerate_missing_base)  # type: ignore[no-untyped-call]
        self._undo.append(tolerant.remove)
        present: Any = trainer.strategy.checkpoint_io
        inner = present.checkpoint_io if isinstance(present, AdapterCheckpointIO) else present
        mismatch: Mismatch = self.resume_mismatch if stage == "fit" else "error"
        trainer.strategy.checkpoint_io = AdapterCheckpointIO(
            inner,
            pl_module,
            self.allow_base_mismatch,
            mismatch,
            keep_going=self.on_save_error == "warn",
            fingerprint=self.fingerprint,
        )
        if stage == "fit" and averaging_callbacks(trainer):
            pl_module.configure_model()  # now, because their setup copies the module

    def _configure_model(
        self, trainer: Trainer, pl_module: LightningModule, stage: str, build: Callable[[], Any]
    ) -> None:
        self._replacements = Replacements(pl_module)
        build()
        self._adapt(trainer, pl_module, stage)

    def _adapt(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._found, fresh = adapt(
            trainer,
            pl_module,
            self.method,
            partial(self._inject, trainer, pl_module),
            adapted_before=self._adapted_before,
            lr_ratio=self.lr_ratio,
        )
        if stage == "fit":
            if fresh:
                copied = bool(averaging_callbacks(trainer))
                self._undo.append(start_when_restored(trainer, pl_module, self.method, now=copied))
            check_norms(trainer, pl_module)
            check_base_untied(pl_module, self._found, self.method)
            check_droppable(pl_module, self.method)
            self._set_modes(pl_module)  # already here: what finds learning rates and batch sizes skips later hooks

    def _inject(self, trainer: Trainer, pl_module: LightningModule) -> list[Site]:
        seed = os.environ.get("PL_GLOBAL_SEED")  # the same on every rank, which PyTorch's own seed need not be
        return inject(
            pl_module,
            self.method,
            self.target_modules,
            exclude_modules=self.exclude_modules,
            modules_to_save=self.modules_to_save,
            bias=self.bias,
            rank_pattern=self.rank_pattern,
            alpha_pattern=self.alpha_pattern,
            fused=self.fused,
            seed=int(seed) if seed is not None else 0,
            dtype=getattr(torch, self.dtype) if self.dtype is not None else None,
            sharded=isinstance(trainer.strategy, ReplicatesAdapters),
            share_inputs=self.share_inputs,
            frozen_dtype=getattr(torch, self.frozen_dtype) if self.frozen_dtype is not None else None,
        )

    def _configure_optimizers(self, trainer: Trainer, pl_module: LightningModule, build: Callable[[], Any]) -> Any:
        returned, optimizers, schedulers = built_optimizers(pl_module, build, self._replacements)
        for optimizer in optimizers:
            self._split(pl_module, optimizer)
        for scheduler in schedulers:
            link(scheduler, optimizers)
        self._schedules.start(trainer, pl_module, self.method, optimizers)
        given = (self.target_modules, self.exclude_modules, self.modules_to_save, self.fused)
        keep_selection(pl_module, self._schedules, partial(find_targets, pl_module, *given))
        return returned

    def _split(self, pl_module: LightningModule, optimizer: Optimizer) -> None:
        split(
            pl_module,
            optimizer,
            self.lr_ratio,
            self.weight_decay,
            official_grouping=self.official_grouping,
            lr_embedding=self.lr_embedding,
        )

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Let schedules see the gradients: whole, unscaled and not clipped yet, in every kind of precision."""
        self._schedules.before_step(optimizer)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that everything is still as it was set up, now that strategy and plugins had their turn."""
        for name in self._replaced_methods.pending:
            raise RuntimeError(
                f"{name} of {type(pl_module).__name__} was replaced in its setup, after LoRACallback had wrapped it, "
                "so adapters or optimizer groups are missing: replace it in __init__"
            )
        check_present(pl_module, self._found)
        leave_frozen_weights(trainer)
        extend_rates(trainer)
        self._set_modes(pl_module)  # again: SyncBatchNorm takes the place of other norms
        self._audit, self._frozen = (Audit(pl_module), FrozenWeights(pl_module)) if self.audit else (None, None)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Train the adapters' dropout even over a base in eval mode."""
        check_not_merged(pl_module, "train")
        self._train_adapters()

    def _set_modes(self, pl_module: LightningModule) -> None:
        """Hold frozen running statistics still and train the adapters' dropout, in whatever mode the base is."""
        self._undo += [hold_still(norm) for norm in frozen_norms(pl_module) if "train" not in norm.__dict__]
        self._train_adapters()

    def _train_adapters(self) -> None:
        for site in self._found:
            if not site.slot.training:
                site.slot.train()

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Explain what PyTorch would only say of tensors."""
        check_connected(loss, pl_module)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that gradients were computed."""
        if self._audit is not None:
            self._audit.note_backward()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what schedules say, judge the first batch that had a backward, and drop adapters when it is time."""
        self._schedules.log(pl_module)
        if self._audit is not None and self._audit.backward_ran:
            audit, self._audit = self._audit, None
            audit.stop()
            audit.check()
        if drop_if_due(trainer, pl_module, self._schedules, partial(self._split, pl_module)):
            self._found = sites(pl_module, TASK)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that what is frozen stayed as it was."""
        if self._frozen is not None:
            self._frozen.check(f"epoch {trainer.current_epoch}")

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the ranks that training came to, where it changed them."""
        self._schedules.show_ranks()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing behind; Lightning does not tear down after an exception."""
        self._undo_all()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing behind but the adapters and the checkpoint writer, which saves after the run need."""
        self._undo_all()

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what a resumed run goes on drawing from."""
        save_random_states(trainer, checkpoint)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Look at the adapters anew: those of a checkpoint may be fewer than were injected."""
        self._found = sites(pl_module, TASK)
        if trainer.state.fn == "fit":
            self._undo.append(restore_random_states(trainer, checkpoint))

    @override
    def state_dict(self) -> dict[str, Any]:
        """Say what was trained; a stateful callback is also one that Lightning refuses to have twice."""
        return {
            "method": type(self.method).__name__,
            "hyperparameters": self.method.hyperparameters(),
            "schedules": self._schedules.state_dicts(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Hand schedules the state that they had."""
        self._schedules.load_state_dict(state_dict.get("schedules", []))

    def _undo_all(self) -> None:
        self._replaced_methods.restore_all()
        while self._undo:
            self._undo.pop()()
        if self._audit is not None:
            self._audit.stop()
            self._audit = None
        self._frozen = None
        self._schedules.stop()
        self._found = []
