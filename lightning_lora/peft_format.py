"""Write PEFT's on-disk format: names of tensors and the fields of ``adapter_config.json``.

A folder describes one network. Names in it are relative to that network: what PEFT, transformers or a server would
load, not the LightningModule around it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from lightning_lora.layers import kind_of
from lightning_lora.layers.attention import AdaptedMultiheadAttention, AdaptedTransformerEncoderLayer
from lightning_lora.layers.seam import AdaptedLayer, plain_class
from lightning_lora.method import Method
from lightning_lora.peft_layers import (
    FORMS,
    LINEAR_FORMS,
    Form,
    OwnForm,
    ParameterForm,
    Stored,
    layer_form,
    parameter_form,
)
from lightning_lora.sites import Site, join, named_base_modules

PREFIX = "base_model.model."
OWN_TYPE = "LIGHTNING_LORA"
NO_METHOD = "PEFT does not have"
PARTS = "PEFT has no adapter for a part of a matrix"
ONE_RANK = "PEFT's AdaLoRA starts with one rank and one alpha everywhere"
LAST_DOUBLING = "0.21.2"  # the last PEFT that adds the change of an attention's out_proj twice
_OPTIONS = {  # what a config of PEFT's says beside the method's own values and the names of modules
    "LORA": ("bias", "rank_pattern", "alpha_pattern"),
    "ADALORA": ("bias", "rank_pattern", "alpha_pattern"),
    "VERA": ("bias",),
    "HIRA": (),
}
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


class Expressed(NamedTuple):
    """How a network's adapters are written.

    Attributes:
        config: The content of ``adapter_config.json``: PEFT's, or one of our own type that no other library takes for
            its own.
        reason: Why PEFT could not express the adapters; None where it can.
        stored: Where the factors of each site lie, by the site's name.
        full: The tensor name of each entry that is trained in full, by the entry's name.
        forms: The name of the form, if there is one, that each site's factors have in PEFT.
        levels: The number of PEFT's wrappers outside of that of each site that it adapts as a parameter.
    """

    config: dict[str, Any]
    reason: str | None
    stored: dict[str, Stored]
    full: dict[str, str]
    forms: dict[str, str]
    levels: dict[str, int]


def express(
    network: nn.Module,
    found: Mapping[str, Site],
    methods: Mapping[str, Method],
    tied: set[str],
    full: set[str],
    reasons: Mapping[str, str | None],
) -> Expressed:
    """Return how to write a network's adapters, in PEFT's format where PEFT computes what they do.

    Args:
        network: The network that the names are relative to.
        found: Its sites by name.
        methods: The method of each site.
        tied: The sites whose adapter works on several layers.
        full: Names of the entries that are trained in full.
        reasons: Why PEFT cannot hold the adapter of a site, whatever the layer; None where it can.
    """
    ways = {name: _form(site, methods[name]) for name, site in found.items()}
    forms = {name: form for name, (form, _) in ways.items() if form is not None}
    parameters = {name for name, form in forms.items() if form is ParameterForm}
    fields = _fields(network, found, parameters, full)
    reason = _why_not_sites(network, found, methods, tied, ways, reasons)
    reason = reason or _why_not_together(found, methods, parameters, full)
    reason = reason or _why_not_names(network, parameters, full) or _why_not_parts(found)
    reason = reason or _why_not_ranks(methods) or _why_not_bias(methods, fields["bias"])
    reason = "; ".join(filter(None, (_why_not_method(methods), reason))) or None
    named = {name: label for name, form in forms.items() for label, known in FORMS.items() if form is known}
    levels = _levels(found, parameters)
    if reason is not None:
        return Expressed(fields | {"peft_type": OWN_TYPE}, reason, *own_places(found, full), named, levels)
    located = places(forms, levels, full)
    values = _values(found, methods, parameters)
    if "bias" not in _OPTIONS[values["peft_type"]]:
        del fields["bias"]
    return Expressed(fields | values, None, *located, named, levels)


def own_places(found: Iterable[str], full: Iterable[str]) -> tuple[dict[str, Stored], dict[str, str]]:
    """Return where factors, and entries trained in full, lie in a file of our own type: under their own names.

    Args:
        found: Names of the sites.
        full: Names of the entries.
    """
    return {name: Stored(name, OwnForm) for name in found}, {name: name for name in full}


def places(
    forms: Mapping[str, type[Form]], levels: Mapping[str, int], full: Iterable[str]
) -> tuple[dict[str, Stored], dict[str, str]]:
    """Return where factors, and entries trained in full, lie in a file of PEFT's.

    Args:
        forms: The form of each site's factors.
        levels: The number of wrappers outside of that of each site that is adapted as a parameter.
        full: Names of the entries.
    """
    wrappers = Counter(_module(name) for name in forms)
    stored = {name: Stored(_wrapped(_module(name), levels.get(name, 0)), form) for name, form in forms.items()}
    return stored, {name: join(_wrapped(_module(name), wrappers[_module(name)]), _last(name)) for name in full}


def _wrapped(module: str, levels: int) -> str:
    """Return PEFT's name of what is inside of so many wrappers around a module."""
    return PREFIX + join(module, *["base_layer"] * levels)


