"""Work on adapter folders and weight files alone, without the model's class: inspect, merge, export."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from lightning_lora import peft_format
from lightning_lora.adapter import Adapter
from lightning_lora.analysis import effective_rank, singular_values
from lightning_lora.files import AdapterError, read_json, read_tensors, some
from lightning_lora.fingerprint import digest
from lightning_lora.fitting import fit_full_values, fit_to_weights
from lightning_lora.full_fingerprint import full_digest
from lightning_lora.layout import Layout
from lightning_lora.loading import locate, whole
from lightning_lora.peft_format import NO_METHOD, ONE_RANK, PARTS
from lightning_lora.peft_layers import LINEAR_FORMS, EmbeddingForm, Form
from lightning_lora.quantized import format_of
from lightning_lora.reading import AdapterFile, adapter_folders, read_adapter, read_adapters
from lightning_lora.report import shape_of
from lightning_lora.saving import CONFIG, OUTSIDE, WEIGHTS
from lightning_lora.sites import join
from lightning_lora.weight_files import aliases, read_weights, target_files, turned, weight_files, write_weights
from lightning_lora.whole_files import write_folder

Base = dict[str, dict[str, Tensor]]  # the state dict that holds each weight, by the weight's name


class SiteReport(NamedTuple):
    """One adapted matrix as ``inspect`` shows it."""

    site: str
    shape: str
    r: int
    alpha: float
    norm: float
    effective_rank: float


def inspect(path: Path) -> Iterator[tuple[AdapterFile, list[SiteReport]]]:
    """Yield each network of an adapter folder with a row per site.

    Raises:
        AdapterError: If the folder is not in order.
    """
    for file in map(read_adapter, adapter_folders(path)):
        rows = []
        unknown = {name: " or ".join(group) for group in file.siblings() for name in group}
        for name, group in unknown.items():
            if file.methods[name] != file.methods[group.partition(" or ")[0]]:
                raise AdapterError(
                    f"{file.path}: whose factors are whose of {group} is not in the files, and their ranks or scales "
                    "differ: load it into the model, with load_adapter"
                )
        for name in file.methods:
            adapter = _adapter(file, name)
            values = singular_values(adapter)
            method = adapter.method
            rows.append(
                SiteReport(
                    unknown.get(name, name),
                    shape_of(adapter),
                    method.r,
                    method.alpha,
                    float(values.norm()),
                    effective_rank(values),
                )
            )
        yield file, rows


def merge(adapter: Path, into: Path, out: Path, *, allow_base_mismatch: bool = False) -> list[Path]:
    """Write a copy of a base's weights with the adapters merged in.

    Args:
        adapter: The adapter folder.
        into: The base: a ``.ckpt``, ``.pt``, ``.pth``, ``.bin`` or ``.safetensors`` file, or a folder of safetensors
            files, whose other files are copied along.
        out: A new file, or a folder in which to write under the base's name.
        allow_base_mismatch: Merge although the base is not the one that the adapters were trained on.

    Returns:
        The weight files written.

    Raises:
        AdapterError: If the base has not all that the adapters change, or is another base.
        FileExistsError: If the result would replace a file.
    """
    files, outside = read_adapters(adapter)
    sources = weight_files(into)
    targets = target_files(into, sources, out)
    loaded = {source: read_weights(source) for source in sources}
    base = {key: state for state, _ in loaded.values() for key in state}
    tied = {key: others for state, _ in loaded.values() for key, others in aliases(state).items()}
    try:
        fitted = [_fitted(file, base, allow_base_mismatch) for file in files]
        if outside is None and not any(file.root and not root for root, file in fitted):
            raise AdapterError(
                f"{adapter}: {OUTSIDE} is missing: copy it too, or merge into the network's weights alone"
            )
        outside = outside or {}
        for root, file in fitted:
            weights = {name: base[key][key] for name in file.methods for key in [join(root, whole(name))]}
            outside |= {join(root, name): value for name, value in fit_full_values(file, weights).items()}
            _check_whole(root, file, base, tied)
        _put_full(outside, base)
    except AdapterError as error:
        raise AdapterError(f"{into}: {error}") from None
    for root, file in fitted:
        for name in file.methods:
            key = join(root, whole(name))
            base[key][key] = _merged(file, name, base[key][key])
            for other in (join(root, whole(other)) for other in file.tied[name]):
                if other in base:
                    base[other][other] = base[key][key].clone()
    for source, target in targets.items():
        write_weights(target, *loaded[source])
    if into.is_dir():
        for other_file in into.iterdir():
            if other_file.is_file() and other_file not in sources:
                shutil.copy2(other_file, out / other_file.name)
    return list(targets.values())


def _fitted(file: AdapterFile, base: Base, allow_base_mismatch: bool) -> tuple[str, AdapterFile]:
    """Return the name of a file's network among a base's weights, and the file with the layouts that these have."""
    root = locate(file, base)
    keys = {name: join(root, whole(name)) for name in file.methods}
    for key in keys.values():
        weight = base[key][key]
        if not weight.is_floating_point() or format_of(weight) is not None:
            raise AdapterError(
                f"{key} is packed ({type(weight).__name__} of {weight.dtype}), and only its model can unpack it: load "
                "both in Python and call merge_(dequantize_(model, dtype))"
            )
    sizes = {name: tuple(base[key][key].shape) for name, key in keys.items()}
    has_turned = any(turned(state) for state in {id(state): state for state in base.values()}.values())
    file = fit_to_weights(file, sizes, has_turned=has_turned)
    if not allow_base_mismatch:
        other = [key for name, key in keys.items() if file.bases[name] not in (None, digest(base[key][key]))]
        frozen = {join(root, name): expected for name, expected in file.weights.items()}
        other += [key for key, one in frozen.items() if key in base and full_digest(base[key][key]) != one]
        if other:
            raise AdapterError(
                f"{other[0]} is not what {file.path} was trained on: give that base, or --allow_base_mismatch"
            )
    return root, file


def _check_whole(root: str, file: AdapterFile, base: Base, tied: Mapping[str, list[str]]) -> None:
    """Raise ``AdapterError`` if a base lacks what is trained in full, or merging would change a tied weight as well."""
    absent = [join(root, name) for name in file.full if join(root, name) not in base]
    if absent:
        raise AdapterError(
            f"it has no {some(absent)}, which {file.path} has trained in full: give the base that it was trained on"
        )
    for name in file.methods:
        key, also = join(root, whole(name)), [join(root, whole(other)) for other in file.tied[name]]
        names = dict.fromkeys([*(join(root, other) for other in file.tied_to[name]), *tied.get(key, [])])
        alone = [other for other in names if other not in also]
        if alone:
            raise AdapterError(
                f"{key} is tied to {some(alone)}, which would change with it: merge it in the model, with merge_, "
                "after untying them"
            )


def _put_full(values: Mapping[str, Tensor], base: Base) -> None:
    """Put what is trained in full into a base, as far as it is there: a network may come without what is around it."""
    for key, value in values.items():
        if key in base and value.shape != base[key][key].shape:
            raise AdapterError(
                f"{key} has shape {list(base[key][key].shape)}, but was trained as {list(value.shape)}: give the base "
                "that it was trained on"
            )
        if key in base:
            base[key][key] = value


@torch.no_grad()
def _whole_changes(file: AdapterFile) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the scaled up (out, r) and the down (r, in) of each matrix, those of its parts put together."""
    changes: dict[str, tuple[Tensor, Tensor]] = {}
    for name in file.methods:
        adapter = _adapter(file, name)
        if adapter.needs_weight:
            raise AdapterError(
                f"{file.path} has no portable form: what {type(adapter.method).__name__} adds depends on the base's "
                "weight; merge it into the base instead, or give the folder to PEFT as it is"
            )
        up, down = adapter.factors()
        used = (down != 0).any(-1)  # AdaLoRA's masked triplets are left out
        up, down = adapter.scaling * up[:, used], down[used]
        layout, size = file.layouts[name], file.sizes[name]
        if layout is not None and layout.rows is not None and size is not None:
            blank = up.new_zeros(dataclasses.replace(layout, rows=None).shape(size)[0], up.shape[1])
            up = blank.index_copy(0, torch.arange(*layout.rows), up)
        before = changes.get(whole(name))
        changes[whole(name)] = (
            (up, down) if before is None else (torch.cat([before[0], up], 1), torch.cat([before[1], down]))
        )
    return changes


