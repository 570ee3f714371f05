"""Fit what a folder holds to the layers, or to the weights alone, that it is to change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lightning_lora.adapter import Adapter, fits, stored_factors
from lightning_lora.candidates import Candidate
from lightning_lora.files import AdapterError, some
from lightning_lora.layout import Layout
from lightning_lora.peft_layers import (
    LINEAR_FORMS,
    EmbeddingForm,
    Form,
    ParameterForm,
    Stored,
    layer_form,
    parameter_form,
)
from lightning_lora.reading import AdapterFile

_MERGE_MODEL = "load it into the model, with load_adapter, and merge it there, with merge_"


def check_computed_alike(file: AdapterFile, chosen: list[Candidate]) -> None:
    """Raise ``AdapterError`` if PEFT computes something else than this library on a layer that it adapted.

    Args:
        file: The folder's content; one of ours always fits.
        chosen: What its sites are in the model at hand.
    """
    if file.root is not None:
        return
    for one, (name, stored) in zip(chosen, file.stored.items(), strict=True):
        if stored.form is ParameterForm:
            form, reason = parameter_form(one.site.module, one.site.parameter, one.layout, one.size)
        else:
            peft_type = (file.methods[name].peft_config() or {}).get("peft_type", "LORA")
            form, reason = layer_form(one.site.module, one.site.parameter, peft_type)
        if form is not stored.form:
            reason = reason or f"PEFT stores its factors in another way on a {type(one.site.module).__name__}"
            raise AdapterError(f"{file.path}: {name} was trained with PEFT as something else than it is here: {reason}")


def fit_full_values(file: AdapterFile, weights: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Return what is trained in full, without the unchanged copies of adapted embeddings that PEFT writes.

    Args:
        file: The folder's content.
        weights: The base's own weight of each site, by the site's name.
    """
    values = file.full_values()
    if file.root is not None:
        return values
    return {name: value for name, value in values.items() if not _same(value, weights.get(name))}


