"""Save adapters to a folder.

The safetensors file is the truth: its header carries the method, the sites, a fingerprint of the base and a checksum.
``adapter_config.json`` is derived from it, for PEFT and those who read PEFT's format.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_lora import peft_format
from lightning_lora.adapter import stored_factors
from lightning_lora.description import describe
from lightning_lora.files import SCHEMA, AdapterError, is_finite, some, to_bytes
from lightning_lora.fingerprint import base_weights
from lightning_lora.full_fingerprint import Fingerprint, check_fingerprint, frozen_digests
from lightning_lora.merge import check_not_merged
from lightning_lora.sites import BaseWeight, Site, clean, join, named_submodules, relative, sites, tied_names
from lightning_lora.state import own_entries, own_state_dict, trained_in_full
from lightning_lora.whole_files import write_folder

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
OUTSIDE = "trained_in_full.safetensors"
SAVE = "save"  # the field that all files of one folder have alike, where there are several


def save_adapter(
    model: nn.Module, path: str | os.PathLike[str], task: str = "default", *, fingerprint: Fingerprint = "sampled"
) -> None:
    """Write the adapters of a task, and what is trained in full with them, as a folder in PEFT's format.

    The folder is replaced as a whole. Names in it are relative to the network inside a LightningModule; where adapters
    are in several networks, each gets a folder of its own inside this one.

    Args:
        model: The adapted model.
        path: The folder.
        task: The task to write.
        fingerprint: How a later load knows the base: by samples of the adapted weights, or, with ``full``, by every
            value of every frozen weight. That costs reading the base once at each save and each load.

    Raises:
        ValueError: If the model has no such task.
        RuntimeError: If the adapters are merged.
        FileExistsError: If the folder holds files that are no adapter's, which would be lost.
        AdapterError: If the adapters, or what is trained in full, are not finite.
    """
    check_fingerprint(fingerprint)
    check_not_merged(model, "save")
    for _, _, files in os.walk(path):
        others = [file for file in files if file not in (WEIGHTS, CONFIG, OUTSIDE)]
        if others:
            raise FileExistsError(f"{path} holds other files, such as {others[0]}: give the adapter its own folder")
    state = _state(model)
    check_finite(model, state, path)
    digests = frozen_digests(model) if fingerprint == "full" else {}
    write_folder(path, folder_contents(model, state, task, base_weights(sites(model, task)), digests))


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Return our entries of the state dict, of a whole one where hooks have a say in it, as those of the first FSDP."""
    if any(m._state_dict_hooks or m._state_dict_pre_hooks for m in model.modules()):
        ours = own_entries(model)
        return {name: tensor for name, tensor in model.state_dict().items() if name in ours}
    return own_state_dict(model)


