"""PEFT's on-disk format: names of tensors and the fields of ``adapter_config.json``.

A folder describes one network. Names in it are relative to that network: what PEFT, transformers or a server would
load, not the LightningModule around it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_lora.files import AdapterError
from lightning_lora.method import Method, known_methods
from lightning_lora.sites import added_modules, join

PREFIX = "base_model.model."
OWN_TYPE = "LIGHTNING_LORA"
_LAST_DOUBLING = "0.21.2"
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_LITERAL_NAME = re.compile(r"\^?(\w|\\?[-.])+\$?", re.ASCII)


def tensor_name(network: nn.Module, site: str, factor: str) -> str:
    """Return PEFT's name of one factor of one adapted matrix.

    Args:
        network: The network that the names are relative to.
        site: The matrix, as its key in the network's state dict.
        factor: The adapter's parameter, such as ``lora_A``.
    """
    plain, in_attention = tensor_names(site, factor)
    return in_attention if _in_attention(network, site) else plain


def tensor_names(site: str, factor: str) -> tuple[str, str]:
    """Return PEFT's name of one factor, and its name where the matrix is an attention's output projection."""
    module, _, parameter = site.rpartition(".")
    module = module if parameter in ("weight", "in_proj_weight") else site
    owner, _, child = module.rpartition(".")
    tail = join(factor, "weight")
    return PREFIX + join(module, tail), PREFIX + join(owner, "base_layer", child, tail)


def _in_attention(network: nn.Module, site: str) -> bool:
    module = site.rpartition(".")[0]
    owner, _, child = module.rpartition(".")
    return child == "out_proj" and isinstance(network.get_submodule(owner), nn.MultiheadAttention)


def full_name(name: str, adapted: Iterable[str]) -> str:
    """Return PEFT's name of an entry that is trained in full; a bias of an adapted module is one level down."""
    module, _, entry = name.rpartition(".")
    return PREFIX + (join(module, "base_layer", entry) if module in adapted else name)


def config(network: nn.Module, methods: Mapping[str, Method], full: set[str]) -> tuple[dict[str, Any], str | None]:
    """Return ``adapter_config.json`` for a network's adapters.

    Args:
        network: The network.
        methods: The method of each site, by the site's name.
        full: Names of the entries that are trained in full.

    Returns:
        The config, and None; or a config of our own type that no other library takes for its own, and the reason why
        PEFT could not express the adapters.
    """
    reason = _why_not_peft(network, methods, full)
    common = Counter(methods.values()).most_common(1)[0][0]
    modules = {site: site.rpartition(".")[0] for site in methods}
    whole = _whole_modules(network, full)
    biases = {name for name in full if not _inside(name, whole)}
    owners = {name.rpartition(".")[0] for name in biases}
    fields = {
        "peft_type": OWN_TYPE,
        "target_modules": _exactly_these(network, set(modules.values())),
        "rank_pattern": {_exactly(modules[s]): m.r for s, m in methods.items() if m.r != common.r},
        "alpha_pattern": {_exactly(modules[s]): m.alpha for s, m in methods.items() if m.alpha != common.alpha},
        "modules_to_save": sorted(whole) or None,
        "bias": "none" if not biases else "lora_only" if owners <= set(modules.values()) else "all",
        "base_model_name_or_path": getattr(getattr(network, "config", None), "name_or_path", None) or None,
        "inference_mode": True,
    }
    return (fields | (common.peft_config() or {}) if reason is None else fields), reason


def _why_not_peft(network: nn.Module, methods: Mapping[str, Method], full: set[str]) -> str | None:
    for site, method in methods.items():
        module, _, parameter = site.rpartition(".")
        if method.peft_config() is None:
            return f"PEFT does not have {type(method).__name__}"
        if not module:
            return "PEFT adapts layers inside a network, not a network that is one layer"
        if parameter == "in_proj_weight" or _in_attention(network, site):
            return f"PEFT adds the change of an nn.MultiheadAttention's out_proj twice (up to {_LAST_DOUBLING}): {site}"
        if parameter != "weight":
            return f"PEFT has no adapter for {site}"
    whole = _whole_modules(network, full)
    for name in sorted(full):
        if not _inside(name, whole) and name.rpartition(".")[2] != "bias":
            return f"PEFT cannot train {name} in full without the rest of its module"
    for name in _names(network):
        meant = next((module for module in whole if name != module and name.endswith(module)), None)
        if meant is not None:
            return f"PEFT would train {name} in full as well, because it ends like {meant}"
    return None


def _whole_modules(network: nn.Module, full: set[str]) -> list[str]:
    """Return the outermost modules with a forward all of whose parameters are trained in full."""
    whole: list[str] = []
    for name, module in network.named_modules():
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
    if any(name not in modules and name.endswith(f".{module}") for name in _names(network) for module in modules):
        return "|".join(re.escape(module) for module in sorted(modules))
    return sorted(modules)