def _same(value: Tensor, weight: Tensor | None) -> bool:
    """Tell whether a value is a weight's, as far as the one of less precision can say it."""
    if weight is None or value.shape != weight.shape:
        return False
    narrow = min(value.dtype, weight.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(value.to(narrow), weight.detach().to("cpu", narrow))


def fit_factors(file: AdapterFile, chosen: list[Candidate]) -> Iterator[dict[str, Tensor]]:
    """Yield each site's factors after checking that every expected tensor is there in its shape, and no other.

    Args:
        file: The folder's content.
        chosen: What its sites are in the model at hand.
    """
    file = file._replace(layouts=dict(zip(file.methods, [one.layout for one in chosen], strict=True)))
    used = set(file.full.values())
    known: dict[tuple[object, ...], tuple[Adapter, dict[str, torch.Size]]] = {}  # few kinds of many layers
    for one, name in zip(chosen, file.methods, strict=True):
        like = (id(file.methods[name]), file.stored[name].form, one.layout, tuple(one.size))
        try:
            if like not in known:
                blank = _blank(file, name, one.layout, one.size)
                known[like] = blank, _shapes(file, name, blank, one.size)
            blank, shapes = known[like]
        except (RuntimeError, TypeError):
            r = file.methods[name].r
            raise AdapterError(
                f"{file.path}: {name}: r={r} is beyond all bounds: copy or save the folder again"
            ) from None
        for factor, shape in shapes.items():
            key = file.stored[name].key(factor)
            tensor = file.tensors.get(key)
            if tensor is None and factor not in stored_factors(blank):
                continue  # PEFT leaves it out too, and does not say for which sizes it was drawn: those of the model
            if tensor is None:
                raise AdapterError(f"{file.path}: {key} is missing: copy or save the folder again")
            if not fits(factor, tensor.shape, shape):
                raise AdapterError(
                    f"{file.path}: {key} has shape {list(tensor.shape)}, but {list(shape)} is expected: "
                    f"r={file.methods[name].r} on a {' x '.join(map(str, one.shape))} matrix"
                )
            if not tensor.is_floating_point():
                raise AdapterError(f"{file.path}: {key} is stored as {tensor.dtype}, not as floating point")
            used.add(key)
        yield file.factors(name, blank)
    extra = sorted(set(file.tensors) - used)
    if extra:
        raise AdapterError(f"{file.path}: it holds tensors that belong to no adapted module: {some(extra)}")


def fit_to_weights(file: AdapterFile, sizes: Mapping[str, tuple[int, ...]], *, has_turned: bool) -> AdapterFile:
    """Return the file with the layout of every site, told from the sizes of weights where the file does not say it.

    What a layer does with its weight cannot be told, so PEFT's factors are taken for what PEFT itself merges. Its
    ``fan_in_fan_out`` holds for the last layer that it met, so it is not believed where layers of both kinds are seen.

    Args:
        file: The folder's content.
        sizes: The size of each site's weight, by the site's name.
        has_turned: Whether the base has layers whose weights lie as (in, out).

    Raises:
        AdapterError: If factors do not fit a weight, or fit it in several ways.
    """
    siblings = file.siblings()
    alone = [[name] for name in file.methods if not any(name in group for group in siblings)]
    found: dict[str, tuple[Stored, Layout]] = {}
    square: list[str] = []
    for group in (*siblings, *alone):
        ways = _ways(file, group, sizes)
        if len(ways) == 1 and len({stored.owner for stored, _ in ways[0].values()}) == len(group):
            found |= ways[0]
        elif len(ways) < 2:
            raise AdapterError(
                f"{file.path}: its factors do not fit {some(group)} of the base: give the one it was trained on"
            )
        elif file.stored[group[0]].form in LINEAR_FORMS:
            square += group
        else:
            raise AdapterError(f"{file.path}: its factors fit {some(group)} in several ways: {_MERGE_MODEL}")
    seen = {layout.transposed for stored, layout in found.values() if stored.form in LINEAR_FORMS}
    seen |= {True} if has_turned else set()
    for name in square:
        if not seen <= {file.fan_in_fan_out}:
            raise AdapterError(f"{file.path}: {name} may lie as (out, in) or as (in, out): {_MERGE_MODEL}")
        found[name] = file.stored[name], Layout(transposed=file.fan_in_fan_out)
    stored, layouts = {name: found[name][0] for name in file.methods}, {name: found[name][1] for name in file.methods}
    return file._replace(stored=stored, layouts={**layouts})


def _ways(
    file: AdapterFile, group: list[str], sizes: Mapping[str, tuple[int, ...]]
) -> list[dict[str, tuple[Stored, Layout]]]:
    """Return the ways in which the factors of one module's sites fit weights of these sizes; two are too many."""
    owners = [file.stored[name] for name in group]
    ways: list[dict[str, tuple[Stored, Layout]]] = []
    for transposed in (False, True):
        places: dict[str, list[tuple[Stored, Layout]]] = {}
        for name in group:
            layout = file.layouts[name] or _layout(file.stored[name].form, len(sizes[name]), transposed)
            places[name] = [(one, layout) for one in _fitting(file, name, owners, layout, sizes[name])]
        for i in (0, -1) if all(places.values()) else ():
            way = {name: fitting[i] for name, fitting in places.items()}
            ways += [way] if way not in ways else []
    return ways


def _layout(form: type[Form], dims: int, transposed: bool) -> Layout:
    stacked = form is ParameterForm and dims == 3
    turned = transposed and (stacked or (form in LINEAR_FORMS and dims == 2))
    return Layout(transposed=turned, stacked=stacked, looked_up=issubclass(form, EmbeddingForm))


def _fitting(file: AdapterFile, name: str, owners: list[Stored], layout: Layout, size: tuple[int, ...]) -> list[Stored]:
    """Return those owners whose tensors have the shapes that an adapter on a weight of this size has."""
    try:
        shapes = _shapes(file, name, _blank(file, name, layout, size), size)
    except (RuntimeError, TypeError):
        return []
    there = [{factor: file.tensors.get(one.key(factor)) for factor in shapes} for one in owners]
    alike = [
        all(t is not None and fits(name, t.shape, shapes[name]) for name, t in tensors.items()) for tensors in there
    ]
    return [one for one, is_alike in zip(owners, alike, strict=True) if is_alike]


def _blank(file: AdapterFile, name: str, layout: Layout, size: tuple[int, ...]) -> Adapter:
    """Return the adapter that a site has on a weight of this size, without values."""
    method = file.methods[name]
    blank = method.build(layout.shape(size), seed=0, device=torch.device("meta"), dtype=torch.float32, layout=layout)
    method.attach({name: blank})
    return blank


def _shapes(file: AdapterFile, name: str, blank: Adapter, size: tuple[int, ...]) -> dict[str, torch.Size]:
    """Return the shape in the file of each of an adapter's factors."""
    form = file.stored[name].form
    written = form.written(file.methods[name], blank.state_dict())
    return {factor: form.stored(factor, tensor, size).shape for factor, tensor in written.items()}
