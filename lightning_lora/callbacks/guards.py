"""Checks around the first steps of a run, for faults that would otherwise train wrongly without a word."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_lora.sites import sites
from lightning_lora.state import marked


class Audit:
    """Watches one batch: every adapter must get a gradient, and nothing of the base may be trained.

    Args:
        model: The adapted model, as it is trained.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.backward_ran = False
        self._reached: set[str] = set()
        self._handles: list[RemovableHandle] = []
        self._names: list[str] = []
        for site in sites(model):
            for factor, parameter in site.slot.named_parameters():
                if parameter.requires_grad:
                    name = f"{site.name} ({factor})"
                    self._names.append(name)
                    self._handles.append(parameter.register_hook(self._note(name)))  # type: ignore[no-untyped-call]

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
            RuntimeError: If an adapter got no gradient, or a parameter of the base is trainable.
        """
        silent = [name for name in self._names if name not in self._reached]
        if silent:
            first = silent[0].partition(" ")[0].rpartition(".")[0]
            raise RuntimeError(
                f"{len(silent)} of {len(self._names)} adapter parameters got no gradient in the first batch: "
                f"{', '.join(silent[:3])}{', ...' if len(silent) > 3 else ''}. The forward does not reach these "
                "layers, or something cuts the gradient (reentrant checkpointing of a frozen input does: pass "
                f"use_reentrant=False). Leave them out with exclude_modules=['{first}'], or, if later batches use "
                "them, set LoRACallback(audit=False)"
            )
        ours = {id(parameter) for site in sites(self.model) for parameter in site.slot.parameters()}
        ours |= {id(module._parameters.get(name)) for module in self.model.modules() for name in marked(module)}
        thawed = [name for name, p in self.model.named_parameters() if p.requires_grad and id(p) not in ours]
        if thawed:
            raise RuntimeError(
                f"{len(thawed)} parameters of the frozen base require a gradient: {', '.join(thawed[:3])}. "
                "Something set requires_grad after injection; to train them in full list them in modules_to_save"
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
