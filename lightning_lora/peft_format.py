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
from lightning_lora.sites import join

PREFIX = "base_model.model."
OWN_TYPE = "LIGHTNING_LORA"
_LITERAL_NAME = re.compile(r"\^?[A-Za-z0-9_\-]+(\\?\.[A-Za-z0-9_\-]+)*\$?")


def tensor_name(network: nn.Module, site: str, factor: str) -> str:
    """Return PEFT's name of one factor of one adapted matrix.

    Args:
        network: The network that the names are relative to.
        site: The matrix, as its key in the network's state dict.
        factor: The adapter's parameter, such as ``lora_A``.
    """
    module, _, parameter = site.rpartition(".")
    if in_attention(network, site):
        owner, _, child = module.rpartition(".")
        module = join(owner, "base_layer", child)
    if parameter not in ("weight", "in_proj_weight"):
        module = site
    return f"{PREFIX}{module}.{factor}.weight"


def in_attention(network: nn.Module, site: str) -> bool:
    """Tell whether a matrix is the output projection inside an ``nn.MultiheadAttention``."""
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
    modules = {site: site.rpartition(".")[0] for site in methods if not in_attention(network, site)}
    whole = _whole_modules(network, full)
    others = sorted(
        name
        for name, _ in network.named_modules()
        if name not in modules.values() and _ends_with(name, modules.values())
    )
    biases = {name for name in full if not _inside(name, whole)}
    owners = {name.rpartition(".")[0] for name in biases}
    fields = {
        "peft_type": OWN_TYPE,
        "target_modules": sorted(set(modules.values())),
        "exclude_modules": [name for name in others if "adapters" not in name.split(".")] or None,
        "rank_pattern": {_exactly(modules[s]): m.r for s, m in methods.items() if s in modules and m.r != common.r},
        "alpha_pattern": {
            _exactly(modules[s]): m.alpha for s, m in methods.items() if s in modules and m.alpha != common.alpha
        },
        "modules_to_save": sorted(whole) or None,
        "bias": "none" if not biases else "lora_only" if owners <= set(modules.values()) else "all",
        "base_model_name_or_path": getattr(getattr(network, "config", None), "name_or_path", None) or None,
        "inference_mode": True,
    }
    return (fields | (common.peft_config() or {}) if reason is None else fields), reason


def _why_not_peft(network: nn.Module, methods: Mapping[str, Method], full: set[str]) -> str | None:
    for site, method in methods.items():
        if method.peft_config() is None:
            return f"PEFT does not have {type(method).__name__}"
        module, _, parameter = site.rpartition(".")
        if parameter == "weight" and not in_attention(network, site):
            continue
        attention = module.rpartition(".")[0] if parameter == "weight" else module
        pair = (join(attention, "in_proj_weight"), join(attention, "out_proj", "weight"))
        if site not in pair or methods.get(pair[0]) != methods.get(pair[1]):
            return f"PEFT adapts in_proj_weight and out_proj of {attention} with one rank and alpha, or neither"
    whole = _whole_modules(network, full)
    for name in sorted(full):
        if not _inside(name, whole) and name.rpartition(".")[2] != "bias":
            return f"PEFT cannot train {name} in full without the rest of its module"
    return None


def _whole_modules(network: nn.Module, full: set[str]) -> list[str]:
    """Return the outermost modules all of whose parameters are trained in full."""
    whole: list[str] = []
    for name, module in network.named_modules():
        entries = {f"{name}.{entry}" for entry, _ in module.named_parameters()}
        if name and entries and entries <= full and not _inside(name, whole):
            only_bias = all(entry.endswith(".bias") for entry in entries)
            if not only_bias:
                whole.append(name)
    return whole


def _inside(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _ends_with(name: str, modules: Iterable[str]) -> bool:
    return any(name.endswith(f".{module}") for module in modules)


def _exactly(name: str) -> str:
    return "^" + name.replace(".", r"\.")


def read_config(fields: Mapping[str, Any], path: object) -> Method:
    """Return the method that a config written by PEFT describes.

    Raises:
        AdapterError: If no known method fits, or a value is out of range.
    """
    for cls in known_methods().values():
        try:
            method = cls.from_peft(fields)
        except (TypeError, ValueError) as error:
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
    for name, tensor in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        key = name.removesuffix(".lora_A.weight")
        module = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        is_attention = f"{key}.base_layer.out_proj.lora_A.weight" in tensors
        alpha = _alpha(fields.get("alpha_pattern") or {}, module, method.alpha, path)
        try:
            site = method.at(tensor.shape[0], alpha)
        except ValueError as error:
            raise AdapterError(f"{path}: {module}: {error}") from None
        found[join(module, "in_proj_weight" if is_attention else "weight")] = site
    if not found:
        raise AdapterError(f"{path}: no tensor is called {PREFIX}<module>.lora_A.weight: nothing here is an adapter")
    return found


def full_entries(tensors: Iterable[str]) -> dict[str, str]:
    """Return the entries trained in full among a folder's tensors: their name in the network by PEFT's name."""
    return {
        name: name.removeprefix(PREFIX).replace(".base_layer.", ".")
        for name in tensors
        if not re.search(r"\.lora_[A-Za-z_]+(\.weight)?$", name)
    }


def _alpha(patterns: Mapping[str, Any], module: str, default: float, path: object) -> float:
    for pattern, alpha in patterns.items():
        if not _LITERAL_NAME.fullmatch(pattern):
            raise AdapterError(
                f"{path}: alpha_pattern key {pattern!r} is a regular expression, and none from a file is run: "
                "write module names there"
            )
        literal = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if module == literal or (not pattern.startswith("^") and module.endswith(f".{literal}")):
            return float(alpha)
    return default
