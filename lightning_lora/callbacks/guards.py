"""Checks around the first steps of a run, for faults that would otherwise train wrongly without a word."""

from __future__ import annotations

from collections.abc import Callable, Collection
from types import MethodType

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_lora.layers.attention import AdaptedMultiheadAttention
from lightning_lora.layers.embedding import AdaptedEmbedding
from lightning_lora.layers.seam import Reader
from lightning_lora.sites import Site, sites
from lightning_lora.state import mark_trained_in_full, marked

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
        self._weights: dict[str, Tensor] = {}
        for site in sites(model):
            self._weights[site.name] = _sample(site.weight)
            in_use = {id(p) for task in site.slot.active for p in site.adapter(task).parameters()}
            for factor, parameter in site.slot.named_parameters():
                if parameter.requires_grad and id(parameter) in in_use:
                    name = f"{site.name} ({factor})"
                    self._factors[name] = site.name
                    self._handles.append(parameter.register_hook(self._note(name)))  # type: ignore[no-untyped-call]
        self._buffers = Buffers(model)

    def _note(self, name: str):  # type: ignore[no-untyped-def]
        def note(gradient: Tensor) -> None:
            self._reached.add(name)

        return note

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
        self._check_weights()
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
            f"{_some(silent)}. {leave_out if used else 'Something'} cuts the gradient, as reentrant checkpointing of "
            "a frozen input does: pass use_reentrant=False. Or later batches use them, or the module averages them "
            "from others: set LoRACallback(audit=False)"
        )

    def _check_weights(self) -> None:
        now = {site.name: _sample(site.weight) for site in sites(self.model)}
        written = [
            name
            for name, before in self._weights.items()
            if name in now and now[name].shape == before.shape and not torch.equal(now[name], before)
        ]
        if written:
            raise RuntimeError(
                f"{len(written)} weights of the frozen base were changed during the first batch: {_some(written)}. "
                "Checkpoints do not hold them, so the change would be lost. Something writes to parameters itself, "
                "such as weight clipping: let it skip those that do not require a gradient, or train the module in "
                f"full with modules_to_save={_outermost({_module_of(name) for name in written}, set())}"
            )


class Buffers:
    """Finds the buffers that training changes, such as those of a codebook or a queue, so that checkpoints hold them.

    Args:
        model: The adapted model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._before = [
            (module, name, buffer, _version(buffer))  # torch counts in-place changes, so no copy is needed
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in module._non_persistent_buffers_set
        ]

    def mark_changed(self) -> None:
        """Note those that changed as trained in full."""
        for module, name, before, version in self._before:
            now = module._buffers.get(name)
            if now is not None and (now is not before or _version(now) != version):
                mark_trained_in_full(module, [name])


def check_connected(loss: Tensor) -> None:
    """Check that a loss depends on something that is trained.

    Args:
        loss: What backward will be called on.

    Raises:
        RuntimeError: If it does not.
    """
    if not loss.requires_grad:
        raise RuntimeError(
            "the loss depends on no adapter: the forward calls none of the adapted layers as a module, or something "
            "cuts the gradient, as reentrant checkpointing of a frozen input does: pass use_reentrant=False, or for a "
            'model of transformers gradient_checkpointing_kwargs={"use_reentrant": False}'
        )


def check_frozen(model: nn.Module) -> None:
    """Check that the base requires no gradient.

    Args:
        model: The adapted model.

    Raises:
        RuntimeError: If a parameter requires one that is neither an adapter's nor in ``modules_to_save``.
    """
    ours = {id(parameter) for site in sites(model) for parameter in site.slot.parameters()}
    ours |= {id(module._parameters.get(name)) for module in model.modules() for name in marked(module)}
    thawed = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in ours]
    if thawed:
        raise RuntimeError(
            f"{len(thawed)} parameters of the frozen base require a gradient: {_some(thawed)}. "
            "Something set requires_grad after injection: to train them in full list them in modules_to_save; "
            "to switch the gradients of an adversary by turns call self.toggle_optimizer(...) instead"
        )


def frozen_norms(model: nn.Module) -> list[nn.Module]:
    """Return the layers whose running statistics would drift although they are frozen.

    Args:
        model: The adapted model; a layer listed in ``modules_to_save`` is not frozen.
    """
    return [
        module
        for module in model.modules()
        if getattr(module, "track_running_stats", False)
        and getattr(module, "running_mean", None) is not None
        and "running_mean" not in marked(module)
    ]


def hold_still(norm: nn.Module) -> Callable[[], None]:
    """Put a layer in eval mode and leave it there, whatever calls ``train()`` on it or on a module around it.

    Args:
        norm: A layer with running statistics.

    Returns:
        What lets it go again.
    """
    norm.eval()
    norm.__dict__["train"] = MethodType(_stay, norm)

    def let_go() -> None:
        norm.__dict__.pop("train", None)

    return let_go


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    """Take the place of ``nn.Module.train`` and do nothing."""
    return module


def check_present(model: nn.Module, found: list[Site]) -> None:
    """Raise ``RuntimeError`` if adapters are gone that had been injected.

    Args:
        model: The adapted model.
        found: The sites as injected.
    """
    now = {site.name for site in sites(model)}
    lost = [site.name for site in found if site.name not in now]
    if lost:
        raise RuntimeError(
            f"{len(lost)} of {len(found)} adapters are gone since they were injected: {_some(lost)}. Something put "
            "other layers in their place, as precision plugins do: let it convert the module before the Trainer runs"
        )


def without_dropout(model: nn.Module, found: list[Site]) -> list[str]:
    """Return the sites whose adapters ask for dropout in vain: their weights are read or looked up, and have no input.

    Args:
        model: The adapted model.
        found: Its sites.
    """
    read = {
        (id(owner), parameter)
        for module in model.modules()
        if isinstance(module, AdaptedMultiheadAttention)
        for owner, parameter in module.reads(module)
    }
    return [
        site.name
        for site in found
        if ((id(site.module), site.parameter) in read or isinstance(site.module, Reader | AdaptedEmbedding))
        and any(site.adapter(task).dropout for task in site.slot.active)
    ]


def check_strategy(strategy: object) -> None:
    """Refuse strategies with which adapters could not be saved, or would be missing after the run.

    Args:
        strategy: The Trainer's; told by class names, because two packages have classes of these names.

    Raises:
        ValueError: If it shards the model, or trains in processes that this one starts and forgets.
    """
    kinds = {cls.__name__ for cls in type(strategy).__mro__}
    if kinds & {"FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"}:
        raise ValueError(
            f"strategy={type(strategy).__name__}: checkpoints of adapters over a sharded base are not supported yet; "
            "use strategy='ddp'"
        )
    if "_MultiProcessingLauncher" in {cls.__name__ for cls in type(getattr(strategy, "launcher", None)).__mro__}:
        raise ValueError(
            f"strategy={type(strategy).__name__} trains in spawned or forked processes, and the adapters would stay "
            "there: use strategy='ddp'"
        )


def _sample(weight: Tensor | None) -> Tensor:
    """Return a copy of some values of a weight; none of one that is sharded, packed, or computed from others."""
    if weight is None or type(weight) not in (Tensor, nn.Parameter) or weight.is_meta:
        return torch.empty(0)
    flat = weight.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE)].clone()


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


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
