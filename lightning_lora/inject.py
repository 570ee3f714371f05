"""Put adapters into a model, in place, and take them out again."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from lightning_lora.adapter import Adapter
from lightning_lora.candidates import Candidate
from lightning_lora.frozen_dtype import store_frozen
from lightning_lora.injection_checks import (
    check_forwards,
    check_layer,
    check_one_method,
    check_shapes,
    check_shards,
    check_task_name,
    has_already,
    is_there,
)
from lightning_lora.layers import swap_layer, swap_readers
from lightning_lora.layers.seam import unswap
from lightning_lora.method import Method
from lightning_lora.quantized import allow_inference_kernels, dense_weight, keep_differentiable
from lightning_lora.sharding import is_sharded
from lightning_lora.shared_tensors import join_shared
from lightning_lora.sites import Site, Slot, check_not_written, named_base_modules, sites, slots, slots_of
from lightning_lora.state import mark_biases, mark_trained_in_full, mark_whole, marked, unmark
from lightning_lora.targets import Parts, choose_values, find_modules_to_save, find_targets

Bias = Literal["none", "lora_only", "all"]


def inject(
    model: nn.Module,
    method: Method,
    target_modules: str | Sequence[str] = "all-linear",
    *,
    exclude_modules: Sequence[str] = (),
    modules_to_save: Sequence[str] = (),
    bias: Bias = "none",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    fused: Parts | None = None,
    task: str = "default",
    seed: int | None = None,
    dtype: torch.dtype | None = None,
    sharded: bool = False,
    share_inputs: bool = True,
    frozen_dtype: torch.dtype | None = None,
) -> list[Site]:
    """Adapt matrices of a model in place and freeze the rest; calling it again with the same arguments does nothing.

    Everything is checked before anything is changed. A new adapter is in the same train or eval mode as its layer.

    Args:
        model: Any module; its classes, names and tensors stay what they are.
        method: What to inject, for example ``LoRA(r=8, alpha=16)``.
        target_modules: ``"all-linear"``, a list of names or globs, or one regular expression for whole names.
        exclude_modules: Names or globs to leave out.
        modules_to_save: Names or globs of modules or parameters that are trained in full and saved with the adapters.
        bias: ``"none"``; ``"lora_only"`` trains the biases of adapted modules; ``"all"`` trains every bias.
        rank_pattern: Other ranks by name or glob; the first entry that fits decides.
        alpha_pattern: Other alphas, likewise.
        fused: Layers that hold several matrices in one, by name or glob: ``{"c_attn": ["q", "k", "v"]}`` for equal
            parts, ``{"qkv_proj": {"q": 64, "k": 16, "v": 16}}`` by rows. Each part then has an adapter of its own, and
            ``target_modules=["c_attn.q", "c_attn.v"]`` means two of them.
        task: The adapters' name; it becomes the one in use.
        seed: Seed of the adapters' random numbers (each mixes in its name, so it does not depend on the order);
            None takes PyTorch's current one.
        dtype: Floating-point type of the adapters; None takes fp32, or the layer's own where that is wider.
        sharded: Adapt weights that ``fully_shard`` has divided too. Adapters are whole on every process, and whoever
            trains them has to average their gradients, as the strategy ``lora_fsdp2`` does.
        share_inputs: Under autocast, cast an input once for all layers that are given it one after the other, such as
            q, k and v. This changes no result, unless something writes to an input between them through ``x.data``.
        frozen_dtype: The dtype that autocast will compute in: frozen fp32 weights of linear layers are stored in it, so
            that no step casts them or keeps a copy. Results stay the same, and the model then runs under autocast only.

    Returns:
        The sites of this task.

    Raises:
        ValueError: If an entry matches nothing, or a site already has another adapter of this task.
    """
    check_task_name(task)
    if bias not in ("none", "lora_only", "all"):
        raise ValueError(f"bias={bias!r}: must be 'none', 'lora_only' or 'all'")
    targets = find_targets(model, target_modules, exclude_modules, modules_to_save, fused)
    check_shards(model, [one.site for one in targets if not is_there(one, task)], sharded)
    ranks = choose_values(rank_pattern or {}, targets, "rank_pattern")
    alphas = choose_values(alpha_pattern or {}, targets, "alpha_pattern")
    saved = find_modules_to_save(model, modules_to_save)
    methods = [
        method.at(ranks.get(one.site.name, method.r), alphas.get(one.site.name, method.alpha)) for one in targets
    ]
    insert(model, list(zip(targets, methods, strict=True)), task, seed=seed, dtype=dtype)
    join_shared(model, task)
    found = sites(model, task)
    for site in found:
        adapter = site.adapter(task)
        adapter.shares_inputs = share_inputs
        if adapter.waits_for_weight and not is_sharded(site.weight):  # then at the first forward
            adapter.start(site.slot.layout.matrix(dense_weight(site.module, site.parameter)))
    for module, name in saved:
        if name is None:
            mark_whole(module)
        else:
            mark_trained_in_full(module, [name])
    if bias != "none":
        everywhere = [module for _, module in named_base_modules(model)]
        mark_biases(everywhere if bias == "all" else [one.site.module for one in targets])
    if frozen_dtype is not None:
        store_frozen(model, frozen_dtype)
    return found


def insert(
    model: nn.Module,
    targets: Sequence[tuple[Candidate, Method]],
    task: str,
    *,
    seed: int | None = None,
    dtype: torch.dtype | None = None,
    blank: bool = False,
) -> None:
    """Put an adapter on each given matrix, freeze the rest if that is new, and use this task.

    Args:
        model: The model that the candidates were found in.
        targets: Matrices, each with the method at its own rank and alpha.
        task: The adapters' name.
        seed: As for ``inject``.
        dtype: As for ``inject``.
        blank: Leave new adapters without values, on the meta device, because theirs are about to be assigned. Those of
            methods that share tensors get values all the same: a file may leave these out.

    Raises:
        ValueError: If a matrix cannot be adapted, or the task has adapters of another method.
        RuntimeError: If the training of another task writes to the base meanwhile.
    """
    check_not_written(model, [task])
    check_shapes(model)
    new = [(one, method) for one, method in targets if not has_already(one, method, task)]
    for one, _ in new:
        for site in (one.site, *one.tied):
            check_layer(site)
    check_forwards(model, [one for one, _ in new])
    check_one_method(model, [method for _, method in new], task)
    seed = torch.initial_seed() if seed is None else seed
    built: dict[str, Adapter] = {}
    for one, method in new:
        built[one.site.name] = _build(one, method, seed, dtype, blank and type(method).attach is Method.attach)
    if new:
        new[0][1].attach({site.name: site.adapter(task) for site in sites(model, task)} | built)
        _freeze(model)
        keep_differentiable(model)
    for one, _ in new:
        slot, adapter, mode = _slot(one), built[one.site.name], one.site.module.training
        slot[task] = adapter
        if not slot.training == adapter.training == mode:
            slot.train(mode)
    swap_readers(model)
    for slot in slots(model):
        slot.use((task,))


def remove(model: nn.Module, task: str | None = None, only: Collection[str] | None = None) -> None:
    """Take adapters out: where none is left, the module gets its own class back and nothing of ours stays on it.

    The base stays frozen; ``model.requires_grad_(True)`` thaws it.

    Args:
        model: The adapted model.
        task: The task to remove; None removes all.
        only: Names of the sites to remove it from; None is all that have it.

    Raises:
        ValueError: If there is no adapter of this task.
    """
    found = sites(model, task)
    if task is not None and not found:
        known = sorted({name for site in sites(model) for name in site.slot})
        raise ValueError(f"task={task!r}: the model has no adapter of that name; it has {known}")
    for site in found if only is None else [site for site in found if site.name in only]:
        slot = site.slot
        if site.weight is not None and (task is None or slot.written_by == task):
            slot.restore(site.weight)
        for name in [task] if task is not None else list(slot):
            del slot[name]
        slot.active = tuple(name for name in slot.active if name in slot)
    for _, module in named_base_modules(model):
        own = slots_of(module)
        adapters = module._modules.get("adapters")
        for key in [key for key, slot in own.items() if not len(slot)]:
            del adapters._modules[key]  # type: ignore[union-attr]
        if own and not adapters._modules:  # type: ignore[union-attr]
            del module._modules["adapters"]
            unswap(module)
    swap_readers(model)
    if not sites(model):
        unmark(model)
        allow_inference_kernels(model)


def restructures(model: nn.Module, method: Method, task: str) -> bool:
    """Tell whether a model has a task's adapters by a method that changes ranks or sites: those that are there count.

    Args:
        model: Any model.
        method: The method.
        task: The task.
    """
    present = next((site.adapter(task).method for site in sites(model, task)), None)
    return present is not None and method.restructures and present == method.at(present.r, present.alpha)


def _build(one: Candidate, method: Method, seed: int, dtype: torch.dtype | None, blank: bool) -> Adapter:
    weight = getattr(one.site.module, one.site.parameter)
    try:
        return method.build(
            one.shape,
            seed=_seed_of(seed, one.site.name),
            device=torch.device("meta") if blank else weight.device,
            dtype=dtype or _adapter_dtype(weight),
            layout=one.layout,
        )
    except ValueError as error:
        raise ValueError(f"{one.site.name}: {error}") from None


def _slot(one: Candidate) -> Slot:
    """Return the slot of a candidate, made and given to all modules that share it if it is the first adapter there."""
    key = one.site.name.rpartition(".")[2]
    slot = slots_of(one.site.module).get(key)
    if slot is None:
        slot = Slot(one.site.parameter, one.layout)
    for site in (one.site, *one.tied):
        swap_layer(site.module)
        if "adapters" not in site.module._modules:
            site.module.add_module("adapters", nn.ModuleDict())
        site.module._modules["adapters"]._modules[site.name.rpartition(".")[2]] = slot  # type: ignore[union-attr]
    return slot


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


def _adapter_dtype(weight: torch.Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32) if weight.is_floating_point() else torch.float32


def _freeze(model: nn.Module) -> None:
    modules = [module for _, module in named_base_modules(model)]
    trained = {id(module._parameters.get(name)) for module in modules for name in marked(module)}
    for module in modules:
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in trained:
                parameter.requires_grad_(False)
