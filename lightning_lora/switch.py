"""Choose which tasks of an adapted model are in use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lightning_lora.sites import check_known, check_not_written, slots


def use(model: nn.Module, *tasks: str) -> None:
    """Use the adapters of these tasks, added together; with none, the bare base.

    Args:
        model: The adapted model.
        tasks: Names given at ``inject`` or ``load_adapter``.

    Raises:
        ValueError: If the model has no adapter of a task.
        RuntimeError: If the training of another task writes to the base meanwhile, or each example has its own task.
    """
    found, active = slots(model), tuple(dict.fromkeys(tasks))
    check_known(found, active)
    if any(slot.written_by not in (None, *active) for slot in found):
        check_not_written(model, active)
    if any(slot.per_example is not None for slot in found):
        raise RuntimeError(
            f"cannot use {' and '.join(tasks) or 'the bare base'} inside per_example(model, ...), where each example "
            "has a task of its own: leave the block first"
        )
    for slot in found:
        slot.use(active)


@contextmanager
def using(model: nn.Module, *tasks: str) -> Iterator[nn.Module]:
    """Use the adapters of these tasks for the length of a ``with`` block; ``using(model)`` is the bare base.

    Args:
        model: The adapted model.
        tasks: As in ``use``.
    """
    before = [(slot, slot.active) for slot in slots(model)]
    use(model, *tasks)
    try:
        yield model
    finally:
        for slot, active in before:
            slot.use(active)
