"""A base on the meta device, filled from safetensors files: each process reads its own shards alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.nn.modules.module import register_module_parameter_registration_hook

from lightning_lora.files import AdapterError, some
from lightning_lora.sites import added_modules, clean, join, sites


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Build modules without memory for their parameters; buffers, which files often lack, keep their values."""

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None  # as it is
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(without_memory)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


def fill_base(model: nn.Module, folders: Mapping[str, str], device: torch.device) -> None:
    """Give a model on the meta device memory, its adapters their start, and its base the values in files.

    Args:
        model: The model, divided already.
        folders: A folder of safetensors files by the name of the part that it is for; ``""`` is the whole model.
        device: Where shards go.

    Raises:
        AdapterError: If a part is not there or still has no values, or a file lacks one of its weights.
    """
    for site in sites(model):
        if any(parameter.is_meta for parameter in site.slot.parameters()):
            site.slot.to_empty(device=device)
    modules = {clean(name): module for name, module in model.named_modules()}
    for name, folder in folders.items():
        if name not in modules:
            raise AdapterError(f"base_weights={folder}: {type(model).__name__} has no part called {name!r}")
        _fill(modules[name], folder, device)
    _check_values(model.state_dict(keep_vars=True))


def _check_values(tensors: Mapping[str, Any]) -> None:
    empty = [clean(name) for name, tensor in tensors.items() if isinstance(tensor, Tensor) and tensor.is_meta]
    if empty:
        raise AdapterError(
            f"{some(empty)} has no values, and base_weights has no file for it: name the part that it is in; a buffer "
            "that files do not hold keeps its values where the base is built under parameters_on_meta()"
        )


def _fill(part: nn.Module, folder: str, device: torch.device) -> None:
    added = added_modules(part)
    _check_values(
        {
            join(prefix, name): module._buffers[name]
            for prefix, module in part.named_modules()
            for name in module._non_persistent_buffers_set
        }
    )
    names: dict[int, list[str]] = {}  # tied weights are in a file once, under any of their names
    tensors: dict[int, Tensor] = {}
    for prefix, module in part.named_modules():
        if id(module) in added:
            continue
        persistent = {name: b for name, b in module._buffers.items() if name not in module._non_persistent_buffers_set}
        if any(tensor is not None and tensor.is_meta for tensor in {**module._parameters, **persistent}.values()):
            module.to_empty(device=device, recurse=False)
        for name in {**module._parameters, **persistent}:
            tensor = getattr(module, name)
            if tensor is not None:
                names.setdefault(id(tensor), []).append(clean(join(prefix, name)))
                tensors[id(tensor)] = tensor.detach()
    if not list(Path(folder).glob("*.safetensors")):
        raise AdapterError(f"base_weights={folder}: there is no *.safetensors file in it")
    reader = HuggingFaceStorageReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    found = {key: next((name for name in known if name in stored), None) for key, known in names.items()}
    absent = [names[key][0] for key, name in found.items() if name is None]
    if absent:
        raise AdapterError(f"base_weights={folder}: its files lack {some(absent)}: give the folder of this base")
    load({name: tensors[key] for key, name in found.items() if name is not None}, storage_reader=reader)
