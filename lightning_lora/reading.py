"""Read an adapter folder, without a model: what is in it, checked as far as the files alone allow."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from lightning_lora import peft_format
from lightning_lora.description import check_description, layouts_of, methods_of, tied_of
from lightning_lora.files import AdapterError, parse_json, read_tensors
from lightning_lora.layout import Layout
from lightning_lora.method import Method
from lightning_lora.saving import CONFIG, WEIGHTS


class AdapterFile(NamedTuple):
    """One network's adapters as they lie on disk.

    Attributes:
        path: The folder.
        root: The network's name in the model that it was trained in; None where another library wrote the folder.
        methods: The method of each site, by the site's name in the network.
        layouts: How each site lies as a matrix; None where another library wrote the folder.
        tied: The further names of the tied weight that a site is.
        bases: The fingerprint of each site's base weight, None where it is not known.
        full: The tensor name of each entry that is trained in full, by the entry's name in the network.
        tensors: Everything in the weights file, by PEFT's names.
    """

    path: Path
    root: str | None
    methods: dict[str, Method]
    layouts: dict[str, Layout | None]
    tied: dict[str, list[str]]
    bases: dict[str, str | None]
    full: dict[str, str]
    tensors: dict[str, Tensor]

    def factor(self, site: str, name: str) -> str:
        """Return the tensor name of one factor of one site, in either place where PEFT may have put it.

        Args:
            site: The site's name in the network.
            name: The adapter's parameter, such as ``lora_A``.
        """
        plain, in_attention = peft_format.tensor_names(site, name)
        return in_attention if plain not in self.tensors and in_attention in self.tensors else plain

    def full_values(self) -> dict[str, Tensor]:
        """Return what is trained in full, by its name in the network.

        Raises:
            AdapterError: If it is not all there.
        """
        absent = [key for key in self.full.values() if key not in self.tensors]
        if absent:
            raise AdapterError(f"{self.path}: {absent[0]} is missing")
        return {name: self.tensors[key] for name, key in self.full.items()}


def adapter_folders(path: Path) -> list[Path]:
    """Return the folders, one per network, that an adapter folder consists of: itself, or those inside it.

    Raises:
        AdapterError: If there is no adapter.
    """
    if path.is_file():
        raise AdapterError(f"{path} is a file: give the adapter folder that holds {WEIGHTS}")
    if (path / WEIGHTS).is_file():
        return [path]
    inner = sorted(file.parent for file in path.glob(f"*/{WEIGHTS}"))
    if not inner:
        pickle = next((name for name in ("adapter_model.bin", "adapter_model.pt") if (path / name).exists()), None)
        hint = f"; {pickle} is a pickle, which could run code: convert it to safetensors first" if pickle else ""
        raise AdapterError(f"{path}: no {WEIGHTS} in this folder{hint}")
    return inner


def read_adapter(folder: Path) -> AdapterFile:
    """Read one network's folder, written by this library or by PEFT.

    Raises:
        AdapterError: If a file is missing, damaged, or says what cannot be.
    """
    tensors, described = read_tensors(folder / WEIGHTS)
    if described is None:
        config = folder / CONFIG
        if not config.is_file():
            raise AdapterError(f"{folder}: no {CONFIG} beside {WEIGHTS}")
        tensors = peft_format.without_copies(tensors)
        methods = peft_format.site_values(parse_json(config.read_bytes(), config), tensors, folder)
        full = {name: key for key, name in peft_format.full_entries(tensors).items()}
        nothing = dict.fromkeys(methods)
        return AdapterFile(folder, None, methods, nothing, {name: [] for name in methods}, nothing, full, tensors)
    check_description(described, folder)
    bases = {name: values.get("base") for name, values in described["sites"].items()}
    adapted = {name.rpartition(".")[0] for name in described["sites"]}
    full = {name: peft_format.full_name(name, adapted) for name in described["trained_in_full"]}
    methods, layouts = methods_of(described, folder), layouts_of(described, folder)
    return AdapterFile(folder, described["root"], methods, {**layouts}, tied_of(described), bases, full, tensors)
