"""Load adapters from a folder, strictly: everything is checked before the model is touched."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.adapter import SHARED, Adapter
from lightning_lora.candidates import Candidate, candidates
from lightning_lora.description import (
    check_description,
    layouts_of,
    methods_of,
    redrawn,
    shares_of,
    tied_of,
)
from lightning_lora.files import AdapterError, some
from lightning_lora.fingerprint import base_weights
from lightning_lora.fitting import check_computed_alike, fit_factors, fit_full_values
from lightning_lora.full_fingerprint import check_frozen_digests
from lightning_lora.inject import insert
from lightning_lora.injection_checks import check_task_name
from lightning_lora.layout import Layout
from lightning_lora.method import Method
from lightning_lora.reading import AdapterFile, read_adapters
from lightning_lora.saving import OUTSIDE
from lightning_lora.shared_tensors import join_shared, part_shared
from lightning_lora.sharing import tie
from lightning_lora.sites import Site, join, named_submodules, sites
from lightning_lora.state import mark_trained_in_full


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    task: str = "default",
    *,
    allow_base_mismatch: bool = False,
) -> list[Site]:
    """Inject and fill the adapters that a folder holds, written by this library or by PEFT.

    Everything is checked first; on an error the model is as it was. The adapters are put in use and may be trained on.
    What a LightningModule trained in full outside of its network is left out where only the network is given.

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
    available = {one.site.name: one for one in candidates(model)}
    targets: list[tuple[Candidate, Method]] = []
    values: dict[str, dict[str, Tensor]] = {}
    entries: dict[str, Tensor] = {}
    firsts: dict[str, str] = {}
    bare = False
    files, outside = read_adapters(path)
    for one in files:
        root = locate(one, available)
        file = one.with_order(root, available)
        bare |= bool(file.root) and not root
        chosen = [
            _described(
                available, join(root, name), file.layouts[name], [join(root, n) for n in file.tied[name]], file.path
            )
            for name in file.methods
        ]
        _check_device([one.site for one in chosen], file.path)
        check_computed_alike(file, chosen)
        again = [one.site.name for one in chosen if one.site.name in values]
        if again:
            raise AdapterError(f"{path}: two of its folders adapt {some(again)}: load one of them, such as {file.path}")
        if not allow_base_mismatch:
            check_base(file.path, [one.site for one in chosen], list(file.bases.values()))
            check_frozen_digests(file.path, model, root, file.weights)
        targets += zip(chosen, file.methods.values(), strict=True)
        values |= {one.site.name: factors for one, factors in zip(chosen, fit_factors(file, chosen), strict=True)}
        firsts |= {join(root, name): join(root, first) for name, first in file.shares.items()}
        weights = {name: one.site.weight for name, one in zip(file.methods, chosen, strict=True)}
        entries |= {join(root, name): value for name, value in fit_full_values(file, weights).items()}
    if outside is None and not bare:
        raise AdapterError(f"{path}: {OUTSIDE} is missing: copy it too, or load into the network alone")
    entries |= (outside or {}) if not bare else {}
    modules = named_submodules(model) if entries else {}
    for name, value in entries.items():
        _check_fits(modules, name, value, path)
    try:
        insert(model, targets, task, blank=True)
    except ValueError as error:
        raise AdapterError(f"{path}: {error}") from None
    tie(model, firsts, task)
    found = [site for site in sites(model, task) if site.name in values]
    with torch.no_grad():
        part_shared(model, task)
        for site in found:
            held = [site.weight] if site.weight is not None else site.module.parameters()
            _fill(site.adapter(task), values[site.name], next(one.device for one in held if not one.is_meta))
        join_shared(model, task)
        for name, value in entries.items():
            module, _, entry = name.rpartition(".")
            mark_trained_in_full(modules[module], [entry])
            getattr(modules[module], entry).copy_(value)
    return found


def _fill(adapter: Adapter, values: Mapping[str, Tensor], device: torch.device) -> None:
    """Give an adapter its values: as they are to one that has none yet, which was left on the meta device."""
    present = adapter.state_dict()
    if any(tensor.is_meta for tensor in present.values()):
        own = {name: _own(value.to(device, present[name].dtype)) for name, value in values.items()}
        adapter.load_state_dict(own, assign=True)
    else:
        drawn = {name: tensor for name, tensor in present.items() if name.startswith(SHARED)}
        adapter.load_state_dict(drawn | dict(values))


def _own(tensor: Tensor) -> Tensor:
    """Return a tensor that has its memory for itself: the same one if it has."""
    alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)


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
    absent = [name for name in methods if whole(name) not in available]
    if absent:
        raise AdapterError(
            f"{path}: it adapts {some(absent)}, which {type(model).__name__} does not have: build it as it was trained"
        )
    layouts, tied = layouts_of(described, path), tied_of(described)
    targets = [
        (_described(available, name, layouts[name], tied[name], path), method) for name, method in methods.items()
    ]
    if not allow_base_mismatch:
        check_base(path, [one.site for one, _ in targets], [v.get("base") for v in described["sites"].values()])
        check_frozen_digests(path, model, "", described.get("weights", {}))
    redrawn(described, path)
    insert(model, targets, described["task"])
    tie(model, shares_of(described), described["task"])
    modules = named_submodules(model)
    for name in described["trained_in_full"]:
        module, _, entry = name.rpartition(".")
        if module not in modules:
            raise AdapterError(
                f"{path}: it holds {name}, which {type(model).__name__} does not have: build it as it was trained"
            )
        mark_trained_in_full(modules[module], [entry])
    return sites(model, described["task"])