def _form(site: Site, method: Method) -> tuple[type[Form] | None, str]:
    """Return the form in which PEFT stores a site's adapter, put on the layer if that is right, else on the parameter.

    The reason, if neither is right, is that for the layer.
    """
    peft_type = (method.peft_config() or {}).get("peft_type", "LORA")
    form, reason = layer_form(site.module, site.parameter, peft_type)
    if form is not None or peft_type != "LORA":
        return form, reason
    if site.slot.layout.rows is not None or isinstance(site.module, nn.MultiheadAttention):
        return form, reason
    size = (kind_of(site.module) or AdaptedLayer).size(site.module, site.parameter)
    return parameter_form(site.module, site.parameter, site.slot.layout, size)[0], reason


def _levels(found: Mapping[str, Site], parameters: set[str]) -> dict[str, int]:
    """Return how many wrappers are outside of that of each adapted parameter: the module's first is innermost."""
    levels = {}
    for name in parameters:
        own = [join(_module(name), entry) for entry in found[name].module._parameters]
        levels[name] = len(parameters.intersection(own[own.index(name) + 1 :] if name in own else ()))
    return levels


def _fields(network: nn.Module, found: Mapping[str, Site], parameters: set[str], full: set[str]) -> dict[str, Any]:
    """Return what the config says of names."""
    adapted, whole = {_module(name) for name in found}, _whole_modules(network, full)
    biases = {_module(name) for name in full if not _inside(name, whole)}
    fields = {
        "target_modules": _exactly_these(network, {_module(name) for name in found if name not in parameters}),
        "modules_to_save": sorted(whole) or None,
        "bias": "none" if not biases else "lora_only" if biases <= adapted else "all",
        "base_model_name_or_path": getattr(getattr(network, "config", None), "name_or_path", None) or None,
        "inference_mode": True,
    }
    return fields | ({"target_parameters": sorted(parameters)} if parameters else {})


def _values(found: Mapping[str, Site], methods: Mapping[str, Method], parameters: set[str]) -> dict[str, Any]:
    """Return what the config says of the method, with the patterns that its type has in PEFT."""
    written = {name: method.peft_config() or {} for name, method in methods.items()}
    common = Counter(methods.values()).most_common(1)[0][0].peft_config() or {}
    keys = {name: _exactly(name if name in parameters else _module(name)) for name in found}
    patterns = {
        "rank_pattern": _others(written, common, "r", keys),
        "alpha_pattern": _others(written, common, "lora_alpha", keys),
    }
    transposed = any(found[name].slot.layout.transposed for name in found if name not in parameters)
    return {
        **common,
        **{name: pattern for name, pattern in patterns.items() if name in _OPTIONS[common["peft_type"]]},
        **({"fan_in_fan_out": True} if transposed else {}),
    }


def _others(
    written: Mapping[str, Mapping[str, Any]], common: Mapping[str, Any], field: str, keys: Mapping[str, str]
) -> dict[str, Any]:
    """Return a field's values where they are not the common one."""
    return {keys[name]: values[field] for name, values in written.items() if values.get(field) != common.get(field)}


def _why_not_sites(
    network: nn.Module,
    found: Mapping[str, Site],
    methods: Mapping[str, Method],
    tied: set[str],
    ways: Mapping[str, tuple[type[Form] | None, str]],
    reasons: Mapping[str, str | None],
) -> str | None:
    readers: dict[tuple[int, str], type[AdaptedLayer]] = {}
    for _, module in named_base_modules(network):
        kind = kind_of(module)
        fused = plain_class(module).forward is nn.TransformerEncoderLayer.forward
        if kind is not None and (fused or issubclass(kind, AdaptedMultiheadAttention)):
            readers |= {(id(owner), parameter): kind for owner, parameter in kind.reads(module)}
    for name, site in found.items():
        reader = readers.get((id(site.module), site.parameter))
        form, reason = ways[name]
        if reasons[name] is not None:
            return f"{reasons[name]}: {name}"
        if not _module(name):
            return "PEFT adapts layers inside a network, not a network that is one layer"
        if reader is AdaptedMultiheadAttention and form is Form:
            return f"PEFT adds the change of an nn.MultiheadAttention's out_proj twice (up to {LAST_DOUBLING}): {name}"
        if reader is AdaptedMultiheadAttention and form in LINEAR_FORMS:
            method = type(methods[name]).__name__
            return f"PEFT's {method} does not reach what an nn.MultiheadAttention reads: {name}"
        if form is None:
            return f"{reason}: {name}"
        if site.weight is None:
            return f"PEFT loses what it merges into a weight that is computed: {name}"
        if reader is AdaptedTransformerEncoderLayer:
            return f"PyTorch's fused encoder layer passes PEFT's adapters by in evaluation: {name}"
        if name in tied:
            return f"PEFT gives each of several tied layers an adapter of its own: {name}"
    return None


