"""What the sharded strategies share: the frozen base is divided, what is trained is whole on every process.

Adapters are small. Kept whole, they need no gathering for a checkpoint, their optimizer states look as on one device,
and whatever a method does to them it does as on one device, once gradients are averaged.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.checkpoints import AdapterCheckpointIO
from lightning_lora.files import SECTION
from lightning_lora.fingerprint import note_base_weights
from lightning_lora.loading import check_described_base
from lightning_lora.sharding import is_sharded, spread, whole
from lightning_lora.sites import clean, sites
from lightning_lora.state import own_state_dict
from lightning_lora.strategies.gradients import average_gradients, clip_by_norm, replicated


class ReplicatesAdapters(Strategy):
    """Mixin for a strategy that shards the base: adapters are restored before the module is wrapped, as on one device.

    Attributes:
        restore_checkpoint_after_setup: No, although Lightning's sharded strategies do: adapters are whole, so they can
            take their values before the base is divided.
    """

    restore_checkpoint_after_setup = False
    lightning_restore_optimizer = True
    _accumulating = False
    _unfinished: tuple[object, dict[str, Any]] | None = None  # a checkpoint read before the base had its values

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Run backward and average the gradients before any hook sees them."""
        self.pre_backward(closure_loss)
        closure_loss = self.precision_plugin.pre_backward(closure_loss, self._module)
        self.precision_plugin.backward(closure_loss, self._module, optimizer, *args, **kwargs)
        if not self._accumulating:
            average_gradients(replicated(self._module))
        closure_loss = self.precision_plugin.post_backward(closure_loss, self._module)
        self.post_backward(closure_loss)
        return closure_loss

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Let gradients add up in each process while Lightning accumulates them."""
        self._accumulating = True
        try:
            yield
        finally:
            self._accumulating = False

    def prepare(self) -> None:
        """Note what files say of the base, now that it has its values and all processes are here to be asked."""
        note_base_weights(sites(self._module))
        if self._unfinished is not None:
            (path, checkpoint), self._unfinished = self._unfinished, None
            io = self.checkpoint_io
            if isinstance(io, AdapterCheckpointIO) and not io.allow_base_mismatch:
                described = checkpoint[SECTION]
                found = [site for site in sites(self._module) if site.name in described["sites"]]
                check_described_base(path, self._module, found, described)
            _assign(self._module, checkpoint["state_dict"])

    def clip_here(self) -> None:
        """Have gradients clipped by their norm over whole and sharded ones; Lightning's plugins know one kind each."""
        plugin = self.precision_plugin

        def clip(optimizer: Optimizer, clip_val: float) -> None:
            if clip_val > 0:
                clip_by_norm(plugin.main_params(optimizer), clip_val)

        plugin.clip_grad_by_norm = clip  # type: ignore[method-assign]

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return, where it is written, what is trained, under the names that it has on one device."""
        return {clean(name): self._written(value) for name, value in own_state_dict(self._module).items()}

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Give what is trained its values; what is still on the meta device gets them when the base does."""
        for module in [site.slot for site in sites(self._module)]:
            if any(parameter.is_meta for parameter in module.parameters()):
                module.to_empty(device=self.root_device)
        _assign(self._module, checkpoint["state_dict"])

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return, where it is written, an optimizer's state as on one device."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        state = optimizer.state_dict()
        state["state"] = {
            index: {name: self._written(value) for name, value in values.items()}
            for index, values in state["state"].items()
        }
        return state

    def _written(self, value: Any) -> Any:
        """Return a value as rank zero writes it; the others help to put it together and keep nothing of it."""
        if not isinstance(value, Tensor):
            return value
        value = whole(value)
        return value.cpu() if self.is_global_zero else None

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give each optimizer its state, divided where its parameters are."""
        Strategy.load_optimizer_state_dict(self, checkpoint)
        for optimizer in self.optimizers:
            for parameter, state in optimizer.state.items():
                for name, value in state.items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        state[name] = spread(value, parameter)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, on every process."""
        path = self.broadcast(checkpoint_path)
        checkpoint = Strategy.load_checkpoint(self, path, weights_only)
        if any(parameter.is_meta for parameter in self._module.parameters()):
            self._unfinished = path, checkpoint
        return checkpoint

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write one file, on rank zero."""
        note_base_weights(sites(self._module))
        Strategy.save_checkpoint(self, checkpoint, self.broadcast(filepath), storage_options)


@torch.no_grad()
def _assign(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load entries module by module, because loading a whole model would have wrappers gather the base first."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        start = f"{prefix}." if prefix else ""
        entries = {**module._parameters, **module._buffers}
        given = {
            start + name: spread(state[start + name], entry) if is_sharded(entry) else state[start + name]
            for name, entry in {**entries, "_extra_state": None}.items()
            if start + name in state
        }
        errors: list[str] = []
        if given:
            module._load_from_state_dict(given, start, {}, False, [], [], errors)
        for error in errors:
            raise RuntimeError(error)
