"""Work on adapter folders and weight files alone, without the model's class: inspect, merge, export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lightning_lora import peft_format
from lightning_lora.adapter import Adapter
from lightning_lora.analysis import effective_rank, singular_values
from lightning_lora.description import digest
from lightning_lora.files import AdapterError, read_tensors, write_file, write_folder
from lightning_lora.layout import Layout
from lightning_lora.loading import locate, whole
from lightning_lora.method import Method
from lightning_lora.quantized import format_of
from lightning_lora.reading import AdapterFile, adapter_folders, read_adapter
from lightning_lora.report import shape_of
from lightning_lora.saving import CONFIG, OUTSIDE, WEIGHTS
from lightning_lora.sites import join


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
        for name, adapter in _adapters(file):
            values = singular_values(adapter)
            method = adapter.method
            rows.append(
                SiteReport(
                    name, shape_of(adapter), method.r, method.alpha, float(values.norm()), effective_rank(values)
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
    files = [read_adapter(folder) for folder in adapter_folders(adapter)]
    outside = read_tensors(adapter / OUTSIDE)[0] if (adapter / OUTSIDE).exists() else {}
    sources = _weight_files(into)
    targets = _targets(into, sources, out)
    loaded = {source: _read_weights(source) for source in sources}
    holder = {key: source for source, (state, _) in loaded.items() for key in state}
    for file in files:
        try:
            prefix = locate(file, holder)
        except AdapterError as error:
            raise AdapterError(f"{into}: {error}") from None
        for name, site in _adapters(file):
            key = join(prefix, whole(name))
            state = loaded[holder[key]][0]
            layout = file.layouts[name] or Layout()
            if not state[key].is_floating_point() or format_of(state[key]) is not None:
                raise AdapterError(
                    f"{into}: {key} is packed ({type(state[key]).__name__} of {state[key].dtype}), and only its model "
                    "can unpack it: load both in Python and call merge_(dequantize_(model, dtype))"
                )
            if not allow_base_mismatch and file.bases[name] not in (None, digest(state[key])):
                raise AdapterError(
                    f"{into}: {key} is not what {adapter} was trained on: give that base, or --allow_base_mismatch"
                )
            with torch.no_grad():
                state[key] = layout.put(state[key], site.adapted(layout.matrix(state[key])))
        outside |= {join(prefix, name): value for name, value in file.full_values().items()}
    for key, value in outside.items():
        if key in holder:
            loaded[holder[key]][0][key] = value
    for source, target in targets.items():
        state, container = loaded[source]
        _write_weights(target, state, container)
    if into.is_dir():
        for other in into.iterdir():
            if other.is_file() and other not in sources:
                shutil.copy2(other, out / other.name)
    return list(targets.values())


def export(adapter: Path, out: Path) -> list[str]:
    """Write an adapter in the portable form that every reader of PEFT's format computes alike.

    All ranks are padded with zeros to the largest, the scale is folded into B, alpha equals r, and modules are listed
    by their full names, without patterns.

    Args:
        adapter: The adapter folder.
        out: The folder to write.

    Returns:
        Notes on what some readers will refuse.

    Raises:
        AdapterError: If there are several networks in the folder, or PEFT has no name for what is adapted.
        FileExistsError: If ``out`` exists.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists: give a new folder")
    folders = adapter_folders(adapter)
    if len(folders) > 1:
        raise AdapterError(f"{adapter} holds {len(folders)} networks: export one of {', '.join(map(str, folders))}")
    file = read_adapter(folders[0])
    fields = json.loads((folders[0] / CONFIG).read_bytes())
    if fields.get("peft_type") == peft_format.OWN_TYPE:
        raise AdapterError(f"{adapter}: PEFT's format cannot express it; merge it into the base instead")
    rank = max(method.r for method in file.methods.values())
    tensors = {name: file.tensors[name] for name in peft_format.full_entries(file.tensors)}
    with torch.no_grad():
        for name, site in _adapters(file):
            up, down = (factor.float() for factor in site.factors())
            pad = rank - down.shape[0]
            tensors[file.factor(name, "lora_A")] = torch.nn.functional.pad(down, (0, 0, 0, pad))
            tensors[file.factor(name, "lora_B")] = torch.nn.functional.pad(site.scaling * up, (0, pad))
    portable = {"r": rank, "lora_alpha": rank, "use_rslora": False, "lora_dropout": 0.0}
    kept = ("target_modules", "exclude_modules", "modules_to_save", "bias", "base_model_name_or_path")
    config = {key: fields.get(key) for key in kept}
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


def _adapters(file: AdapterFile) -> Iterator[tuple[str, Adapter]]:
    """Yield each site's adapter, rebuilt from the file alone."""
    for name, method in file.methods.items():
        yield name, _adapter(file, name, method)


def _adapter(file: AdapterFile, name: str, method: Method) -> Adapter:
    keys = {factor: file.factor(name, factor) for factor in ("lora_A", "lora_B")}
    absent = [key for key in keys.values() if key not in file.tensors]
    if absent:
        raise AdapterError(f"{file.path}: {absent[0]} is missing")
    values = {factor: file.tensors[key] for factor, key in keys.items()}
    shape = (*values["lora_B"].shape[:-1], values["lora_A"].shape[-1])
    adapter = method.build(shape, seed=0, device=torch.device("cpu"), dtype=values["lora_A"].dtype)
    try:
        adapter.load_state_dict(values)
    except RuntimeError as error:
        raise AdapterError(f"{file.path}: {name}: {error}") from None
    return adapter


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = sorted(path.glob("*.safetensors"))
    if not found:
        raise AdapterError(f"{path}: no such file, or a folder without .safetensors files")
    return found


def _targets(into: Path, sources: list[Path], out: Path) -> dict[Path, Path]:
    to_folder = into.is_dir() or not out.suffix or out.is_dir()
    targets = {source: out / source.name if to_folder else out for source in sources}
    present = [target for target in targets.values() if target.exists()]
    if present:
        raise FileExistsError(f"{present[0]} exists: give another --out")
    return targets


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Return the tensors of a weight file, and the checkpoint around them if there is one."""
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path), None
        except (safetensors.SafetensorError, OSError) as error:
            raise AdapterError(f"{path}: damaged or not a safetensors file: {error}") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged or unsafe file
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise AdapterError(f"{path}: not readable as plain weights: {reason}") from None
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise AdapterError(f"{path}: holds no state dict")
    return dict(state), content if state is not content else None


def _write_weights(path: Path, state: dict[str, Tensor], container: dict[str, Any] | None) -> None:
    if path.suffix == ".safetensors":
        whole = {key: tensor.contiguous() for key, tensor in state.items()}
        write_file(path, lambda file: file.write(safetensors.torch.save(whole, {"format": "pt"})))
        return
    training = ("optimizer_states", "lr_schedulers")  # they belong to the base's own training, not to merged weights
    kept = {key: value for key, value in (container or {}).items() if key not in training}
    content = {**kept, "state_dict": state} if container is not None else state
    write_file(path, lambda file: torch.save(content, file))
