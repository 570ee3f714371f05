"""Callbacks that work against ours: they freeze, thaw or rewrite the base, or are ours a second time."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer

_REASONS = {  # by names, as pytorch_lightning has classes of its own
    "BaseFinetuning": (
        "freezes and thaws layers, as LoRACallback does, so one would undo what the other did: take it out of "
        "Trainer(callbacks=[...]), and list what is to be trained in full in LoRACallback(modules_to_save=[...])"
    ),
    "ModelPruning": (
        "sets weights of the frozen base to zero, and checkpoints do not hold the base: take it out of "
        "Trainer(callbacks=[...]), and prune before adapters are trained or after merge_(model)"
    ),
}


def check_conflicts(trainer: Trainer) -> None:
    """Raise ``ValueError`` if another callback of a Trainer would undo what ours does.

    Args:
        trainer: The Trainer.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    ours = [type(one).__name__ for one in callbacks if "LoRACallback" in {cls.__name__ for cls in type(one).__mro__}]
    if len(ours) > 1:  # Lightning says so too, but takes a subclass for another kind of callback
        raise ValueError(f"this Trainer has {' and '.join(ours)}: give it one, as an optimizer has one lr_ratio only")
    for one in callbacks:
        for cls in type(one).__mro__:
            if cls.__name__ in _REASONS:
                raise ValueError(f"{type(one).__name__} {_REASONS[cls.__name__]}")
