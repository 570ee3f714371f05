"""What a file says about its adapters: method, sites, and a fingerprint of the base they were trained on."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import Tensor, nn

from lightning_lora.adapter import SHARED
from lightning_lora.files import SCHEMA, AdapterError
from lightning_lora.injection_checks import check_task_name
from lightning_lora.layout import Layout, whole_number
from lightning_lora.method import Method, known_methods
from lightning_lora.peft_layers import FORMS
from lightning_lora.sharing import shares
from lightning_lora.sites import BaseWeight, Site, clean, join, named_base_modules, relative, slots_at, tied_names

_LONGEST = 2**40  # of a dimension


def describe(
    model: nn.Module, found: list[Site], task: str, root: str, full: set[str], bases: Mapping[str, BaseWeight]
) -> dict[str, Any]:
    """Return what a file says about its tensors, in plain types.

    Args:
        model: The adapted model.
        found: The sites of one network.
        task: Their task.
        root: The network's name in the model; site names are written relative to it.
        full: Names, relative to the root, of what is trained in full.
        bases: The `base_weights` of the sites, or of more.
    """
    methods = {site.name: site.adapter(task).method for site in found}
    first = next(iter(methods.values()))
    tied, shared, firsts = tied_names(model), tied_to(model, found), shares(model, task)
    described = {
        relative(site.name, root): {
            "r": methods[site.name].r,
            "alpha": methods[site.name].alpha,
            "base": bases[site.name].digest,
            "size": list(bases[site.name].size),
            "layout": site.slot.layout.described(),
            "tied": [relative(name, root) for name in tied[site.name]],
            "tied_to": [name.removeprefix(f"{root}.") for name in shared[site.name]],
            "shares": relative(firsts[site.name], root) if site.name in firsts else [],
        }
        for site in found
    }
    pair = getattr(found[0].adapter(task), "shared", None)
    drawn = {} if pair is None or pair.stored else {"shared": pair.described()}
    return {
        "schema": SCHEMA,
        **drawn,
        "task": task,
        "root": root,
        "method": type(first).__name__,
        "hyperparameters": first.hyperparameters(),
        "sites": {
            name: {field: value for field, value in values.items() if value not in ({}, [])}
            for name, values in described.items()
        },
        "trained_in_full": sorted(full),
    }


def tied_to(model: nn.Module, found: list[Site]) -> dict[str, list[str]]:
    """Return, by site name, the names under which layers without the site's adapters have its parameter.

    Args:
        model: The adapted model.
        found: The sites.
    """
    holders: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for prefix, module in named_base_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((clean(join(prefix, name)), module, name))
    return {
        site.name: [
            name
            for name, module, parameter in holders.get(id(site.weight), [])
            if not any(slot is site.slot for slot in slots_at(module, parameter))
        ]
        for site in found
    }


def check_description(described: Mapping[str, Any], path: object) -> None:
    """Raise ``AdapterError`` unless a description has every field in the type and range that it must have."""
    expected = {
        "task": str,
        "root": str,
        "method": str,
        "hyperparameters": dict,
        "sites": dict,
        "trained_in_full": list,
    }
    for field, kind in expected.items():
        if not isinstance(described.get(field), kind):
            raise AdapterError(
                f"{path}: field {field!r} of its description is a {type(described.get(field)).__name__} where a "
                f"{kind.__name__} is expected"
            )
    if not described["sites"]:
        raise AdapterError(f"{path}: its description names no adapted matrix, so there is nothing to load")
    for name, values in described["sites"].items():
        if not isinstance(values, dict) or not _is_site(values, described["sites"]):
            raise AdapterError(
                f"{path}: its description says {values!r} of {name}, which no save writes: save it again"
            )
    if not _are_names(described["trained_in_full"]):
        raise AdapterError(
            f"{path}: field 'trained_in_full' of its description is {described['trained_in_full']!r}, where a list of "
            "names is expected"
        )
    if not isinstance(described.get("shared"), dict | None):
        raise AdapterError(
            f"{path}: field 'shared' of its description is {described['shared']!r}, where an object is expected"
        )
    save = described.get("save", {"files": []})
    if not isinstance(save, dict) or not _are_names(save.get("files")):
        raise AdapterError(
            f"{path}: field 'save' of its description is {save!r}, where an object with the names of files is expected"
        )
    weights = described.get("weights", {})
    if not isinstance(weights, dict) or not _are_names(list(weights.values())):
        raise AdapterError(
            f"{path}: field 'weights' of its description is {weights!r}, where an object of digests is expected"
        )
    if not isinstance(described.get("not_for_peft"), str | None):
        raise AdapterError(
            f"{path}: field 'not_for_peft' of its description is {described['not_for_peft']!r}, where a sentence is "
            "expected"
        )
    try:
        check_task_name(described["task"])
    except ValueError as error:
        raise AdapterError(f"{path}: {error}") from None
    methods_of(described, path)
    layouts_of(described, path)


def _is_site(values: Mapping[str, Any], among: Mapping[str, Any]) -> bool:
    """Tell whether what a description says of a site is in order, but for its layout and its method."""
    base, size = values.get("base"), values.get("size")
    form, level = values.get("form", "linear"), values.get("level", 0)
    names = [values.get("tied", []), values.get("tied_to", [])]
    return (
        isinstance(base, str | None)
        and ("shares" not in values or _is_first(values, among))
        and isinstance(form, str)
        and form in FORMS
        and whole_number(level)
        and 0 <= level < len(among)
        and (size is None or (isinstance(size, list) and all(whole_number(n) and 0 <= n < _LONGEST for n in size)))
        and all(map(_are_names, names))
    )


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_first(values: Mapping[str, Any], among: Mapping[str, Any]) -> bool:
    """Tell whether the site that a site shares the adapter of says so of itself, and has the same rank and alpha."""
    name = values["shares"]
    first = among.get(name) if isinstance(name, str) else None
    return isinstance(first, dict) and [first.get(f) for f in ("shares", "r", "alpha")] == [
        name,
        values.get("r"),
        values.get("alpha"),
    ]


def shares_of(described: Mapping[str, Any]) -> dict[str, str]:
    """Return the site whose adapter it is, by the name of each site of a description that shares it."""
    return {name: values["shares"] for name, values in described["sites"].items() if "shares" in values}


def layouts_of(described: Mapping[str, Any], path: object) -> dict[str, Layout]:
    """Return how each site of a description lies as a matrix.

    Raises:
        AdapterError: If a value is out of range.
    """
    try:
        return {name: Layout.from_description(values.get("layout", {})) for name, values in described["sites"].items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise AdapterError(f"{path}: {error}") from None


def sizes_of(described: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """Return the size of each site's parameter in a description; None where it does not say."""
    sizes = {name: values.get("size") for name, values in described["sites"].items()}
    return {name: None if size is None else tuple(size) for name, size in sizes.items()}


