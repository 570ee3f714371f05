"""The matrices of a model that could be adapted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from lightning_lora.layers import kind_of
from lightning_lora.layers.attention import AdaptedMultiheadAttention
from lightning_lora.layers.parameters import AdaptedParameters
from lightning_lora.layout import Layout
from lightning_lora.sites import Site, clean, join, named_base_modules


class Candidate(NamedTuple):
    """A matrix, or a stack of them, that could be adapted.

    Attributes:
        site: Where it is.
        size: The size of the parameter.
        layout: How the matrix lies in the parameter.
        names: Every name that a pattern may call it by.
        linear: Whether ``"all-linear"`` means it.
        tied: Further modules that have the same parameter and are to use the same adapter.
        read: Whether its own layer is not called, because that of another one reads it (attention's ``out_proj``).
    """

    site: Site
    size: tuple[int, ...]
    layout: Layout
    names: frozenset[str]
    linear: bool = False
    tied: tuple[Site, ...] = ()
    read: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in) of the matrix, or (n, out, in) of the stack."""
        return self.layout.shape(self.size)

    def part(self, name: str, rows: tuple[int, int]) -> Candidate:
        """Return some of the matrix's rows as a matrix of its own.

        Args:
            name: The part's name.
            rows: First and one past the last row.
        """
        module = self.site.name.rpartition(".")[0]
        names = {join(module, name), join(self.site.name, name), *self.names}
        site = self.site._replace(name=f"{self.site.name}[{name}]")
        layout = dataclasses.replace(self.layout, rows=rows)
        return self._replace(site=site, layout=layout, names=frozenset(names))


def candidates(model: nn.Module) -> list[Candidate]:
    """Return every matrix of ``model`` that can be adapted, each once, with all names it is registered under."""
    found: dict[tuple[int, str], Candidate] = {}
    read_by: dict[tuple[int, str], set[str]] = {}
    for raw_name, module in named_base_modules(model, remove_duplicate=False):
        kind = kind_of(module)
        known = kind is not None and bool(kind.matrices(module))
        if kind is None and AdaptedParameters.fits(type(module)):
            kind = AdaptedParameters
        if kind is None:
            continue
        name = clean(raw_name)
        if issubclass(kind, AdaptedMultiheadAttention):
            for owner, parameter in kind.reads(module):
                if owner is not module:
                    read_by.setdefault((id(owner), parameter), set()).add(name)
        for parameter in kind.matrices(module):
            key = (id(module), parameter)
            full_name = join(name, parameter)
            names = frozenset({name, full_name} if known else {full_name})
            if key in found:
                found[key] = found[key]._replace(names=found[key].names | names)
            else:
                site = Site(full_name, module, parameter)
                size, layout = kind.size(module, parameter), kind.layout(module, parameter)
                found[key] = Candidate(site, size, layout, names, kind.linear)
    return [one._replace(names=one.names | read_by.get(key, set()), read=key in read_by) for key, one in found.items()]


def of_sites(model: nn.Module, found: Iterable[Site]) -> list[Candidate]:
    """Return the matrices that adapted sites are.

    Args:
        model: The adapted model.
        found: Its sites, or some of them.
    """
    there = {one.site.name: one for one in candidates(model)}
    chosen = []
    for site in found:
        whole, _, part = site.name.partition("[")
        rows = site.slot.layout.rows
        one = there[whole] if rows is None else there[whole].part(part.rstrip("]"), rows)
        chosen.append(one._replace(site=site))
    return chosen


def of_known_kind(one: Candidate) -> bool:
    """Tell whether a candidate is of a layer, rather than a parameter of any other module."""
    return kind_of(one.site.module) is not None


def joined(chosen: list[Candidate]) -> list[Candidate]:
    """Return candidates with those that have the same parameter joined, because tied layers share one adapter.

    Raises:
        ValueError: If two layers use one parameter in different ways.
    """
    first: dict[tuple[int, str, str], Candidate] = {}
    for one in chosen:
        parameter = one.site.module._parameters.get(one.site.parameter)
        part = one.site.name.rpartition("[")[2] if one.layout.rows else ""
        key = (id(parameter) if parameter is not None else id(one), one.site.parameter, part)
        if key not in first:
            first[key] = one
        elif dataclasses.replace(first[key].layout, looked_up=one.layout.looked_up) != one.layout:
            raise ValueError(
                f"{first[key].site.name} and {one.site.name} are one tied parameter that the two layers use "
                f"in different shapes: adapt one of them, for example with exclude_modules=['{one.site.name}']"
            )
        else:
            first[key] = first[key]._replace(tied=(*first[key].tied, one.site), names=first[key].names | one.names)
    return list(first.values())