@torch.no_grad()
def _merged(file: AdapterFile, name: str, weight: Tensor) -> Tensor:
    """Return a base's weight with a site's adapter in it."""
    layout = file.layouts[name] or Layout()
    adapter = _adapter(file, name, torch.promote_types(weight.dtype, torch.float32))
    changed = weight.clone(memory_format=torch.contiguous_format)
    adapter.write(layout.matrix(changed))
    return changed


def _adapter(file: AdapterFile, name: str, dtype: torch.dtype = torch.float32) -> Adapter:
    """Return a site's adapter, rebuilt from the file alone."""
    layout, size = file.layouts[name], file.sizes[name]
    try:
        if layout is not None and size is not None:
            shape = layout.shape(size)
        elif "lora_A" not in file.stored[name].form.ends:
            raise AdapterError(
                f"{file.path}: PEFT's files do not hold the size of {name}: load it into the model, with load_adapter, "
                "and save it from there, with save_adapter"
            )
        else:
            shape = (*file.factor(name, "lora_B").shape[:-1], file.factor(name, "lora_A").shape[-1])
        meta = torch.device("meta")
        layout = layout or Layout(looked_up=issubclass(file.stored[name].form, EmbeddingForm))
        method = file.methods[name]
        adapter = method.build(shape, seed=0, device=meta, dtype=dtype, layout=layout)
        method.attach({name: adapter})
        values = {factor: tensor.to(dtype) for factor, tensor in file.factors(name, adapter).items()}
        adapter.load_state_dict(values, assign=True)
    except AdapterError:
        raise
    except (RuntimeError, IndexError, TypeError, ValueError):  # sizes that cannot be
        raise AdapterError(
            f"{file.path}: the factors of {name} have no shapes of an adapter with r={file.methods[name].r}: copy or "
            "save the folder again"
        ) from None
    return adapter


