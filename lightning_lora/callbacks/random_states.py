"""Random states in checkpoints, so that a resumed run draws the numbers that it would have drawn without a break."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch import Trainer
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DistributedSampler

from lightning_lora.callbacks.preemption import validates_next
from lightning_lora.files import SECTION

_KEY = f"{SECTION}.random_states"


def save_random_states(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Add the random states of all processes to the checkpoint that rank zero writes, and their places in the data.

    Args:
        trainer: The Trainer; every process has to come here, unless an exception ended one of them.
        checkpoint: Takes a list with an entry for each process, of plain values and tensors.
    """
    own = _states(trainer)
    if trainer.world_size == 1:
        checkpoint[_KEY] = [own]
    elif not trainer.interrupted:  # else the others may never come
        own["loaders"] = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])
        every = [own] * trainer.world_size if trainer.is_global_zero else None
        dist.gather_object(own, every)
        checkpoint[_KEY] = every


def restore_random_states(trainer: Trainer, checkpoint: dict[str, Any]) -> Callable[[], None]:
    """Have the states of a checkpoint put back where the uninterrupted run had them, and say what cannot be as it was.

    That is after the last hook before the first batch. Lightning has made the iterator of the data by then, which draws
    too, so between two epochs it is made anew, as at the start of every epoch. In the middle of one it knows its place.
    If it draws when it is first asked for a batch, or a validation is run again, states are put back once more.

    Args:
        trainer: The Trainer, in ``fit``.
        checkpoint: What is resumed.

    Returns:
        What takes this back if training does not begin.
    """
    every: list[dict[str, Any]] = checkpoint.get(_KEY, [])
    own = every[trainer.global_rank] if len(every) == trainer.world_size else {}
    if "loaders" in own:
        checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = own["loaders"]
    undo: list[Callable[[], None]] = []

    def begin() -> None:
        _warn_of_lost_place(trainer)
        _warn_of_lost_validation(trainer)
        _warn_of_other_states(trainer, len(every))
        if not own:
            return
        _put_back(trainer, own)
        _start_epoch_as_always(trainer)
        if trainer.fit_loop.epoch_loop.val_loop.restarted_mid_evaluation:  # it is run again, as a whole
            undo.append(_once_after(trainer.strategy, "on_validation_end", lambda: _put_back(trainer, own)))
        if _in_mid_epoch(trainer) and _finds_place_late(trainer):
            undo.append(_once_after(trainer.strategy, "on_train_batch_start", lambda: _put_back(trainer, own)))

    def take_back() -> None:
        while undo:
            undo.pop()()

    undo.append(_once_after(trainer.strategy, "on_train_start", begin))
    return take_back


def _start_epoch_as_always(trainer: Trainer) -> None:
    """Where an epoch has ended, have Lightning begin the next one as in a run that goes on."""
    loop: Any = trainer.fit_loop
    if loop.restarted_on_epoch_end:  # with max_steps Lightning would train one more batch in the epoch that has ended
        _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined]
        loop.reset_restart_stage()
        loop.epoch_progress.increment_completed()
    if not loop.restarting:
        loop._resuming_from_checkpoint = False  # so that it makes the iterator
        often: int = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        if often and trainer.current_epoch % often == 0:
            loop._last_train_dl_reload_epoch = float("-inf")
    elif _at_last_batch(trainer):
        loop.reset_restart_stage()  # so that it counts the epoch, without which the next resume would go wrong
        for loader in _loaders(trainer):
            _set_sampler_epoch(loader, loop.epoch_progress.current.processed)
        iter(loop._data_fetcher)


def _states(trainer: Trainer) -> dict[str, Any]:
    """Return the states of this process, in types that are read without running code."""
    states = _collect_rng_states(include_cuda=False)
    name, keys, *rest = states["numpy"]
    states["numpy"] = (name, keys.tolist(), *rest)
    device = trainer.strategy.root_device
    if device.type == "cuda":
        states["device"] = torch.cuda.get_rng_state(device)
    states["generators"] = [generator.get_state() for generator in _generators(trainer)]
    states["seeds"] = [sampler.seed for sampler in _distributed_samplers(trainer)]
    return states


def _put_back(trainer: Trainer, states: dict[str, Any]) -> None:
    _set_rng_states({name: states[name] for name in ("torch", "numpy", "python")})
    device = trainer.strategy.root_device
    if device.type == "cuda" and "device" in states:
        torch.cuda.set_rng_state(states["device"], device)
    for generator, state in zip(_generators(trainer), states["generators"], strict=False):
        generator.set_state(state)
    for sampler, seed in zip(_distributed_samplers(trainer), states["seeds"], strict=False):
        sampler.seed = seed


