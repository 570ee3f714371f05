"""Checks around the first steps of a run, for faults that would otherwise train wrongly without a word."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType

from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.description import tied_to
from lightning_lora.gradient_stops import gradient_stops
from lightning_lora.layers.attention import AdaptedMultiheadAttention
from lightning_lora.layers.embedding import AdaptedEmbedding
from lightning_lora.layers.seam import Reader
from lightning_lora.method import Method
from lightning_lora.methods.delta_lora import DeltaLoRA
from lightning_lora.sites import Site, clean, join, sites
from lightning_lora.state import marked
from lightning_lora.strategies.replication import ReplicatesAdapters

_LINEAR = nn.Linear
_AUTOCAST = {"bfloat16": "bf16-mixed", "float16": "16-mixed"}  # the precision that computes in each
_SHARDING = {
    "FSDPStrategy": ("it would gather the whole base for each checkpoint and divide adapters too", "lora_fsdp"),
    "ModelParallelStrategy": (
        "it would gather the whole base for each checkpoint, or write one that adapters cannot be read from, and train "
        "adapters that came after fully_shard in each process alone",
        "lora_fsdp2",
    ),
    "DeepSpeedStrategy": ("its engine writes the checkpoints, the base in them", "lora_fsdp2"),
}


def check_connected(loss: Tensor, model: nn.Module) -> None:
    """Check that a loss depends on something that is trained.

    Args:
        loss: What backward will be called on.
        model: The adapted model.

    Raises:
        RuntimeError: If it does not.
    """
    if not loss.requires_grad:
        raise RuntimeError(
            f"the loss depends on no adapter. {gradient_stops(model)}Either the forward calls none of the adapted "
            "layers as a module, or something cuts the gradient, as reentrant checkpointing of a frozen input does: "
            "pass use_reentrant=False, or for a model of transformers "
            'gradient_checkpointing_kwargs={"use_reentrant": False}'
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
            f"{len(thawed)} parameters of the frozen base require a gradient: {some(thawed)}. "
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


@contextmanager
def plain_linear() -> Iterator[None]:
    """Have PyTorch's own ``nn.Linear`` back where a precision plugin put its class, for modules that are built, there.

    Lightning calls ``configure_model`` so; what looks for linear layers in a module built before would find none.
    """
    replaced = nn.Linear
    nn.Linear = _LINEAR  # type: ignore[misc]
    try:
        yield
    finally:
        nn.Linear = replaced  # type: ignore[misc]


def check_frozen_dtype(trainer: Trainer, dtype: str | None) -> None:
    """Check that a run computes in the dtype that frozen weights are to be stored in.

    Args:
        trainer: The Trainer.
        dtype: Its name; None leaves the weights as they are.

    Raises:
        ValueError: If it is unknown or not the one of autocast, or the base is to be divided over processes.
    """
    if dtype is None:
        return
    if dtype not in _AUTOCAST:
        raise ValueError(f"frozen_dtype={dtype!r}: must be 'bfloat16' or 'float16', or left out")
    if trainer.precision_plugin.precision != _AUTOCAST[dtype]:
        raise ValueError(
            f"frozen_dtype={dtype!r} is for precision={_AUTOCAST[dtype]!r}, whose products are computed in it, and the "
            f"trainer has precision={trainer.precision_plugin.precision!r}: change one of them, or leave it out"
        )
    if isinstance(trainer.strategy, ReplicatesAdapters):
        raise ValueError(
            f"frozen_dtype={dtype!r} cannot go with {type(trainer.strategy).__name__}, which divides blocks of one "
            f"dtype: leave it out and load the whole base in {dtype}, or take strategy='lora_ddp'"
        )


def check_scaled(trainer: Trainer, optimizer: Optimizer, method: str) -> None:
    """Check that gradients are true ones before a step, for methods that look at them.

    Args:
        trainer: The Trainer.
        optimizer: The one that trains the adapters.
        method: The method's name, for the message.

    Raises:
        ValueError: If they are still multiplied by a GradScaler's scale then, because the optimizer divides itself.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(
            f"{type(optimizer).__name__} with fused=True under precision={trainer.precision!r} sees scaled gradients, "
            f"and {method} has to look at true ones: leave out fused=True, or use precision='bf16-mixed'"
        )


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
            f"{len(lost)} of {len(found)} adapters are gone since they were injected: {some(lost)}. Something put "
            "other layers in their place, as precision plugins do: let it convert the module before the Trainer runs"
        )


