"""From the patterns that a user writes to the matrices and modules that they mean."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

from lightning_lora.candidates import Candidate, candidates, joined, of_known_kind
from lightning_lora.gradient_stops import why_no_gradient
from lightning_lora.layers import KINDS, kind_of
from lightning_lora.layers.seam import AdaptedLayer
from lightning_lora.sites import clean, join, named_base_modules

ALL_LINEAR = "all-linear"
_GLOB = re.compile(r"[*?\[]")
_LONGEST_EXPRESSION = 10_000  # characters
V = TypeVar("V")
Parts = Mapping[str, Sequence[str] | Mapping[str, int]]


def matches(pattern: str, name: str) -> bool:
    """Tell whether a name or glob means a dotted name, as a whole or from one of its dots on.

    Args:
        pattern: ``"q_proj"``, ``"layers.0.q_proj"`` or with ``* ? [0-9]``, where ``*`` also crosses dots.
        name: The dotted name.
    """
    if not _GLOB.search(pattern):
        return name == pattern or name.endswith(f".{pattern}")
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def with_parts(available: list[Candidate], fused: Parts) -> list[Candidate]:
    """Return the candidates with those that hold several matrices in one replaced by their parts.

    Args:
        available: The candidates.
        fused: Names or globs of fused matrices, each with the names of its equal parts in order, or with the number of
            rows of each part by name.

    Raises:
        ValueError: If an entry fits nothing, or the parts do not make up the whole.
    """
    for pattern, parts in fused.items():
        own = [
            one
            for one in available
            if matches(pattern, one.site.name) or matches(pattern, one.site.name.rpartition(".")[0])
        ]
        if not own:
            raise ValueError(f"fused entry {pattern!r} matches nothing. {_nearest(pattern, available)}")
        replaced = {one.site.name: _parts(one, pattern, parts) for one in own}
        available = [part for one in available for part in replaced.get(one.site.name, [one])]
    return available


def _parts(one: Candidate, pattern: str, parts: Sequence[str] | Mapping[str, int]) -> list[Candidate]:
    if len(one.shape) != 2 or one.layout.looked_up or one.layout.rows is not None or not one.linear:
        raise ValueError(
            f"fused entry {pattern!r} fits {one.site.name}, which is no linear layer's matrix as a whole: name one "
            "that is"
        )
    total = one.shape[0]
    if not isinstance(parts, Mapping):
        parts = dict.fromkeys(parts, total // max(1, len(parts)))
    if sum(parts.values()) != total or min(parts.values(), default=0) < 1:
        raise ValueError(
            f"fused[{pattern!r}]={dict(parts)} has {sum(parts.values())} rows, but {one.site.name} has {total}: "
            "give the rows of each part, such as {'q': 64, 'k': 16, 'v': 16}"
        )
    found, start = [], 0
    for name, rows in parts.items():
        if not name.isidentifier():
            raise ValueError(f"fused[{pattern!r}]: {name!r} is no name for a part: use letters, digits and '_'")
        found.append(one.part(name, (start, start + rows)))
        start += rows
    return found


def find_targets(
    model: nn.Module,
    target_modules: str | Sequence[str],
    exclude_modules: Sequence[str] = (),
    modules_to_save: Sequence[str] = (),
    fused: Parts | None = None,
) -> list[Candidate]:
    """Return the matrices that the patterns choose.

    Args:
        model: Any module.
        target_modules: ``"all-linear"`` for every linear layer and attention but the output head that a transformers
            model declares; or a list of names or globs, each matched against whole names or their ends; or one string,
            taken as a regular expression for whole names (as PEFT does). A parameter of a module of no known kind is
            meant only by an entry that ends in its very name.
        exclude_modules: Names or globs to leave out.
        modules_to_save: Names or globs of what is trained in full instead, with everything inside it.
        fused: As for ``with_parts``.

    Raises:
        ValueError: If an entry matches nothing, or nothing is left; it names the entry and the nearest names.
    """
    available = with_parts(candidates(model), fused or {})
    left_out = _excluded(model, exclude_modules, "exclude_modules") | _excluded(
        model, modules_to_save, "modules_to_save"
    )
    if target_modules == ALL_LINEAR:
        chosen = _all_linear(model, available, left_out)
    elif isinstance(target_modules, str):
        if len(target_modules) > _LONGEST_EXPRESSION:
            raise ValueError(
                f"target_modules is a regular expression of {len(target_modules)} characters, at most "
                f"{_LONGEST_EXPRESSION}: give a list of names"
            )
        try:
            expression = re.compile(target_modules)
        except re.error as error:
            raise ValueError(f"target_modules={target_modules!r} is not a regular expression: {error}") from None
        layers = [one for one in available if of_known_kind(one)]
        chosen = [one for one in layers if any(expression.fullmatch(name) for name in one.names)]
        if not chosen:
            hint = (
                f"; a name goes in a list: target_modules=[{target_modules!r}]" if target_modules.isidentifier() else ""
            )
            raise ValueError(
                f"target_modules={target_modules!r} is a regular expression for whole names and matches none{hint}. "
                + _nearest(target_modules, available)
            )
    else:
        chosen = _listed(model, available, target_modules)
    named_out = [*exclude_modules, *modules_to_save]
    kept = [one for one in chosen if id(one.site.module) not in left_out and not _names_excluded(one, named_out)]
    if not kept:
        raise ValueError(
            f"nothing is left to adapt: target_modules={target_modules!r} chose {len(chosen)} matrices, and "
            f"exclude_modules={list(exclude_modules)!r} and modules_to_save={list(modules_to_save)!r} took out all"
        )
    return joined(kept)


def _means(pattern: str, one: Candidate) -> bool:
    """Tell whether a name or glob means a candidate; a glob never means a parameter of an unknown kind of module."""
    named = pattern.rpartition(".")[2] == one.site.parameter
    return (named or of_known_kind(one)) and any(matches(pattern, name) for name in one.names)


def _all_linear(model: nn.Module, available: list[Candidate], left_out: set[int]) -> list[Candidate]:
    """Return all matrices but the output heads', after a check that "all" holds for the layers that look linear."""
    what = f"target_modules='{ALL_LINEAR}'"
    heads = _output_heads(model)
    unknown = {
        clean(name): module
        for name, module in named_base_modules(model)
        if name and id(module) not in left_out | heads and _looks_linear(module)
    }
    if unknown:
        first, module = next(iter(unknown.items()))
        others = f", and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        kind = why_no_gradient(module) or f"a {type(module).__name__}"
        raise ValueError(
            f"{what} cannot adapt {first}, {kind}{others}: {_known()}. Leave out what is to stay "
            f"frozen with exclude_modules={_ends(unknown)}, or name what is to be adapted with target_modules=[...]"
        )
    linear = [one for one in available if one.linear]
    if not linear:
        named = [one.site.name.rpartition(".")[0] or one.site.name for one in available if of_known_kind(one)]
        write = f"; write target_modules={_ends(named)}" if named else ""
        raise ValueError(f"{what} found no linear layer in {type(model).__name__}: {_known()}{write}")
    chosen = [one for one in linear if id(one.site.module) not in heads]
    if all(id(one.site.module) in left_out for one in chosen) and heads:
        names = [clean(name) for name, module in named_base_modules(model) if id(module) in heads]
        raise ValueError(f"{what} leaves out the output head, and {names[0]} is all there is: target_modules={names}")
    return chosen


