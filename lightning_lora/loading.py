"""Load adapters from a folder, strictly: everything is checked before the model is touched."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora import peft_format
from lightning_lora.description import check_description, fingerprint, methods_of
from lightning_lora.files import AdapterError, parse_json, read_tensors
from lightning_lora.inject import check_task_name, insert
from lightning_lora.method import Method
from lightning_lora.saving import CONFIG, OUTSIDE, WEIGHTS
from lightning_lora.sites import Site, join, named_submodules, sites
from lightning_lora.state import mark_trained_in_full
from lightning_lora.targets import Candidate, candidates


class _Part(NamedTuple):
    """One network's adapters as read from a file."""

    path: Path
    root: str
    methods: dict[str, Method]
    bases: dict[str, str | None]
    full: set[str]
    tensors: dict[str, Tensor]


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    task: str = "default",
    *,
    allow_base_mismatch: bool = False,
) -> list[Site]:
    """Inject and fill the adapters that a folder holds, written by this library or by PEFT.

    Everything is checked first; on an error the model is as it was. The adapters are put in use and may be trained on.

    Args:
        model: The base: the network that the names are relative to, or a LightningModule that holds it.
        path: The folder.
        task: The name to give the adapters here.
        allow_base_mismatch: Load although the base is not the one that the adapters were trained on.

    Returns:
        The sites.

    Raises:
        AdapterError: If the folder and the model do not fit in any way; the message says how.
    """
    check_task_name(task)
    path = Path(path)
    parts = [_read_part(model, folder) for folder in _folders(path)]
    available = {one.site.name: one for one in candidates(model)}
    targets: list[tuple[Candidate, Method]] = []
    for part in parts:
        names = [join(part.root, name) for name in part.methods]
        absent = [name for name in names if name not in available]
        if absent:
            raise AdapterError(f"{part.path}: {some(absent)} cannot be adapted in {type(model).__name__}")
        chosen = [available[name] for name in names]
        if not allow_base_mismatch:
            check_base(part.path, [one.site for one in chosen], list(part.bases.values()))
        targets += zip(chosen, part.methods.values(), strict=True)
    entries: dict[str, Tensor] = {}
    for part in parts:
        entries |= _full_values(model, part)
    entries |= _read_outside(model, path / OUTSIDE)
    values = _factor_values(model, parts, available)
    try:
        insert(model, targets, task)
    except ValueError as error:
        raise AdapterError(f"{path}: {error}") from None
    found = [site for site in sites(model, task) if site.name in values]
    modules = named_submodules(model)
    with torch.no_grad():
        for site in found:
            site.adapter(task).load_state_dict(values[site.name])
        for name, value in entries.items():
            module, _, entry = name.rpartition(".")
            owner = modules[module]
            mark_trained_in_full(owner, [entry])
            getattr(owner, entry).copy_(value)
    return found


def adopt(
    model: nn.Module, described: Mapping[str, Any], path: object, *, allow_base_mismatch: bool = False
) -> list[Site]:
    """Inject what the description in a checkpoint says, and mark what was trained in full; values are left to load.

    Args:
        model: The base, named as it was when the checkpoint was written.
        described: The checkpoint's own section.
        path: For messages.
        allow_base_mismatch: As for ``load_adapter``.

    Raises:
        AdapterError: If the model is another one.
    """
    check_description(described, path)
    methods = methods_of(described, path)
    available = {one.site.name: one for one in candidates(model)}
    absent = [name for name in methods if name not in available]
    if absent:
        raise AdapterError(f"{path}: it adapts {some(absent)}, which {type(model).__name__} does not have")
    targets = [(available[name], method) for name, method in methods.items()]
    if not allow_base_mismatch:
        check_base(path, [one.site for one, _ in targets], [v.get("base") for v in described["sites"].values()])
    insert(model, targets, described["task"])
    modules = named_submodules(model)
    for name in described["trained_in_full"]:
        module, _, entry = name.rpartition(".")
        if module not in modules:
            raise AdapterError(f"{path}: it holds {name}, which {type(model).__name__} does not have")
        mark_trained_in_full(modules[module], [entry])
    return sites(model, described["task"])


