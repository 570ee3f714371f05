"""Read an adapter folder, without a model: what is in it, checked as far as the files alone allow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lightning_lora import peft_format, peft_reading
from lightning_lora.adapter import Adapter, stored_factors
from lightning_lora.description import check_description, layouts_of, methods_of, redrawn, shares_of, sizes_of, tied_of
from lightning_lora.files import AdapterError, read_json, read_tensors, some
from lightning_lora.layout import Layout
from lightning_lora.method import Method
from lightning_lora.peft_layers import FORMS, Form, ParameterForm, Stored
from lightning_lora.saving import CONFIG, OUTSIDE, SAVE, WEIGHTS
from lightning_lora.sites import join

_TRIES = 100


class AdapterFile(NamedTuple):
    """One network's adapters as they lie on disk.

    Attributes:
        path: The folder.
        root: The network's name in the model that it was trained in; None where another library wrote the folder.
        methods: The method of each site, by the site's name in the network.
        layouts: How each site lies as a matrix; None where another library wrote the folder.
        sizes: The size of each site's parameter, likewise.
        tied: The further names of the tied weight that a site is, of layers that share its adapter.
        tied_to: Those of layers without the adapter.
        shares: The site whose adapter it is, by the name of each site that shares it.
        bases: The fingerprint of each site's base weight, None where it is not known.
        forms: The form that each site's factors have in PEFT, or would have if all the others could be expressed.
        stored: Where they lie among the tensors.
        full: The tensor name of each entry that is trained in full, by the entry's name in the network.
        tensors: Everything in the weights file, by the names that they have there.
        not_for_peft: Why PEFT cannot express the adapters; None where it can.
        fan_in_fan_out: Whether PEFT's config says that linear layers' weights lie as (in, out).
        weights: The digest of each frozen weight of the network, if it was saved with the full fingerprint.
        save: A digest of the save, and its files, where there were several; empty if not.
    """

    path: Path
    root: str | None
    methods: dict[str, Method]
    layouts: dict[str, Layout | None]
    sizes: dict[str, tuple[int, ...] | None]
    tied: dict[str, list[str]]
    tied_to: dict[str, list[str]]
    shares: dict[str, str]
    bases: dict[str, str | None]
    forms: dict[str, type[Form]]
    stored: dict[str, Stored]
    full: dict[str, str]
    tensors: dict[str, Tensor]
    not_for_peft: str | None
    fan_in_fan_out: bool
    weights: Mapping[str, str]
    save: Mapping[str, Any]

    def has(self, site: str, name: str) -> bool:
        """Tell whether the file holds a factor of a site."""
        return self.stored[site].key(name) in self.tensors

    def factors(self, site: str, blank: Adapter) -> dict[str, Tensor]:
        """Return the parameters of one site's adapter.

        Args:
            site: The site's name in the network.
            blank: An adapter of its method and shape.

        Raises:
            AdapterError: If one is not there, or in no shape that it can have.
        """
        form, method = self.stored[site].form, self.methods[site]
        written = form.written(method, blank.state_dict())
        held = [name for name in written if name in stored_factors(blank) or self.has(site, name)]
        return form.read(method, {name: self.factor(site, name) for name in held})

    def factor(self, site: str, name: str) -> Tensor:
        """Return one factor of one site as PEFT's adapter has it.

        Args:
            site: The site's name in the network.
            name: The factor's, such as ``lora_A``.

        Raises:
            AdapterError: If it is not there, or in no shape that it can have.
        """
        stored, method = self.stored[site], self.methods[site]
        r = (method.peft_config() or {}).get("r", method.r)
        key = stored.key(name)
        if key not in self.tensors:
            raise AdapterError(f"{self.path}: {key} is missing: copy or save the folder again")
        try:
            return stored.form.live(name, self.tensors[key], r, self.layouts[site])
        except (RuntimeError, IndexError):
            raise AdapterError(
                f"{self.path}: {key} has shape {list(self.tensors[key].shape)}, which fits no r={r}"
            ) from None

    def siblings(self) -> list[list[str]]:
        """Return the groups of sites in one module of which the files do not say whose factors are whose."""
        groups: dict[str, list[str]] = {}
        for site, stored in self.stored.items():
            if self.root is None and stored.form is ParameterForm:
                groups.setdefault(site.rpartition(".")[0], []).append(site)
        return [group for group in groups.values() if len(group) > 1]

    def with_order(self, root: str, parameters: Iterable[str]) -> AdapterFile:
        """Return the file with the factors of sibling parameters given out as PEFT does: the last has the outermost.

        Args:
            root: The network's name in the model at hand.
            parameters: Names of the model's parameters, those of one module in the module's own order.
        """
        order = {name: i for i, name in enumerate(parameters)}
        stored = dict(self.stored)
        for group in self.siblings():
            owners = sorted((stored[site].owner for site in group), key=len)
            last_first = sorted(group, key=lambda site: -order[join(root, site)])
            stored |= {site: Stored(owner, ParameterForm) for site, owner in zip(last_first, owners, strict=True)}
        return self._replace(stored=stored)

    def full_values(self) -> dict[str, Tensor]:
        """Return what is trained in full, by its name in the network.

        Raises:
            AdapterError: If it is not all there.
        """
        absent = [key for key in self.full.values() if key not in self.tensors]
        if absent:
            raise AdapterError(f"{self.path}: {absent[0]} is missing: copy or save the folder again")
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


def read_adapters(path: Path) -> tuple[list[AdapterFile], dict[str, Tensor] | None]:
    """Read everything in an adapter folder, all of it of one save, also while another process replaces the folder.

    Returns:
        Each network's adapters; and what was trained in full outside of them, None if it was not copied along.

    Raises:
        AdapterError: If a file is missing, damaged, or says what cannot be.
    """
    for _ in range(_TRIES):
        before = _identity(path)
        try:
            return _read_all(path)
        except AdapterError:
            if _identity(path) == before:
                raise
    return _read_all(path)


def _read_all(path: Path) -> tuple[list[AdapterFile], dict[str, Tensor] | None]:
    try:
        files = [read_adapter(folder) for folder in adapter_folders(path)]
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read: {error.strerror}") from None
    outside: dict[str, Tensor] = {}
    saves = [file.save for file in files]
    if (path / OUTSIDE).exists():
        outside, described = read_tensors(path / OUTSIDE)
        saves.append((described or {}).get(SAVE) or {})
    if any(save != saves[0] for save in saves):
        raise AdapterError(f"{path}: its files are of different saves: copy or save the folder again")
    present = {(file.path / WEIGHTS).relative_to(path).as_posix() for file in files}
    missing = set(saves[0].get("files", [])) - present if present <= set(saves[0].get("files", [])) else set()
    if missing - {OUTSIDE}:  # where a part of the folder was asked for, nothing is
        raise AdapterError(f"{path}: {some(sorted(missing - {OUTSIDE}))} is missing: copy or save the folder again")
    return files, None if missing and not outside else outside


def _identity(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_ctime_ns


def read_adapter(folder: Path) -> AdapterFile:
    """Read one network's folder, written by this library or by PEFT.

    Raises:
        AdapterError: If a file is missing, damaged, or says what cannot be.
    """
    tensors, described = read_tensors(folder / WEIGHTS)
    if described is None:
        config = folder / CONFIG
        if not config.is_file():
            raise AdapterError(f"{folder}: no {CONFIG} beside {WEIGHTS}: copy it there, it says r and alpha")
        tensors = peft_reading.without_copies(tensors)
        fields = read_json(config)
        tensors = peft_reading.with_masked_triplets(fields, tensors, folder)
        methods, stored = peft_reading.read_sites(fields, tensors, folder)
        return AdapterFile(
            path=folder,
            root=None,
            methods=methods,
            layouts=dict.fromkeys(methods),
            sizes=dict.fromkeys(methods),
            tied={name: [] for name in methods},
            tied_to={name: [] for name in methods},
            shares={},
            bases=dict.fromkeys(methods),
            forms={name: one.form for name, one in stored.items()},
            stored=stored,
            full=peft_reading.full_entries(tensors),
            tensors=tensors,
            not_for_peft=None,
            fan_in_fan_out=bool(fields.get("fan_in_fan_out")),
            weights={},
            save={},
        )
    check_description(described, folder)
    stored, full = _places(described)
    first = next(iter(stored.values()))
    tensors |= {first.key(name): tensor for name, tensor in redrawn(described, folder).items()}
    shared = shares_of(described)
    stored |= {name: stored[one] for name, one in shared.items() if stored[name].key("lora_B") not in tensors}
    return AdapterFile(
        path=folder,
        root=described["root"],
        methods=methods_of(described, folder),
        layouts={**layouts_of(described, folder)},
        sizes=sizes_of(described),
        tied=tied_of(described),
        tied_to=tied_of(described, adapted=False),
        shares=shared,
        bases={name: values.get("base") for name, values in described["sites"].items()},
        forms=_forms(described),
        stored=stored,
        full=full,
        tensors=tensors,
        not_for_peft=described.get("not_for_peft"),
        fan_in_fan_out=False,
        weights=described.get("weights", {}),
        save=described.get(SAVE) or {},
    )


def _places(described: Mapping[str, Any]) -> tuple[dict[str, Stored], dict[str, str]]:
    """Return where the factors of each site lie in a folder of ours, and the tensor name of what is trained in full."""
    sites, full = described["sites"], described["trained_in_full"]
    if described.get("not_for_peft") is not None:
        return peft_format.own_places(sites, full)
    levels = {name: values.get("level", 0) for name, values in sites.items()}
    return peft_format.places(_forms(described), levels, full)


def _forms(described: Mapping[str, Any]) -> dict[str, type[Form]]:
    """Return the form that each site's factors have in PEFT, or would have if all the others could be expressed."""
    return {name: FORMS[values.get("form", "linear")] for name, values in described["sites"].items()}
