"""What is checked before adapters are put into a model, so that a refusal leaves it as it was."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_lora.candidates import Candidate
from lightning_lora.layers import kind_of
from lightning_lora.layers.linear import AdaptedLinear
from lightning_lora.layers.seam import Called, replaced_forward
from lightning_lora.layout import Layout
from lightning_lora.method import Method
from lightning_lora.quantized import format_of
from lightning_lora.sharding import is_sharded, split_by_columns
from lightning_lora.sites import Site, Slot, clean, join, named_base_modules, sites, slots_of


def check_task_name(task: str) -> None:
    """Raise ``ValueError`` unless a task's name is short and safe in file names and module names."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", task) or hasattr(Slot("weight", Layout()), task):
        raise ValueError(
            f"task={task!r}: use 1 to 64 letters, digits, '_' or '-', and no attribute of a module, such as "
            "task='german'"
        )


def check_shapes(model: nn.Module) -> None:
    """Raise ``ValueError`` if a parameter has no shape yet."""
    for prefix, module in named_base_modules(model):
        for name, parameter in module._parameters.items():
            if isinstance(parameter, nn.UninitializedParameter):
                raise ValueError(
                    f"{clean(join(prefix, name))} has no shape yet (lazy layer), so it can be neither adapted nor "
                    "frozen: run one batch through the model where it is built, in __init__, setup or "
                    "configure_model, or give in_features"
                )


def is_there(one: Candidate, task: str) -> bool:
    """Tell whether a matrix has an adapter of a task."""
    return task in slots_of(one.site.module).get(one.site.name.rpartition(".")[2], {})


def has_already(one: Candidate, method: Method, task: str) -> bool:
    """Tell whether a matrix has a task's adapter of this method.

    Raises:
        ValueError: If it has one of another method.
    """
    if not is_there(one, task):
        return False
    present = one.site.adapter(task).method
    if present != method:
        raise ValueError(
            f"{one.site.name} already has the adapter {task!r} with {present}, not {method}: "
            f"call remove(model, {task!r}) first, or give another task name"
        )
    return True


def check_one_method(model: nn.Module, methods: Sequence[Method], task: str) -> None:
    """Raise ``ValueError`` at a second method in one task; ranks and alphas may differ from site to site.

    Args:
        model: The model.
        methods: Those of the new adapters.
        task: Their task.
    """
    present = [site.adapter(task).method for site in sites(model, task)][:1]
    for method in methods:
        if present and present[0].at(method.r, method.alpha) != method:
            raise ValueError(
                f"the adapter {task!r} is already there with {present[0]}, not {method}, and a task has one method: "
                f"call remove(model, {task!r}) first, or give another task name"
            )


def check_layer(site: Site) -> None:
    """Raise ``ValueError`` if a matrix's layer can hold no adapter."""
    name = site.name.rpartition(".")[0]
    kind = kind_of(site.module)
    settable = is_parametrized(site.module, site.parameter) and kind is not None and issubclass(kind, Called)
    if site.parameter not in site.module._parameters and not settable:
        raise ValueError(
            f"{site.name} is no parameter but computed from others (by a hook, as old weight norm and pruning do), so "
            f"an adapter could not be merged into it: leave it out with exclude_modules=['{name}'], train it in full "
            f"with modules_to_save=['{name}'], or remove what computes it from the module first"
        )
    if hasattr(site.module, "adapters") and not slots_of(site.module):
        raise ValueError(
            f"{site.name}: its module already has an attribute called 'adapters', the name we need: rename that, or "
            f"leave the layer out with exclude_modules=['{name}']"
        )
    packed = site.weight is not None and format_of(site.weight) is not None
    if packed and kind is not AdaptedLinear:
        raise ValueError(
            f"{site.name}: of layers with packed weights only linear ones can be adapted, not a "
            f"{type(site.module).__name__}: leave it out with exclude_modules=['{name}'], or do not quantize it"
        )


def check_shards(model: nn.Module, new: Sequence[Site], allowed: bool) -> None:
    """Raise ``ValueError`` if nothing keeps the adapters of divided weights alike, or they would not fit.

    Args:
        model: The model.
        new: The matrices to adapt.
        allowed: Whether what ``fully_shard`` has divided may be adapted.
    """
    divided = [site.name for site in new if is_sharded(site.weight)]
    if not divided:
        return
    if not allowed:
        raise ValueError(
            f"{len(divided)} of the chosen weights were sharded before their adapters came (first: {divided[0]}, a "
            "DTensor), so every process would train adapters of its own: call inject(...) before fully_shard(...); "
            "with a Trainer use strategy='lora_fsdp2'"
        )
    parallel = sorted({clean(name) for name in split_by_columns(model)} & set(divided))
    if parallel:
        raise ValueError(
            f"{len(parallel)} of the chosen weights are divided by tensor parallelism (first: {parallel[0]}): what "
            "their layers give is divided too, and adapters are whole: leave out parallelize_module and let "
            "fully_shard alone divide the model"
        )


def check_forwards(model: nn.Module, targets: Sequence[Candidate]) -> None:
    """Raise ``ValueError`` at layers whose forward no subclass replaces, because it sits on the one object.

    Args:
        model: The model.
        targets: The matrices to adapt.
    """
    replaced = [module for _, module in named_base_modules(model) if replaced_forward(module)]
    names = {(id(site.module), site.parameter): site.name for one in targets for site in (one.site, *one.tied)}
    for module in replaced:
        kind = kind_of(module)
        used = [(module, parameter) for parameter in module._parameters] + (kind.reads(module) if kind else [])
        for owner, parameter in used:
            name = names.get((id(owner), parameter))
            if name is not None:
                raise ValueError(
                    f"{name}: the forward of its {type(module).__name__} was replaced on this one object, so its "
                    "adapter would never run: replace it after the injection, or in a subclass, or leave the layer "
                    f"out with exclude_modules=['{name.rpartition('.')[0]}']"
                )