def _why_not_method(methods: Mapping[str, Method]) -> str | None:
    absent = next((type(one).__name__ for one in methods.values() if one.peft_config() is None), None)
    return None if absent is None else f"{NO_METHOD} {absent}"


def _why_not_together(
    found: Mapping[str, Site], methods: Mapping[str, Method], parameters: set[str], full: set[str]
) -> str | None:
    transposed = [name for name in found if name not in parameters and found[name].slot.layout.transposed]
    for name in sorted(parameters):
        config = methods[name].peft_config() or {}
        if config.get("use_dora"):
            return f"PEFT's target_parameters takes no DoRA: {name}"
        if config.get("lora_dropout"):
            return f"PEFT's target_parameters takes no dropout: {name}"
        if transposed:
            return f"PEFT's target_parameters goes with no Conv1D: {name} and {transposed[0]}"
        inner = next(
            (other for other in sorted({*found, *full}) if _module(other).startswith(f"{_module(name)}.")), None
        )
        if inner is not None:
            return f"PEFT's target_parameters hides what is inside the module: {name} and {inner}"
    return None


def _why_not_names(network: nn.Module, parameters: set[str], full: set[str]) -> str | None:
    whole = _whole_modules(network, full)
    for name in sorted(full):
        if not _inside(name, whole) and _last(name) != "bias":
            return f"PEFT cannot train {name} in full without the rest of its module"
    names = _names(network)
    for name in names:
        meant = next((module for module in whole if name != module and name.endswith(module)), None)
        if meant is not None:
            return f"PEFT would train {name} in full as well, because it ends like {meant}"
        for entry in network.get_submodule(name)._parameters if parameters else ():
            key = join(name, entry)
            meant = next((other for other in parameters if key not in parameters and key.endswith(f".{other}")), None)
            if meant is not None:
                return f"PEFT would adapt {key} as well, because it ends like {meant}"
    return None


def _why_not_parts(found: Mapping[str, Site]) -> str | None:
    part = next((name for name, site in found.items() if site.slot.layout.rows is not None), None)
    return None if part is None else f"{PARTS}: {part}"


def _why_not_ranks(methods: Mapping[str, Method]) -> str | None:
    ranks = {(method.r, method.alpha): name for name, method in methods.items()}
    types = {(method.peft_config() or {}).get("peft_type") for method in methods.values()}
    if len(ranks) > 1 and "HIRA" in types:  # up to 0.21.2
        return f"PEFT's HiRA leaves rank_pattern out: {' and '.join(ranks.values())}"
    return f"{ONE_RANK}: {' and '.join(ranks.values())}" if len(ranks) > 1 and "ADALORA" in types else None


def _why_not_bias(methods: Mapping[str, Method], bias: str) -> str | None:
    peft_type = (next(iter(methods.values())).peft_config() or {}).get("peft_type", "LORA")
    return None if bias == "none" or "bias" in _OPTIONS[peft_type] else f"PEFT's {peft_type} trains no biases"


def _whole_modules(network: nn.Module, full: set[str]) -> list[str]:
    """Return the outermost modules with a forward all of whose parameters are trained in full."""
    whole: list[str] = []
    for name, module in named_base_modules(network) if full else ():
        entries = {f"{name}.{entry}" for entry, _ in module.named_parameters()}
        if not name or not entries or not entries <= full or _inside(name, whole) or isinstance(module, _CONTAINERS):
            continue
        if not all(entry.endswith(".bias") for entry in entries):
            whole.append(name)
    return whole


def _exactly_these(network: nn.Module, modules: set[str]) -> list[str] | str:
    """Return the modules as a list, or as a regular expression where PEFT would find others by the list.

    It takes an entry of a list for the end of a name as well: ``q`` also means ``x.q``.
    """
    others = [name.split(".") for name in _names(network) if name not in modules]
    if any(".".join(parts[start:]) in modules for parts in others for start in range(1, len(parts))):
        return "|".join(re.escape(module) for module in sorted(modules))
    return sorted(modules)


def _names(network: nn.Module) -> list[str]:
    """Return the names of the network's own modules."""
    return [name for name, _ in named_base_modules(network)]


def _inside(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _exactly(name: str) -> str:
    return "^" + re.escape(name)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _last(name: str) -> str:
    return name.rpartition(".")[2]
