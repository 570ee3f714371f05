"""Go on from a checkpoint: read it strictly, and fit it to adapters that were configured otherwise meanwhile."""

from __future__ import annotations

import os
import pickle
import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_lora.adapter import Adapter, stored_factors
from lightning_lora.analysis import product_svd
from lightning_lora.derived_groups import NAMES, PARTIAL
from lightning_lora.description import check_description, methods_of, redrawn, shares_of
from lightning_lora.files import AdapterError, some
from lightning_lora.inject import remove, restructures
from lightning_lora.layers import kind_of
from lightning_lora.layers.seam import AdaptedLayer
from lightning_lora.loading import adopt, check_described_base
from lightning_lora.method import Method
from lightning_lora.sharing import shares
from lightning_lora.sites import Site, clean, sites
from lightning_lora.state import own_entries

Mismatch = Literal["error", "reinit", "resize"]
_DAMAGE = (RuntimeError, EOFError, pickle.UnpicklingError, LookupError, TypeError, ValueError, AttributeError, OSError)


def read_whole(path: Any, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Read a checkpoint that nothing has damaged.

    torch.load does not look at the checksums that torch.save writes; these find every changed byte.

    Args:
        path: The checkpoint.
        read: What reads it.

    Raises:
        AdapterError: If it is damaged, or something else than a checkpoint.
    """
    if os.path.lexists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise AdapterError(f"{path}: no file: give a checkpoint")
    try:
        if os.path.isfile(path) and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise AdapterError(
                    f"{path}: the checksum of {damaged} in it does not fit: it was changed or damaged after it was "
                    "written: take another one"
                )
        return read()
    except (AdapterError, FileNotFoundError):
        raise
    except (*_DAMAGE, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise AdapterError(f"{path}: damaged, or no checkpoint of plain values ({reason}): take another one") from None


def restructure(model: nn.Module, described: Mapping[str, Any], path: object) -> None:
    """Give adapters the structure that training had given those of a checkpoint, where the method changes it.

    Args:
        model: The adapted model; with adapters of another method it stays as it is.
        described: The checkpoint's own section.
        path: For messages.
    """
    check_description(described, path)
    task = described["task"]
    theirs = methods_of(described, path)
    ours = {site.name: site.adapter(task).method for site in sites(model, task)}
    if ours == theirs and shares(model, task) == shares_of(described):
        return
    if restructures(model, next(iter(theirs.values())), task):
        remove(model, task)
        adopt(model, described, path, allow_base_mismatch=True)


def check_same(
    model: nn.Module, described: Mapping[str, Any], path: object, *, allow_base_mismatch: bool = False
) -> None:
    """Raise ``AdapterError`` unless a checkpoint's description fits the adapters that the model has.

    Args:
        model: The adapted model.
        described: The checkpoint's own section.
        path: For the message.
        allow_base_mismatch: Leave the base's fingerprint out.
    """
    check_description(described, path)
    theirs = methods_of(described, path)
    task = described["task"]
    ours = {site.name: site.adapter(task).method for site in sites(model, task)}
    missing, extra = [n for n in theirs if n not in ours], [n for n in ours if n not in theirs]
    if missing or extra:
        raise AdapterError(
            f"{path}: it adapts other matrices than this run: only in the checkpoint: {some(missing) or 'none'}; "
            f"only here: {some(extra) or 'none'}. Use the target_modules that it was trained with, or say "
            "resume_mismatch='reinit'"
        )
    for name, method in theirs.items():
        if method != ours[name]:
            raise AdapterError(
                f"{path}: {name} was trained with {method}, but this run has {ours[name]}: give method, rank_pattern "
                "and alpha_pattern as they were, or say resume_mismatch='reinit' or 'resize'"
            )
    if not allow_base_mismatch:
        check_described_base(path, model, sites(model, task), described)
    redrawn(described, path)


def refit(
    model: nn.Module,
    described: Mapping[str, Any],
    checkpoint: dict[str, Any],
    path: object,
    *,
    resize: bool,
    allow_base_mismatch: bool,
) -> str | None:
    """Change a checkpoint, in place, into one of this model: its values where they fit, and else what the model has.

    An adapter fits if its method, rank and scale are the same and every factor is there. One of another rank or scale
    can be resized where it is a plain pair of factors: a higher rank adds rows to A as they were drawn and zero columns
    to B, so the function stays what it was; a lower one takes the best approximation of the change (Eckart and Young,
    1936). Optimizers lose their state of what is fresh or resized, and methods that of their schedules.

    Args:
        model: The adapted model, with fresh adapters.
        described: The checkpoint's own section.
        checkpoint: The checkpoint.
        path: For messages.
        resize: Whether to resize.
        allow_base_mismatch: Leave the base's fingerprint out.

    Returns:
        What was not taken as it was, in words; None if everything was.

    Raises:
        AdapterError: If the checkpoint was trained on another base, or has what cannot be fitted.
    """
    check_description(described, path)
    task, theirs = described["task"], methods_of(described, path)
    every = sites(model, task)
    found = [site for site in every if site.name in theirs]
    if not allow_base_mismatch:
        check_described_base(path, model, found, described)
    redrawn(described, path)
    given = {clean(name): value for name, value in checkpoint["state_dict"].items()}
    ours = own_entries(model)
    present = {name: value for name, value in model.state_dict().items() if name in ours}
    live = {clean(name): value for name, value in present.items()}
    values = {name: given[name] for name in live.keys() & given.keys() if given[name].shape == live[name].shape}
    resized: list[str] = []
    place = {id(site.adapter(task)): site for site in every}
    parted = any(hasattr(site.adapter(task), "shared") for site in every) and theirs != {
        site.name: site.adapter(task).method for site in every
    }  # what adapters share fits all of them or none
    for name, adapter in model.named_modules(remove_duplicate=False):
        if not isinstance(adapter, Adapter) or id(adapter) not in place:
            continue
        prefix, site = clean(name), place[id(adapter)]
        factors = {factor: given.get(f"{prefix}.{factor}") for factor in stored_factors(adapter)}
        taken = {} if parted else _taken(site, adapter, theirs.get(site.name), factors, resize)
        for factor, before in factors.items():
            values.pop(f"{prefix}.{factor}", None)
            if factor in taken:
                values[f"{prefix}.{factor}"] = taken[factor]
                resized += [f"{prefix}.{factor}"] if taken[factor] is not before else []
    checkpoint["state_dict"] = {name: values.get(clean(name), value) for name, value in present.items()}
    fresh, unused = sorted(live.keys() - values.keys()), sorted(given.keys() - live.keys())
    if not (fresh or resized or unused):
        return None
    if "current_model_state" in checkpoint:
        raise AdapterError(
            f"{path} was written with a moving average, which cannot be fitted to other adapters: leave out "
            "resume_mismatch and give the configuration that it was written with"
        )
    if "optimizer_states" in checkpoint:
        changed = {*fresh, *resized}
        checkpoint["optimizer_states"] = [_without(one, changed, path) for one in checkpoint["optimizer_states"]]
    for name, own in checkpoint.get("callbacks", {}).items():
        if name.startswith("LoRACallback"):
            own["schedules"] = []
    parts = {"start fresh": fresh, "are resized": resized, "are left out": unused}
    words = "; ".join(f"{len(names)} {what} ({some(names)})" for what, names in parts.items() if names)
    return f"{path} is of another configuration, so not all of its values are resumed: {words}"


def _taken(
    site: Site, adapter: Adapter, method: Method | None, given: Mapping[str, Tensor | None], resize: bool
) -> dict[str, Tensor]:
    """Return an adapter's factors from those in a checkpoint; none if they do not fit."""
    own = {name: value for name, value in adapter.state_dict().items() if name in given}
    factors = {name: value for name, value in given.items() if value is not None}
    if type(method) is not type(adapter.method) or len(factors) < len(own):
        return {}
    scaling = _scaling(site, method)
    others = [name for name in own if factors[name].shape != own[name].shape]
    if not others and scaling == adapter.scaling:
        return factors
    pair = getattr(adapter, "lora_B", None), getattr(adapter, "lora_A", None)
    plain = all(one is other for one, other in zip(adapter.factors(), pair, strict=True))
    if not resize or not plain or not scaling or not {"lora_A", "lora_B"}.issuperset(others):
        return {}
    up, down = factors["lora_B"].double(), factors["lora_A"].double()
    r, before = adapter.method.r, down.shape[-2]
    if before > r:
        left, values, right = product_svd(up, down)
        root = values[..., :r].sqrt()
        up, down = left[..., :r] * root[..., None, :], root[..., None] * right[..., :r, :]
    elif before < r:
        down = torch.cat([down, own["lora_A"][..., before:, :].to(down)], -2)
        up = torch.cat([up, up.new_zeros(*up.shape[:-1], r - before)], -1)
    new = {"lora_A": down, "lora_B": up * (scaling / adapter.scaling)}
    if any(value.shape != own[name].shape for name, value in new.items()):
        return {}
    return factors | {name: value.to(factors[name].dtype) for name, value in new.items()}


def _scaling(site: Site, method: Method) -> float | None:
    """Return the scale that a method's adapter has on a site; None if it can have none there."""
    layout = site.slot.layout
    size = (kind_of(site.module) or AdaptedLayer).size(site.module, site.parameter)
    try:
        meta = torch.device("meta")
        return method.build(layout.shape(size), seed=0, device=meta, dtype=torch.float32, layout=layout).scaling
    except (RuntimeError, TypeError, ValueError, OverflowError):
        return None


def _without(state: dict[str, Any], changed: Collection[str], path: object) -> dict[str, Any]:
    """Return an optimizer's state without that of some parameters, ready for groups that have others."""
    if NAMES not in state:
        raise AdapterError(
            f"{path}: the states of its optimizers carry no names, so they cannot be fitted to other parameters: "
            "resume with the configuration that it was written with"
        )
    gone = {
        number
        for group, names in zip(state["param_groups"], state[NAMES], strict=True)
        for number, name in zip(group["params"], names, strict=True)
        if name in changed
    }
    kept = {number: value for number, value in state["state"].items() if number not in gone}
    return {**state, "state": kept, PARTIAL: True}