def export(adapter: Path, out: Path) -> list[str]:
    """Write an adapter in the portable form that every reader of PEFT's format computes alike.

    All ranks are padded with zeros to the largest, the scale is folded into B, alpha equals r, and modules are listed
    by their full names, without patterns. Adapters of parts of one matrix become one of the sum of their ranks. What is
    low-rank by a method that PEFT does not have becomes plain LoRA.

    Args:
        adapter: The adapter folder.
        out: The folder to write.

    Returns:
        Notes on what some readers will refuse.

    Raises:
        AdapterError: If there are several networks in the folder, something else than linear layers is adapted, or the
            change is not low-rank.
        FileExistsError: If ``out`` exists.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists: give a new folder")
    folders = adapter_folders(adapter)
    if len(folders) > 1:
        raise AdapterError(f"{adapter} holds {len(folders)} networks: export one of {', '.join(map(str, folders))}")
    file = read_adapter(folders[0])
    fields = read_json(folders[0] / CONFIG)
    reasons = [] if file.not_for_peft is None else file.not_for_peft.split("; ")
    if not all(reason.startswith((NO_METHOD, PARTS, ONE_RANK)) for reason in reasons):
        raise AdapterError(f"{adapter} has no portable form: {file.not_for_peft}; merge it into the base instead")
    for name, form in file.forms.items():
        if (
            form not in LINEAR_FORMS
            or ".base_layer." in file.stored[name].owner
            or whole(name).endswith(".in_proj_weight")
        ):
            raise AdapterError(
                f"{adapter} has no portable form: {name} is not the weight of a linear layer; merge it into the base "
                "instead, or give the folder to PEFT as it is"
            )
    changes = _whole_changes(file)
    rank = max(1, *(down.shape[0] for _, down in changes.values()))
    places, full = peft_format.places(dict.fromkeys(changes, Form), {}, file.full)
    tensors = {full[name]: value for name, value in file.full_values().items()}
    for name, (up, down) in changes.items():
        pad = rank - down.shape[0]
        tensors[places[name].key("lora_A")] = torch.nn.functional.pad(down, (0, 0, 0, pad))
        tensors[places[name].key("lora_B")] = torch.nn.functional.pad(up, (0, pad))
    portable = {"r": rank, "lora_alpha": rank, "use_rslora": False, "lora_dropout": 0.0}
    kept = ("target_modules", "exclude_modules", "modules_to_save", "bias", "base_model_name_or_path")
    config = {key: fields.get(key) for key in kept}
    config["fan_in_fan_out"] = file.fan_in_fan_out or any(one and one.transposed for one in file.layouts.values())
    config |= {"peft_type": "LORA", "inference_mode": True, "rank_pattern": {}, "alpha_pattern": {}, **portable}
    weights = safetensors.torch.save({k: t.contiguous().clone() for k, t in tensors.items()}, {"format": "pt"})
    write_folder(out, {WEIGHTS: weights, CONFIG: json.dumps(config, indent=2, sort_keys=True).encode()})
    notes = []
    if file.full:
        notes.append(f"{', '.join(sorted(file.full))}: trained in full, which vLLM and llama.cpp refuse")
    if (adapter / OUTSIDE).exists():
        outside = sorted(read_tensors(adapter / OUTSIDE)[0])
        notes.append(f"{', '.join(outside)}: outside of the network, so not exported")
    return notes