def _loaders(trainer: Trainer) -> list[Any]:
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else combined.flattened


def _samplers(trainer: Trainer) -> Iterator[Any]:
    for loader in _loaders(trainer):
        batches = getattr(loader, "batch_sampler", None)
        yield from (getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))


def _generators(trainer: Trainer) -> list[torch.Generator]:
    """Return the generators that were given to training loaders and their samplers, each once."""
    found = (getattr(one, "generator", None) for one in (*_loaders(trainer), *_samplers(trainer)))
    return list(dict.fromkeys(one for one in found if isinstance(one, torch.Generator)))


def _distributed_samplers(trainer: Trainer) -> list[DistributedSampler[Any]]:
    """Return those that shuffle by a seed of their own, which Lightning takes from this run's global seed."""
    return list(dict.fromkeys(one for one in _samplers(trainer) if isinstance(one, DistributedSampler)))


def _in_mid_epoch(trainer: Trainer) -> bool:
    return trainer.fit_loop.restarting and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def _at_last_batch(trainer: Trainer) -> bool:
    epoch_loop = trainer.fit_loop.epoch_loop
    return epoch_loop.restarted_on_train_batch_end and epoch_loop.batch_progress.is_last_batch


def _finds_place_late(trainer: Trainer) -> bool:
    """Tell whether an iterator of the data does nothing, so draws nothing, until it is asked for a batch."""
    combined: Any = trainer.fit_loop._combined_loader
    generators = filter(inspect.isgenerator, combined._iterator.iterators)
    return any(inspect.getgeneratorstate(one) == inspect.GEN_CREATED for one in generators)


def _warn_of_other_states(trainer: Trainer, written: int) -> None:
    if not written:
        rank_zero_warn(
            "the checkpoint holds no random states, as those of earlier versions and those that an exception in one of "
            "several processes left, so with dropout or shuffling this run differs from the uninterrupted one: "
            "checkpoints that it writes will hold them"
        )
    elif written != trainer.world_size:
        rank_zero_warn(
            f"the checkpoint holds the random states of {written} processes and this run has {trainer.world_size}, so "
            f"with dropout or shuffling it differs from the uninterrupted one: resume with {written} processes"
        )


def _warn_of_lost_place(trainer: Trainer) -> None:
    """Say if the rest of an epoch will see other data than it would have seen."""
    if not _in_mid_epoch(trainer):
        return
    fetcher = trainer.fit_loop._data_fetcher
    stateless = [type(loader).__name__ for loader in _loaders(trainer) if not isinstance(loader, _Stateful)]
    if stateless:
        rank_zero_warn(
            f"the checkpoint was written in the middle of an epoch and {stateless[0]} cannot go back to its place, so "
            "it starts over and this run differs from the uninterrupted one: resume from the end of an epoch, or "
            "give a loader with state_dict and load_state_dict, such as torchdata's StatefulDataLoader"
        )
    elif fetcher is not None and fetcher.length is None:
        rank_zero_warn(
            "the checkpoint was written in the middle of an epoch by a loader without a length, from which Lightning "
            "takes one batch ahead, so a batch is left out and this run differs from the uninterrupted one: resume "
            "from the end of an epoch, or give the loader __len__"
        )


def _warn_of_lost_validation(trainer: Trainer) -> None:
    """Say if the save came between a batch and the validation that follows it."""
    loop, often = trainer.fit_loop, trainer.check_val_every_n_epoch
    if _at_last_batch(trainer):  # Lightning has counted that epoch already
        due = trainer.enable_validation and (often is None or trainer.current_epoch % often == 0)
    else:
        due = loop.epoch_loop.restarted_on_train_batch_end and validates_next(trainer)
    if due:
        rank_zero_warn(
            "the checkpoint was written before a validation that was due, which Lightning leaves out, so this run "
            "differs from the uninterrupted one: resume from a step that no validation follows, or from the end of an "
            "epoch"
        )


def _once_after(strategy: Any, name: str, run: Callable[[], None]) -> Callable[[], None]:
    """Run something right after a strategy's hook, which is the last of its name to be called, and only once.

    Returns:
        What takes this back.
    """

    def hook(*args: Any, **kwargs: Any) -> None:
        undo()
        getattr(strategy, name)(*args, **kwargs)
        run()

    def undo() -> None:
        if strategy.__dict__.get(name) is hook:
            del strategy.__dict__[name]

    strategy.__dict__[name] = hook
    return undo