def check_finite(model: nn.Module, state: Mapping[str, Tensor], path: object) -> None:
    """Raise ``AdapterError`` if trained parameters are not finite: such a save would take the place of a good one.

    Args:
        model: The adapted model.
        state: Our entries of its state dict, or of a checkpoint's. Its buffers may hold anything.
        path: For the message.
    """
    trained = {clean(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    broken = [name for name, value in state.items() if clean(name) in trained and not is_finite(value)]
    if broken:
        raise AdapterError(
            f"{path}: not written, because {len(broken)} trained parameters are not finite: {some(broken)}. The run "
            "diverged: go on from the last save, with a lower learning rate or gradient_clip_val"
        )


def folder_contents(
    model: nn.Module,
    state: Mapping[str, Tensor],
    task: str,
    bases: Mapping[str, BaseWeight],
    digests: Mapping[str, str],
) -> dict[str, bytes]:
    """Return the files of an adapter folder, by relative path.

    Args:
        model: The adapted model, for its names.
        state: Our entries of its state dict, or of a checkpoint's.
        task: The task to write.
        bases: The `base_weights` of the task's sites.
        digests: The `frozen_digests` of the model, or nothing.

    Raises:
        ValueError: If the model has no such task.
    """
    state = {clean(name): tensor for name, tensor in state.items()}
    found = sites(model, task)
    if not found:
        known = sorted({name for site in sites(model) for name in site.slot})
        raise ValueError(f"task={task!r}: the model has no adapter of that name to save; it has {known}")
    full = {name for name in trained_in_full(model) if name in state}
    roots = _roots(model, [site.name for site in found])
    files: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {}
    configs: dict[str, bytes] = {}
    for root in sorted(set(roots.values())):
        inside = {site.name: site for site in found if roots[site.name] == root}
        full_inside = {relative(name, root) for name in full if _innermost(name, roots.values()) == root}
        folder = f"{root or '_'}/" if len(set(roots.values())) > 1 else ""
        config, tensors, described = _network(model, root, inside, full_inside, state, task, bases)
        if digests:
            inner = {relative(name, root): digest for name, digest in digests.items() if _is_in(name, root)}
            described["weights"] = inner
        configs[folder + CONFIG] = json.dumps(config, indent=2, sort_keys=True).encode()
        files[folder + WEIGHTS] = tensors, described
    outside = {name: state[name] for name in full if _innermost(name, roots.values()) is None}
    if outside:
        files[OUTSIDE] = outside, {"schema": SCHEMA, "task": task, "trained_in_full": sorted(outside)}
    if len(files) > 1:
        every = hashlib.sha256(b"".join(to_bytes(*files[name]) for name in sorted(files))).hexdigest()[:16]
        save = {"digest": every, "files": sorted(files)}
        files = {name: (tensors, described | {SAVE: save}) for name, (tensors, described) in files.items()}
    return configs | {name: to_bytes(*file) for name, file in files.items()}


def _network(
    model: nn.Module,
    root: str,
    inside: Mapping[str, Site],
    full: set[str],
    state: Mapping[str, Tensor],
    task: str,
    bases: Mapping[str, BaseWeight],
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Return one network's config for PEFT, its tensors and their description."""
    network = named_submodules(model)[root]
    described = describe(model, list(inside.values()), task, root, full, bases)
    found = {relative(name, root): site for name, site in inside.items()}
    methods = {name: site.adapter(task).method for name, site in found.items()}
    tied = {relative(name, root) for name, others in tied_names(model).items() if others}
    reasons = {name: site.adapter(task).why_not_peft() for name, site in found.items()}
    expressed = peft_format.express(network, found, methods, tied, full, reasons)
    if expressed.reason is not None:
        described["not_for_peft"] = expressed.reason
    for name, form in expressed.forms.items():
        described["sites"][name]["form"] = form
    for name, level in expressed.levels.items():
        described["sites"][name]["level"] = level
    tensors: dict[str, Tensor] = {}
    for name, site in found.items():
        if expressed.reason is not None and described["sites"][name].get("shares", name) != name:
            continue  # it is read where it is shared from; only PEFT needs copies
        module, _, key = site.name.rpartition(".")
        size = tuple(described["sites"][name]["size"])
        stored, adapter = expressed.stored[name], site.adapter(task)
        live = {factor: state[join(module, "adapters", key, task, factor)] for factor in stored_factors(adapter)}
        for factor, tensor in stored.form.written(adapter.method, live).items():
            tensors[stored.key(factor)] = stored.form.stored(factor, tensor, size)
    for name, key in expressed.full.items():
        tensors[key] = state[join(root, name)]
    return expressed.config, tensors, described


def _roots(model: nn.Module, names: list[str]) -> dict[str, str]:
    """Return, for each site, the name of the network that it belongs to."""
    pretrained: list[str] = []
    for raw, module in model.named_modules():
        if hasattr(type(module), "save_pretrained") and hasattr(module, "config"):
            name = clean(raw)
            if not any(_is_in(name, root) for root in pretrained):
                pretrained.append(name)
    found = {name: root for name in names for root in pretrained if _is_in(name, root)}
    rest = [name for name in names if name not in found]
    first = {name.partition(".")[0] for name in rest}
    trained_by_a_trainer = hasattr(model, "training_step") and hasattr(model, "configure_optimizers")
    one = trained_by_a_trainer and len(first) == 1 and all(name.count(".") > 1 for name in rest)
    return found | dict.fromkeys(rest, first.pop() if one else "")


def _innermost(name: str, roots: Iterable[str]) -> str | None:
    """Return the longest of the roots that a name is in."""
    return max((root for root in roots if _is_in(name, root)), key=len, default=None)


def _is_in(name: str, root: str) -> bool:
    return not root or name == root or name.startswith(f"{root}.")
