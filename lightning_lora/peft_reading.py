"""Read PEFT's on-disk format: which matrices a folder that PEFT wrote adapts, and where their factors lie in it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_lora.files import AdapterError
from lightning_lora.method import Method, known_methods
from lightning_lora.peft_format import LAST_DOUBLING, PREFIX
from lightning_lora.peft_layers import (
    ConvolutionForm,
    EmbeddingForm,
    Form,
    HadamardConvolutionForm,
    HadamardEmbeddingForm,
    HadamardForm,
    ParameterForm,
    Stored,
    TripletForm,
    VectorForm,
)
from lightning_lora.sites import join

_FIRST_STACKS = "0.20.0"  # the first PEFT whose stacks lie as (n, out, in) unless the module says otherwise
_LITERAL_NAME = re.compile(r"\^?(\w|\\?[-.])+\$?", re.ASCII)
_FIRST = re.compile(
    r"\.(lora_A(\.weight)?|lora_embedding_A|vera_lambda_d|hira_A|hira_embedding_A)$"
)  # each adapter has one of these
_FACTOR = re.compile(r"\.(lora|vera|hira)_[A-Za-z_]+(\.weight)?$")


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
        if method is not None and "lora_alpha" in (method.peft_config() or {}) and "lora_alpha" not in fields:
            raise AdapterError(
                f"{path}: its config has no lora_alpha, so the scale is not known: add what was trained with"
            )
        if method is not None:
            return method
    kinds = {config["peft_type"] for cls in known_methods().values() if (config := cls().peft_config())}
    raise AdapterError(
        f"{path}: peft_type={fields.get('peft_type')!r} is not supported; known: {', '.join(sorted(kinds))}"
    )


def read_sites(
    fields: Mapping[str, Any], tensors: Mapping[str, Tensor], path: object
) -> tuple[dict[str, Method], dict[str, Stored]]:
    """Return the method of each site in a folder that PEFT wrote, and where its factors lie.

    Which of several adapted parameters of one module has which of the module's wrappers is not in the files: they are
    taken in alphabetical order.

    Args:
        fields: The content of ``adapter_config.json``.
        tensors: The content of the weights file, by name.
        path: For messages.

    Raises:
        AdapterError: If nothing is an adapter, or a pattern cannot be read literally.
    """
    method = read_config(fields, path)
    methods: dict[str, Method] = {}
    stored: dict[str, Stored] = {}
    for module, owners in _owners(tensors).items():
        try:
            names = _target_parameters(fields, module)
            if len(owners) != max(1, len(names)):
                raise ValueError(
                    f"which {len(owners)} of its parameters are adapted cannot be told from "
                    f"target_parameters={fields.get('target_parameters')!r}"
                )
            if not names:
                name, values = _layer(fields, method, module, owners[0], tensors)
                methods[name], stored[name] = values
            for name, owner in zip(names, owners, strict=bool(names)):
                r = _value(fields, "rank_pattern", name, method.r)
                alpha = float(_value(fields, "alpha_pattern", name, method.alpha))
                down = tensors.get(f"{owner}.lora_A.weight")
                if down is not None and down.shape[:1] != (r,) and _is_older(fields, _FIRST_STACKS):
                    raise ValueError(
                        f"a PEFT before {_FIRST_STACKS} stored stacks of matrices in another way, and "
                        f"peft_version={fields.get('peft_version')!r}: merge it with the PEFT that wrote it"
                    )
                methods[name], stored[name] = method.at(r, alpha), Stored(owner, ParameterForm)
        except (TypeError, ValueError, OverflowError) as error:
            raise AdapterError(f"{path}: {module}: {error}") from None
    if not methods:
        raise AdapterError(f"{path}: no tensor is called {PREFIX}<module>.lora_A.weight: nothing here is an adapter")
    return methods, stored


def _layer(
    fields: Mapping[str, Any], method: Method, module: str, owner: str, tensors: Mapping[str, Tensor]
) -> tuple[str, tuple[Method, Stored]]:
    """Return the site that an adapter on a layer is, its method, and where its factors lie."""
    form: type[Form]
    if f"{owner}.lora_E" in tensors:
        return join(module, "weight"), (method, Stored(owner, TripletForm))
    if f"{owner}.vera_lambda_d" in tensors:
        return join(module, "weight"), (method, Stored(owner, VectorForm))
    looked_up = f"{owner}.hira_embedding_A" in tensors
    if looked_up or f"{owner}.hira_A" in tensors:
        down = tensors[f"{owner}.hira_embedding_A" if looked_up else f"{owner}.hira_A"]
        form = HadamardConvolutionForm if down.dim() > 2 else HadamardForm
        r = down.shape[0] if down.dim() else 0
        return join(module, "weight"), (
            method.at(r, float(r)),
            Stored(owner, HadamardEmbeddingForm if looked_up else form),
        )
    if f"{owner}.lora_embedding_A" in tensors:
        form, down = EmbeddingForm, tensors[f"{owner}.lora_embedding_A"]
    else:
        down = tensors[f"{owner}.lora_A.weight"]
        form = ConvolutionForm if down.dim() > 2 else Form
    r = next(iter(down.shape), 0)
    if r not in (0, method.r) and not fields.get("rank_pattern"):
        raise ValueError(
            f"r={method.r} in the config, {down.shape[0]} in the tensors: the files are of different saves"
        )
    outer, _, child = owner.rpartition(".base_layer.")
    in_attention = child == "out_proj" and f"{outer}.lora_A.weight" in tensors
    in_attention = in_attention and not _target_parameters(fields, _parent(module))
    alpha = float(_value(fields, "alpha_pattern", _parent(module) if in_attention else module, method.alpha))
    if in_attention and _doubles(fields):
        alpha *= 2
    parameter = "in_proj_weight" if f"{owner}.base_layer.out_proj.lora_A.weight" in tensors else "weight"
    return join(module, parameter), (method.at(r, alpha), Stored(owner, form))


def _owners(tensors: Iterable[str]) -> dict[str, list[str]]:
    """Return PEFT's names of the wrappers around each adapted module, outermost first, by the module's own name."""
    adapted = _adapted(tensors)
    found: dict[str, list[str]] = {}
    for owner in adapted:
        found.setdefault(_without_base_layers(owner, adapted).removeprefix(PREFIX), []).append(owner)
    return {module: sorted(owners, key=len) for module, owners in found.items()}


def _adapted(tensors: Iterable[str]) -> list[str]:
    """Return the adapted modules by the names that PEFT gives them in a file."""
    return [_FIRST.sub("", name) for name in tensors if _FIRST.search(name)]


def _target_parameters(fields: Mapping[str, Any], module: str) -> list[str]:
    """Return the parameters of a module that ``target_parameters`` means, in alphabetical order."""
    entries = fields.get("target_parameters") or []
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise ValueError(f"target_parameters={entries!r} is no list of names")
    names = {(entry, join(module, entry.rpartition(".")[2])) for entry in entries}
    return sorted({name for entry, name in names if name == entry or name.endswith(f".{entry}")})


def _doubles(fields: Mapping[str, Any]) -> bool:
    """Tell whether the PEFT that wrote a config adds the change of an attention's output projection twice.

    https://github.com/huggingface/peft/pull/3774.
    """
    return _is_older(fields, LAST_DOUBLING, or_equal=True)


def _is_older(fields: Mapping[str, Any], version: str, or_equal: bool = False) -> bool:
    """Tell whether a config is by an older PEFT than this; before 0.18 they do not write their number."""
    found = re.match(r"(\d{1,9})\.(\d{1,9})\.(\d{1,9})", str(fields.get("peft_version")))
    if found is None:
        return True
    one, other = tuple(map(int, found.groups())), tuple(map(int, version.split(".")))
    return one <= other if or_equal else one < other


def without_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a folder's tensors without the copies that PEFT writes of a bias in a module that is trained in full."""
    plain = {name: re.sub(r"\.(modules_to_save|original_module)\.", ".", name) for name in tensors}
    return {name: tensor for name, tensor in tensors.items() if plain[name] == name or plain[name] not in tensors}


