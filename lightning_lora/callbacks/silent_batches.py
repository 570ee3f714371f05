"""Batches of the training data through a module's own ``training_step``, without a trace in the run or in its logs."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torchmetrics import Metric, MetricCollection


def silent_losses(trainer: Trainer, pl_module: LightningModule, batches: int) -> Generator[Tensor, None, None]:
    """Yield the losses of ``training_step`` on batches of the training data, at most one epoch of them.

    It works in mid-run, between two batches, and inside ``configure_model``, before there are optimizers; there the
    module is moved to its device first. The module is in eval mode, compiled parts run as plain ones, nothing is
    logged and metrics are copies. Afterwards random states, modes and the run's own place in its data are what they
    were: the run goes on as if nothing had happened. Batches come as a new epoch would have them, shuffled by a seed
    of its own, so a resumed run sees the same ones. What else ``training_step`` keeps on its module stays there.

    Gradients are the caller's: put the loop in ``torch.no_grad()``, or call ``backward`` on what is yielded. Run it to
    its end, or ``close`` it.

    Args:
        trainer: The Trainer, in ``fit``.
        pl_module: Its module.
        batches: Number of batches on each rank.

    Raises:
        ValueError: If the module steps its optimizers or fetches its batches itself, or if the data can be iterated
            over only once.
    """
    check_looks(pl_module)
    with isolate_rng(), _silence(trainer, pl_module), torch.compiler.set_stance("force_eager"):
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        torch.manual_seed(seed)
        random.seed(seed)
        pl_module.to(trainer.strategy.root_device)
        with _training_data(trainer, seed, batches) as data:
            for batch, index, _ in data:
                moved = trainer.precision_plugin.convert_input(batch)
                moved = pl_module._on_before_batch_transfer(moved, dataloader_idx=0)
                moved = trainer.strategy.batch_to_device(moved, dataloader_idx=0)
                takes_index = is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2)
                output: Any = trainer.strategy.training_step(*((moved, index) if takes_index else (moved,)))
                loss = output["loss"] if isinstance(output, Mapping) else output
                if loss is not None:
                    try:
                        yield loss
                    except GeneratorExit:
                        return  # rather than pass it on: isolate_rng puts nothing back if something is raised


def check_looks(pl_module: LightningModule) -> None:
    """Raise ``ValueError`` if a module steps its optimizers or fetches its batches itself.

    Args:
        pl_module: The module.
    """
    name = type(pl_module).__name__
    if not pl_module.automatic_optimization:
        raise ValueError(
            f"{name} has automatic_optimization=False, so its training_step steps the optimizer and cannot run just to "
            "look at a loss: use automatic optimization, or a method and an init that look at no data"
        )
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        raise ValueError(
            f"training_step of {name} takes dataloader_iter, so it would fetch batches of the run itself: let it take "
            "(batch, batch_idx), or use a method and an init that look at no data"
        )


@contextmanager
def _silence(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Put a module in eval mode, and dummies where it would log or count."""

    def nothing(*_: Any, **__: Any) -> None:
        return

    modes = {module: module.training for module in pl_module.modules()}
    loggers = trainer.loggers
    logging = [(module.__dict__, dict(module.__dict__)) for module in modes if isinstance(module, LightningModule)]
    metrics = [(module, dict(module.__dict__)) for module in modes if isinstance(module, Metric | MetricCollection)]
    try:
        pl_module.eval()
        trainer.loggers = [DummyLogger() for _ in loggers]
        for own, _ in logging:
            own.update(log=nothing, log_dict=nothing)
        for metric, _ in metrics:
            states = metric.metric_state if isinstance(metric, Metric) else {}
            copies = {name: list(s) if isinstance(s, list) else s.detach().clone() for name, s in states.items()}
            metric.__dict__.update(copies)
        yield
    finally:
        for metric, before in metrics:
            metric.__dict__.clear()
            metric.__dict__.update(before)
        for own, before in logging:
            for method in ("log", "log_dict"):
                own.pop(method)
                own.update({method: before[method]} if method in before else {})
        trainer.loggers = loggers
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _training_data(trainer: Trainer, seed: int, batches: int) -> Iterator[Iterable[Any]]:
    """Return the training batches from the start, beside the iterator that the run may have."""
    loop = trainer.fit_loop
    early = loop._combined_loader is None
    given = CombinedLoader(loop._data_source.instance).flattened if early else []
    states = {one: one.get_state() for loader in given for one in _generators(loader)}  # setting up draws from these
    try:
        if early:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the run itself will say it
                loop.setup_data()
        if loop._combined_loader is None:  # there are no batches to train on
            yield ()
        else:
            with _beside(loop._combined_loader, seed) as fresh:
                yield islice(fresh, int(min(batches, loop.max_batches)))  # the loader's own limits end nothing
    finally:
        for generator, state in states.items():
            generator.set_state(state)
        if early and loop._combined_loader is not None:  # let the run ask again, when it may have a state to give
            loop._combined_loader.reset()
            loop._combined_loader = loop._data_fetcher = None


@contextmanager
def _beside(running: CombinedLoader, seed: int) -> Iterator[CombinedLoader]:
    """Return an iterator over the same data from the start."""
    for loader in running.flattened:
        if hasattr(loader, "__next__"):
            raise ValueError(
                f"the training data, a {type(loader).__name__}, can be iterated over only once, so batches looked at "
                "would be missing in training: give a DataLoader, or an object whose __iter__ returns a new iterator"
            )
    fresh = CombinedLoader(running.iterables, running._mode)
    fresh.limits = running.limits
    iterators = [(loader, loader._iterator) for loader in running.flattened if hasattr(loader, "_iterator")]
    states = {one: one.get_state() for loader in running.flattened for one in _generators(loader)}
    try:
        for loader, _ in iterators:
            loader._iterator = None  # workers that persist would be taken from the run
        for generator in states:
            generator.manual_seed(seed)
        yield iter(fresh)
    finally:
        fresh.reset()
        for generator, state in states.items():
            generator.set_state(state)
        for loader, iterator in iterators:
            loader._iterator = iterator


def _generators(loader: Any) -> Iterator[torch.Generator]:
    """Yield the sources of random numbers that a loader and its samplers have of their own."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    for owner in (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            yield generator