def _names(network: nn.Module) -> list[str]:
    """Return the names of the network's own modules."""
    added = added_modules(network)
    return [name for name, module in network.named_modules() if id(module) not in added]


def _inside(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _exactly(name: str) -> str:
    return "^" + re.escape(name)


def read_config(fields: Mapping[str, Any], path: object) -> Method:
    """Return the method that a config written by PEFT describes.

    Raises:
        AdapterError: If no known method fits, or a value is out of range.
    """
    for cls in known_methods().values():
        try:
            method = cls.from_peft(fields)
        except (TypeError, ValueError, OverflowError) as error:
            raise AdapterError(f"{path}: {error}") from None
        if method is not None:
            return method
    raise AdapterError(f"{path}: peft_type={fields.get('peft_type')!r} is not supported; known: LORA")


def site_values(fields: Mapping[str, Any], tensors: Mapping[str, Tensor], path: object) -> dict[str, Method]:
    """Return the method of each site in a folder that PEFT wrote; ranks come from the tensors' shapes.

    Args:
        fields: The content of ``adapter_config.json``.
        tensors: The content of the weights file, by name.
        path: For messages.

    Raises:
        AdapterError: If nothing is an adapter, or a pattern cannot be read literally.
    """
    method = read_config(fields, path)
    found: dict[str, Method] = {}
    for key in _adapted(tensors):
        owner, _, child = key.rpartition(".base_layer.")
        in_attention = child == "out_proj" and f"{owner}.lora_A.weight" in tensors
        module = (owner if in_attention else key).removeprefix(PREFIX)
        site = join(module, "in_proj_weight" if f"{key}.base_layer.out_proj.lora_A.weight" in tensors else "weight")
        tensor = tensors[f"{key}.lora_A.weight"]
        try:
            alpha = _alpha(fields.get("alpha_pattern") or {}, module, method.alpha)
            if in_attention:
                site = join(module, "out_proj", "weight")
                alpha *= 2 if _doubles(fields) else 1
            found[site] = method.at(tensor.shape[0] if tensor.dim() else 0, alpha)
        except (TypeError, ValueError, OverflowError) as error:
            raise AdapterError(f"{path}: {module}: {error}") from None
    if not found:
        raise AdapterError(f"{path}: no tensor is called {PREFIX}<module>.lora_A.weight: nothing here is an adapter")
    return found


def _adapted(tensors: Iterable[str]) -> list[str]:
    """Return the adapted modules by the names that PEFT gives them in a file."""
    return [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]


def _doubles(fields: Mapping[str, Any]) -> bool:
    """Tell whether the PEFT that wrote a config adds the change of an attention's output projection twice.

    https://github.com/huggingface/peft/pull/3774; older versions than 0.18 do not write their number.
    """
    version = re.match(r"(\d+)\.(\d+)\.(\d+)", str(fields.get("peft_version")))
    return version is None or tuple(map(int, version.groups())) <= tuple(map(int, _LAST_DOUBLING.split(".")))


def without_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a folder's tensors without the copies that PEFT writes of a bias in a module that is trained in full."""
    plain = {name: re.sub(r"\.(modules_to_save|original_module)\.", ".", name) for name in tensors}
    return {name: tensor for name, tensor in tensors.items() if plain[name] == name or plain[name] not in tensors}


def full_entries(tensors: Iterable[str]) -> dict[str, str]:
    """Return the entries trained in full among a folder's tensors: their name in the network by PEFT's name."""
    adapted = set(_adapted(tensors))
    return {
        name: _without_base_layers(name, adapted).removeprefix(PREFIX)
        for name in tensors
        if not re.search(r"\.lora_[A-Za-z_]+(\.weight)?$", name)
    }


def _without_base_layers(name: str, adapted: set[str]) -> str:
    """Return a name without the level that PEFT puts below adapted modules."""
    seen, *rest = name.split(".base_layer.")
    plain = seen
    for part in rest:
        plain = f"{plain}.{part}" if seen in adapted else f"{plain}.base_layer.{part}"
        seen = f"{seen}.base_layer.{part}"
    return plain


def _alpha(patterns: Any, module: str, default: float) -> float:
    if not isinstance(patterns, dict):
        raise ValueError(f"alpha_pattern is a {type(patterns).__name__} where an object is expected")
    for pattern, alpha in patterns.items():
        if not _LITERAL_NAME.fullmatch(pattern):
            raise ValueError(
                f"alpha_pattern key {pattern!r} is a regular expression, and none from a file is run: "
                "write module names there"
            )
        literal = pattern.removeprefix("^").removesuffix("$").replace("\\", "")
        if module == literal or (not pattern.startswith("^") and module.endswith(f".{literal}")):
            return float(alpha)
    return default