def check_same(
    model: nn.Module, described: Mapping[str, Any], path: object, *, allow_base_mismatch: bool = False
) -> None:
    """Raise ``AdapterError`` unless a checkpoint's description fits the adapters that the model has.

    Args:
        model: The adapted model.
        described: The checkpoint's own section.
        path: For the message.
        allow_base_mismatch: Leave the base's fingerprint out.
    """
    check_description(described, path)
    theirs = methods_of(described, path)
    task = described["task"]
    ours = {site.name: site.adapter(task).method for site in sites(model, task)}
    missing, extra = [n for n in theirs if n not in ours], [n for n in ours if n not in theirs]
    if missing or extra:
        raise AdapterError(
            f"{path}: it adapts other matrices than this run: only in the checkpoint: {some(missing) or 'none'}; "
            f"only here: {some(extra) or 'none'}. Use the target_modules that it was trained with"
        )
    for name, method in theirs.items():
        if method != ours[name]:
            raise AdapterError(f"{path}: {name} was trained with {method}, but this run has {ours[name]}")
    if not allow_base_mismatch:
        found = sites(model, task)
        check_base(path, found, [described["sites"][site.name].get("base") for site in found])


def _folders(path: Path) -> list[Path]:
    if path.is_file():
        raise AdapterError(f"{path} is a file: give the adapter folder that holds {WEIGHTS}")
    if (path / WEIGHTS).is_file():
        return [path]
    inner = sorted(file.parent for file in path.glob(f"*/{WEIGHTS}"))
    inner += sorted(file.parent for file in path.glob(f"*.*/{WEIGHTS}") if file.parent not in inner)
    if not inner:
        pickle = next((name for name in ("adapter_model.bin", "adapter_model.pt") if (path / name).exists()), None)
        hint = f"; {pickle} is a pickle, which could run code: convert it to safetensors first" if pickle else ""
        raise AdapterError(f"{path}: no {WEIGHTS} in this folder{hint}")
    return inner