def check_unwrapped(model: nn.Module) -> None:
    """Raise ``ValueError`` if a part of a model is wrapped for several processes before its adapters are there.

    Args:
        model: The module, with the adapters still to come; wrappers keep the parameters alike that they find.
    """
    for name, module in model.named_modules():
        if {"DistributedDataParallel", "FullyShardedDataParallel"} & {cls.__name__ for cls in type(module).__mro__}:
            raise ValueError(
                f"{name} is a {type(module).__name__} before its adapters came, so every process would train adapters "
                "of its own: wrap nothing in configure_model and use strategy='ddp', or 'lora_fsdp' to divide the base"
            )


def tied_to_frozen(model: nn.Module) -> str | None:
    """Return a sentence that names weights which are trained in full although they are another layer's too, or None.

    Args:
        model: The adapted model.
    """
    chosen: dict[int, str] = {}
    others: dict[int, str] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                names = chosen if name in marked(module) else others
                names.setdefault(id(parameter), clean(join(prefix, name)))
    tied = [f"{name} is {others[key]} too" for key, name in chosen.items() if key in others]
    if not tied:
        return None
    return f"trained in full by modules_to_save or bias: {some(tied)} (tied weights), so both layers change"


def check_base_untied(model: nn.Module, found: list[Site], method: Method) -> None:
    """Raise ``ValueError`` if a method writes to weights that layers without its adapters have too.

    Args:
        model: The adapted model.
        found: Its sites.
        method: What the run trains; others than Delta-LoRA in place pass.
    """
    if not (isinstance(method, DeltaLoRA) and method.in_place):
        return
    for name, others in tied_to(model, found).items():
        if others:
            raise ValueError(
                f"in_place=True: {name} is tied to {some(others)}, which would change with it: adapt both, or use "
                "in_place=False"
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


def check_strategy(strategy: object, fingerprint: str = "sampled") -> None:
    """Refuse strategies with which adapters could not be saved.

    Args:
        strategy: The Trainer's; told by class names, because two packages have classes of these names.
        fingerprint: What saves are to say of the base.

    Raises:
        ValueError: If it shards the model as adapters cannot be, or divides a base that is to be looked at as a whole.
    """
    if fingerprint == "full" and isinstance(strategy, ReplicatesAdapters):
        raise ValueError(
            f"fingerprint='full' under {type(strategy).__name__}: no process has the whole base when it saves: leave "
            "it out, and write the folder in one process with save_adapter(model, folder, fingerprint='full')"
        )
    kinds = {cls.__name__ for cls in type(strategy).__mro__}
    for stock, (reason, ours) in _SHARDING.items():
        if stock in kinds and not isinstance(strategy, ReplicatesAdapters):
            raise ValueError(f"strategy={type(strategy).__name__}: {reason}: use strategy='{ours}'")


def check_launcher(strategy: object) -> None:
    """Refuse to inject where the process that called ``fit`` would not get the adapters.

    Args:
        strategy: The Trainer's.

    Raises:
        ValueError: If it trains in processes that this one starts, and takes back what the module here has a place for.
    """
    if "_MultiProcessingLauncher" in {cls.__name__ for cls in type(getattr(strategy, "launcher", None)).__mro__}:
        raise ValueError(
            f"strategy={type(strategy).__name__} trains in spawned or forked processes, and adapters that are injected "
            "there would stay there: use strategy='ddp', or in a notebook call inject(model, LoRA(...)) with the same "
            "method and targets before trainer.fit"
        )


def some(names: list[str]) -> str:
    """Return the first three names as text."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