def with_masked_triplets(fields: Mapping[str, Any], tensors: Mapping[str, Tensor], path: object) -> dict[str, Tensor]:
    """Return a folder's tensors with zeros in the places of the triplets that PEFT's AdaLoRA dropped when it saved.

    Args:
        fields: The content of ``adapter_config.json``.
        tensors: The content of the weights file, by name.
        path: For messages.

    Raises:
        AdapterError: If what was kept and what is there differ.
    """
    whole = dict(tensors)
    for name, kept in (fields.get("rank_pattern") or {}).items() if fields.get("peft_type") == "ADALORA" else ():
        owner = PREFIX + name.removesuffix(".lora_E")
        mask = torch.tensor([flag is True for flag in kept] if isinstance(kept, list) else [], dtype=torch.bool)
        for factor, dim in {"lora_A": 0, "lora_E": 0, "lora_B": 1}.items():
            part = tensors.get(f"{owner}.{factor}")
            if part is None or part.dim() != 2 or part.shape[dim] != int(mask.sum()):
                raise AdapterError(
                    f"{path}: rank_pattern keeps {int(mask.sum())} triplets of {name}, and {owner}.{factor} has "
                    f"{'no tensor' if part is None else list(part.shape)}: copy or save the folder again"
                )
            size = (len(mask), part.shape[1]) if dim == 0 else (part.shape[0], len(mask))
            whole[f"{owner}.{factor}"] = part.new_zeros(size).index_copy(dim, mask.nonzero().flatten(), part)
    return whole


def full_entries(tensors: Iterable[str]) -> dict[str, str]:
    """Return the entries that are not adapters among a folder's tensors: PEFT's name by their name in the network."""
    adapted = _adapted(tensors)
    return {
        _without_base_layers(name, adapted).removeprefix(PREFIX): name for name in tensors if not _FACTOR.search(name)
    }


def _without_base_layers(name: str, adapted: Collection[str]) -> str:
    """Return a name without the levels that PEFT puts below adapted modules."""
    parts = name.split(".")
    inside = [part == "base_layer" and ".".join(parts[:i]) in adapted for i, part in enumerate(parts)]
    return ".".join(part for part, level in zip(parts, inside, strict=True) if not level)


def _value(fields: Mapping[str, Any], option: str, name: str, default: Any) -> Any:
    """Return what a pattern of the config gives to a name; the first that fits decides."""
    patterns = fields.get(option) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{option} is a {type(patterns).__name__} where an object is expected")
    for pattern, value in patterns.items():
        if not _LITERAL_NAME.fullmatch(pattern):
            raise ValueError(
                f"{option} key {pattern!r} is a regular expression, and none from a file is run: "
                "write module names there"
            )
        literal = pattern.removeprefix("^").removesuffix("$").replace("\\", "")
        if name == literal or (not pattern.startswith("^") and name.endswith(f".{literal}")):
            return value
    return default


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