def read_description(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Return a folder's tensors and our description of them, None if another library wrote it.

    Raises:
        AdapterError: If a file is damaged or its description is not in order.
    """
    tensors, described = read_tensors(path / WEIGHTS)
    if described is not None:
        check_description(described, path)
    return tensors, described


def _read_part(model: nn.Module, folder: Path) -> _Part:
    tensors, described = read_description(folder)
    modules = peft_format.module_names(tensors)
    root = locate(model, modules, (described or {}).get("root"), folder)
    network = named_submodules(model)[root]
    if described is None:
        config = folder / CONFIG
        if not config.is_file():
            raise AdapterError(f"{folder}: no {CONFIG} beside {WEIGHTS}")
        methods = peft_format.site_values(parse_json(config.read_bytes(), config), tensors, network, folder)
        full = set(peft_format.full_entries(tensors).values())
        return _Part(folder, root, methods, dict.fromkeys(methods), full, tensors)
    bases = {name: values.get("base") for name, values in described["sites"].items()}
    return _Part(folder, root, methods_of(described, folder), bases, set(described["trained_in_full"]), tensors)


def locate(model: nn.Module, modules: set[str], hint: str | None, path: object) -> str:
    """Return the name, inside ``model``, of the network that all these modules are in.

    Args:
        model: The network, or something that holds it.
        modules: Names relative to the network.
        hint: Where it was when the adapters were written.
        path: For the message.

    Raises:
        AdapterError: If no part of the model has them all.
    """
    names = set(named_submodules(model))
    roots = [root for root in ([hint] if hint is not None else []) if root in names or not root]
    roots += ["", *sorted(names - {""}, key=lambda name: (name.count("."), name))]
    wanted = {_module_of(name) for name in modules}
    for root in roots:
        if all(join(root, name) in names for name in wanted):
            return root
    absent = sorted(name for name in wanted if name not in names)
    raise AdapterError(
        f"{path}: the adapters belong to {some(absent)}, which {type(model).__name__} does not have; "
        "it was trained on another architecture"
    )


def _module_of(name: str) -> str:
    """Return the module of a name that may end in a parameter, as separate attention projections do."""
    module, _, last = name.rpartition(".")
    return module if last.endswith("_proj_weight") else name


def check_base(path: object, found: list[Site], bases: list[str | None]) -> None:
    """Raise ``AdapterError`` if a site's base weight is not the one that was fingerprinted; None means not known."""
    now = fingerprint(found)
    other = [
        s.name for s, base in zip(found, bases, strict=True) if None not in (base, now[s.name]) and base != now[s.name]
    ]
    if other:
        raise AdapterError(
            f"{path}: trained on another base: {len(other)} of {len(found)} adapted weights differ ({some(other)}). "
            "Load the base that it was trained on, or pass allow_base_mismatch=True"
        )


def _factor_values(
    model: nn.Module, parts: list[_Part], available: Mapping[str, Candidate]
) -> dict[str, dict[str, Tensor]]:
    """Return each site's factors after checking that every expected tensor is there in its shape, and no other."""
    values: dict[str, dict[str, Tensor]] = {}
    for part in parts:
        network = named_submodules(model)[part.root]
        used = set(peft_format.full_entries(part.tensors))
        for name, method in part.methods.items():
            shape = available[join(part.root, name)].shape
            blueprint = method.build(shape, seed=0, device=torch.device("meta"), dtype=torch.float32).state_dict()
            factors: dict[str, Tensor] = {}
            for factor, expected in blueprint.items():
                key = peft_format.tensor_name(network, name, factor)
                tensor = part.tensors.get(key)
                if tensor is None:
                    raise AdapterError(f"{part.path}: {key} is missing")
                if tensor.shape != expected.shape:
                    raise AdapterError(
                        f"{part.path}: {key} has shape {list(tensor.shape)}, but {list(expected.shape)} is expected: "
                        f"r={method.r} on a {shape[0]} x {shape[1]} matrix"
                    )
                if not tensor.is_floating_point():
                    raise AdapterError(f"{part.path}: {key} is stored as {tensor.dtype}, not as floating point")
                used.add(key)
                factors[factor] = tensor
            values[join(part.root, name)] = factors
        extra = sorted(set(part.tensors) - used)
        if extra:
            raise AdapterError(f"{part.path}: it holds tensors that belong to no adapted module: {some(extra)}")
    return values


def _full_values(model: nn.Module, part: _Part) -> dict[str, Tensor]:
    found = {name: part.tensors[key] for key, name in peft_format.full_entries(part.tensors).items()}
    if set(found) != part.full:
        raise AdapterError(f"{part.path}: entries trained in full are {some(sorted(set(found) ^ part.full))} off")
    return {
        join(part.root, name): _fitting(model, join(part.root, name), value, part.path) for name, value in found.items()
    }


def _read_outside(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """Return what is trained in full outside of the network, where the model has such modules."""
    if not path.exists():
        return {}
    tensors, _ = read_tensors(path)
    here = named_submodules(model)
    return {n: _fitting(model, n, value, path) for n, value in tensors.items() if n.rpartition(".")[0] in here}


def _fitting(model: nn.Module, name: str, value: Tensor, path: Path) -> Tensor:
    module, _, entry = name.rpartition(".")
    present = getattr(named_submodules(model).get(module), entry, None)
    if not isinstance(present, Tensor):
        raise AdapterError(f"{path}: it holds {name}, which {type(model).__name__} does not have")
    if present.shape != value.shape:
        raise AdapterError(f"{path}: {name} has shape {list(value.shape)}, the model's is {list(present.shape)}")
    return value


def some(names: list[str]) -> str:
    """Return the first five names as text."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