def locate(file: AdapterFile, available: Iterable[str]) -> str:
    """Return the name, inside a model, of the network that a file's adapters belong to.

    Args:
        file: The adapter file; where it was written is tried first.
        available: Names of the matrices that the model has.

    Raises:
        AdapterError: If no part of the model has all that the file adapts, or several have.
    """
    available = set(available)
    names = [whole(name) for name in file.methods]
    first = names[0]
    holders = sorted(name[: -len(first) - 1] for name in available if name.endswith(f".{first}"))
    fitting = [
        root
        for root in dict.fromkeys([file.root or "", "", *holders])
        if all(join(root, name) in available for name in names)
    ]
    if fitting and (len(fitting) == 1 or fitting[0] in (file.root, "")):
        return fitting[0]
    if fitting:
        raise AdapterError(
            f"{file.path}: the adapters fit {' and '.join(fitting)} alike: load them into that one, for example "
            f"load_adapter(model.{fitting[0]}, path)"
        )
    absent = [name for name in names if name not in available]
    raise AdapterError(
        f"{file.path}: the adapters belong to {some(absent)}, which the model does not have or which cannot be "
        "adapted: they were trained on another architecture"
    )


def whole(site: str) -> str:
    """Return the name of the parameter that a site is, or is a part of."""
    return site.partition("[")[0]


def _described(
    available: Mapping[str, Candidate], name: str, layout: Layout | None, tied: list[str], path: object
) -> Candidate:
    """Return the matrix that a file means, with its rows and ties, if the model's lies in the same way."""
    one = available[whole(name)]
    if layout is not None and layout.rows is not None:
        one = one.part(name.partition("[")[2].rstrip("]"), layout.rows)
    if layout is not None and layout != one.layout:
        raise AdapterError(
            f"{path}: {name} was trained as {layout}, but the model's is {one.layout}: another kind of layer"
        )
    if len(one.shape) > 1 and 0 in one.shape:
        raise AdapterError(
            f"{path}: {name} would be empty in this model, whose matrix has {available[whole(name)].shape[-2]} rows: "
            "it was trained on another architecture"
        )
    absent = [other for other in tied if whole(other) not in available]
    if absent:
        raise AdapterError(
            f"{path}: {name} shares its adapter with {some(absent)}, which the model does not have: it was trained on "
            "another architecture"
        )
    sites = [available[whole(other)].site for other in tied]
    if any(site.weight is not one.site.weight for site in sites):
        raise AdapterError(
            f"{path}: {name} was tied to {some(tied)}, and in this model it is not: tie them again first"
        )
    return one._replace(tied=tuple(site._replace(name=other) for site, other in zip(sites, tied, strict=True)))


def check_base(path: object, found: list[Site], bases: list[str | None]) -> None:
    """Raise ``AdapterError`` if a site's base weight is not the one that was fingerprinted; None means not known."""
    now = base_weights(found)
    other = [
        s.name
        for s, base in zip(found, bases, strict=True)
        if None not in (base, now[s.name].digest) and base != now[s.name].digest
    ]
    if other:
        raise AdapterError(
            f"{path}: trained on another base: {len(other)} of {len(found)} adapted weights differ ({some(other)}). "
            "Load the base that it was trained on, or pass allow_base_mismatch=True"
        )


def check_described_base(path: object, model: nn.Module, found: list[Site], described: Mapping[str, Any]) -> None:
    """Raise ``AdapterError`` if a checkpoint was trained on another base, as far as its description says.

    Args:
        path: For the message.
        model: The base, or the module that holds it.
        found: Its sites that the description has under the same names.
        described: The description.
    """
    check_base(path, found, [described["sites"][site.name].get("base") for site in found])
    check_frozen_digests(path, model, "", described.get("weights", {}))


def _check_device(found: list[Site], path: Path) -> None:
    absent = [site.name for site in found if site.weight is not None and site.weight.is_meta]
    if absent:
        raise AdapterError(f"{path}: {some(absent)} is on the meta device: give the base its values, then load")


def _check_fits(modules: Mapping[str, nn.Module], name: str, value: Tensor, path: Path) -> None:
    module, _, entry = name.rpartition(".")
    present = getattr(modules.get(module), entry, None)
    if not isinstance(present, Tensor):
        raise AdapterError(f"{path}: it holds {name}, which the model does not have")
    if present.shape != value.shape:
        raise AdapterError(f"{path}: {name} has shape {list(value.shape)}, the model's is {list(present.shape)}")
    if present.is_floating_point() != value.is_floating_point():
        raise AdapterError(f"{path}: {name} is stored as {value.dtype}, the model's is {present.dtype}")