def _looks_linear(module: nn.Module) -> bool:
    """Tell whether a module is, by its class's name, a linear layer of a kind that is not known."""
    name = type(module).__name__
    holds_tensors = bool(module._parameters or module._buffers)
    like = name == "Linear" or (holds_tensors and "Linear" in name)
    return like and not any(kind_of(inner) for inner in module.modules())


def _ends(names: Iterable[str]) -> list[str]:
    """Return the fewest last parts that mean all names; a number means nothing by itself."""
    lasts = {name if name.rpartition(".")[2].isdigit() else name.rpartition(".")[2] for name in names}
    return sorted(lasts)


def _listed(model: nn.Module, available: list[Candidate], patterns: Sequence[str]) -> list[Candidate]:
    if not patterns:
        raise ValueError(f"target_modules=[] adapts nothing: write target_modules='{ALL_LINEAR}' or a list of names")
    chosen: dict[str, Candidate] = {}
    for pattern in patterns:
        hits = [one for one in available if _means(pattern, one)]
        if not hits:
            raise ValueError(_why_no_match(model, available, pattern))
        chosen.update((one.site.name, one) for one in hits)
    return [one for one in available if one.site.name in chosen]


def _why_no_match(model: nn.Module, available: list[Candidate], pattern: str) -> str:
    if pattern == ALL_LINEAR:
        return f"{ALL_LINEAR!r} stands alone, not in a list: write target_modules={ALL_LINEAR!r}"
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or not matches(pattern, clean(name)):
            continue
        stop = why_no_gradient(module)
        what = f"target_modules entry {pattern!r} matches {clean(name)}, {stop or f'a {type(module).__name__}'}"
        if stop is not None:
            return f"{what}: adapt layers that come after it instead"
        if any(kind_of(inner) for inner in module.modules()):
            return f"{what}: for all layers inside it write {clean(name) + '.*'!r}"
        return f"{what}, which has no matrix to adapt: {_known()}; to train it in full list it in modules_to_save"
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if matches(pattern, clean(name)):
            owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
            why = (
                f"its {owner} has no forward" if parameter.dim() in (2, 3) else f"its shape is {list(parameter.shape)}"
            )
            return (
                f"target_modules entry {pattern!r} matches {clean(name)}, which cannot be adapted ({why}; a matrix "
                "or a stack of them can, where its own module's forward reads it): to train it in full list it in "
                "modules_to_save"
            )
    return f"target_modules entry {pattern!r} matches nothing. {_nearest(pattern, available)}"


