"""The audit of a run's first batch: adapters learn, the base does not, and buffers that change are noted."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_lora.callbacks.guards import check_frozen, some
from lightning_lora.gradient_stops import gradient_stops
from lightning_lora.sites import Site, sites
from lightning_lora.state import mark_trained_in_full

_SAMPLE = 1024


class Audit:
    """Watches one batch: every adapter must get a gradient, and nothing of the base may be trained or written to.

    Buffers that the batch changed, such as a codebook's, are noted as trained, so that checkpoints hold them.

    Args:
        model: The adapted model, as it is trained.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.backward_ran = False
        self._reached: set[str] = set()
        self._handles: list[RemovableHandle] = []
        self._factors: dict[str, str] = {}
        self._sharded: dict[str, Tensor] = {}
        for site in sites(model):
            in_use = {id(p) for task in site.slot.active for p in site.adapter(task).parameters()}
            for factor, parameter in site.slot.named_parameters():
                if parameter.requires_grad and id(parameter) in in_use:
                    name = f"{site.name} ({factor})"
                    self._factors[name] = site.name
                    if hasattr(parameter, "device_mesh"):  # a DTensor
                        self._sharded[name] = parameter
                    self._handles.append(parameter.register_hook(self._note(name)))  # type: ignore[no-untyped-call]
        self._frozen = FrozenWeights(model)
        self._buffers = Buffers(model)

    def _note(self, name: str):  # type: ignore[no-untyped-def]
        def note(gradient: Tensor | None) -> None:
            if gradient is not None:  # what has no backward passes on that there is none
                self._reached.add(name)

        return note

    def note_backward(self) -> None:
        """Note that gradients were computed; those of sharded parameters were set without a call of their hooks."""
        self.backward_ran = True
        self._reached |= {name for name, parameter in self._sharded.items() if parameter.grad is not None}

    def stop(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def check(self) -> None:
        """Judge the batch.

        Raises:
            RuntimeError: If an adapter got no gradient, a parameter of the base is trainable, or an adapted weight of
                the base has other values than before.
        """
        self._check_gradients()
        check_frozen(self.model)
        self._frozen.check("the first batch")
        self._buffers.mark_changed()

    def _check_gradients(self) -> None:
        silent = [name for name in self._factors if name not in self._reached]
        if not silent:
            return
        modules = {_module_of(self._factors[name]) for name in silent}
        used = {_module_of(self._factors[name]) for name in self._reached} - modules
        leave_out = (
            "Either the forward does not call these layers as modules (a teacher, a layer whose weight is read "
            f"directly): leave them out with exclude_modules={_outermost(modules, used)}. Or something"
        )
        raise RuntimeError(
            f"{len(silent)} of {len(self._factors)} adapter parameters got no gradient in the first batch: "
            f"{some(silent)}. {gradient_stops(self.model)}{leave_out if used else 'Something'} cuts the gradient, as "
            "reentrant checkpointing of a frozen input does: pass use_reentrant=False. Or later batches use them, or "
            "the module averages them from others: set LoRACallback(audit=False)"
        )


class FrozenWeights:
    """Notices changes of adapted weights that are frozen, and so in no checkpoint.

    Args:
        model: The adapted model, before.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = {site.name: _sample(site.weight) for site in sites(model)}

    def check(self, when: str) -> None:
        """Compare with what the weights are now; those that were thawed since are in checkpoints.

        Args:
            when: For the message.

        Raises:
            RuntimeError: If one has other values than before.
        """
        written = [site.name for site in sites(self._model) if site.slot.written_by is None and self._differs(site)]
        if written:
            raise RuntimeError(
                f"{len(written)} weights of the frozen base were changed during {when}: {some(written)}. "
                "Checkpoints do not hold them, so the change would be lost. Something writes to parameters itself, "
                "such as weight clipping: let it skip those that do not require a gradient, or train the module in "
                f"full with modules_to_save={_outermost({_module_of(name) for name in written}, set())}"
            )

    def _differs(self, site: Site) -> bool:
        before, now = self._before.get(site.name), _sample(site.weight)
        thawed = site.weight is not None and site.weight.requires_grad
        return not thawed and before is not None and before.shape == now.shape and not torch.equal(before, now)


class Buffers:
    """Finds the buffers that training changes, such as those of a codebook or a queue, so that checkpoints hold them.

    Args:
        model: The adapted model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._before = [
            (module, name, buffer, _version(buffer), _sample(buffer))
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in module._non_persistent_buffers_set
        ]

    def mark_changed(self) -> None:
        """Note those that changed as trained in full."""
        for module, name, before, version, values in self._before:
            now = module._buffers.get(name)
            if now is None:
                continue
            # torch counts in-place changes, but not those that its batch norm makes to running statistics
            if now is not before or _version(now) != version or not torch.equal(_sample(now), values):
                mark_trained_in_full(module, [name])


def _sample(tensor: Tensor | None) -> Tensor:
    """Return a copy of some values as bytes, so that NaN equals itself; none of what is sharded, packed or computed."""
    if tensor is None or type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or tensor.layout != torch.strided:
        return torch.empty(0)
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE)].clone().view(torch.uint8)


def _version(buffer: Tensor) -> int:
    """Return how often a tensor was written to in place; one made under inference mode cannot be in training."""
    return 0 if buffer.is_inference() else buffer._version


def _module_of(site: str) -> str:
    return site.rpartition(".")[0] or site


def _outermost(names: Collection[str], others: Collection[str]) -> list[str]:
    """Return the fewest modules that hold all these names and none of the others."""
    found: set[str] = set()
    for name in names:
        parts = name.split(".")
        prefixes = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
        found.add(next((p for p in prefixes if not any(f"{other}.".startswith(f"{p}.") for other in others)), name))
    return sorted(found)