def tied_of(described: Mapping[str, Any], adapted: bool = True) -> dict[str, list[str]]:
    """Return the further names, if any, of the tied weight that each site of a description is.

    Args:
        described: The description.
        adapted: Whether they are those of layers that share the adapter, or of those that have none.
    """
    return {name: values.get("tied" if adapted else "tied_to", []) for name, values in described["sites"].items()}


def methods_of(described: Mapping[str, Any], path: object) -> dict[str, Method]:
    """Return the method of each site of a description.

    Raises:
        AdapterError: If the method is unknown here, or a value is out of range.
    """
    cls = known_methods().get(described["method"])
    if cls is None:
        raise AdapterError(
            f"{path}: method {described['method']!r} is unknown here; known: {', '.join(known_methods())}: import the "
            "module that defines it, or upgrade lightning_lora"
        )
    try:
        at = cache(cls(**described["hyperparameters"]).at)
        return {name: at(values["r"], values["alpha"]) for name, values in described["sites"].items()}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise AdapterError(f"{path}: hyperparameters of {described['method']}: {error}") from None


def redrawn(described: Mapping[str, Any], path: object) -> dict[str, Tensor]:
    """Return what the adapters of a description share and its file leaves out, by the adapters' names of it.

    Raises:
        AdapterError: If it cannot be drawn again as it was.
    """
    if described.get("shared") is None:
        return {}
    method = next(iter(methods_of(described, path).values()))
    try:
        return {SHARED + name: tensor for name, tensor in method.redrawn(described["shared"]).items()}
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise AdapterError(f"{path}: {error}") from None