def choose_values(patterns: Mapping[str, V], chosen: Iterable[Candidate], option: str) -> dict[str, V]:
    """Return the value of each site, by site name, that a pattern gives one; the first pattern that fits decides.

    Args:
        patterns: Names or globs to values, in the order of ``rank_pattern`` or ``alpha_pattern``.
        chosen: The sites to look among.
        option: The option's name, for the error.

    Raises:
        ValueError: If a pattern fits no site.
    """
    chosen = list(chosen)
    values: dict[str, V] = {}
    for pattern, value in patterns.items():
        hits = [one for one in chosen if any(matches(pattern, name) for name in one.names)]
        if not hits:
            raise ValueError(
                f"{option} entry {pattern!r} fits none of the adapted modules. {_nearest(pattern, chosen)}"
            )
        for one in hits:
            values.setdefault(one.site.name, value)
    return values


def find_modules_to_save(model: nn.Module, patterns: Sequence[str]) -> list[tuple[nn.Module, str | None]]:
    """Return what the entries of ``modules_to_save`` mean: (module, None) or (owner, parameter name).

    Raises:
        ValueError: If an entry matches nothing.
    """
    found: list[tuple[nn.Module, str | None]] = []
    named = named_base_modules(model, remove_duplicate=False) if patterns else []
    for pattern in patterns:
        hits: list[tuple[nn.Module, str | None]] = [
            (module, None) for name, module in named if name and matches(pattern, clean(name))
        ]
        if not hits:
            for prefix, owner in named:
                own = (*owner._parameters, *owner._buffers)
                hits += [(owner, name) for name in own if matches(pattern, clean(join(prefix, name)))]
        if not hits:
            raise ValueError(_unmatched(model, pattern, "modules_to_save"))
        found += hits
    return found


def _excluded(model: nn.Module, patterns: Sequence[str], option: str) -> set[int]:
    """Return the ids of all modules inside those that the patterns name."""
    left_out: set[int] = set()
    for pattern in patterns:
        hits = [m for name, m in model.named_modules(remove_duplicate=False) if name and matches(pattern, clean(name))]
        parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        if not hits and not any(matches(pattern, clean(name)) for name in parameters):
            raise ValueError(_unmatched(model, pattern, option))
        left_out.update(id(inner) for hit in hits for inner in hit.modules())
    return left_out


def _names_excluded(one: Candidate, patterns: Sequence[str]) -> bool:
    return any(matches(pattern, name) for pattern in patterns for name in one.names)


def _output_heads(model: nn.Module) -> set[int]:
    """Return the ids of the output layers that transformers models declare; they are rarely adapted and often tied."""
    heads: set[int] = set()
    for _, module in named_base_modules(model):
        declare = getattr(type(module), "get_output_embeddings", None)
        if declare is not None:
            heads.add(id(declare(module)))
    return heads


def _known() -> str:
    kinds = [kind for kind in KINDS if kind.matrices is not AdaptedLayer.matrices]
    names = [plain.__name__ for kind in kinds for plain in kind.adapts]
    return f"layers that can be adapted are {', '.join(names)}, transformers' Conv1D, and any matrix named in full"


def _unmatched(model: nn.Module, pattern: str, option: str) -> str:
    names = [clean(name) for name, _ in model.named_modules(remove_duplicate=False) if name]
    return f"{option} entry {pattern!r} matches nothing. {_suggest(pattern, names)}"


def _nearest(pattern: str, available: Iterable[Candidate]) -> str:
    usual_first = sorted(available, key=lambda one: (not one.linear, not of_known_kind(one)))
    names = [name for one in usual_first for name in sorted(one.names)]
    return _suggest(pattern, [name for name in names if name.rpartition(".")[2] not in ("", "weight")])


def _suggest(pattern: str, names: list[str]) -> str:
    lasts = (name.rpartition(".")[2] for name in names)
    known = list(dict.fromkeys([*(last for last in lasts if not last.isdigit()), *names]))
    close = get_close_matches(pattern, known, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(map(repr, close))}?"
    return f"Names that exist: {', '.join(known[:8])}" + (", ..." if len(known) > 8 else "")
