"""The 0/1 knapsack: which items are worth the most within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple


class _Packed(NamedTuple):
    """A choice among the items looked at so far: ``items`` is a linked list of (index, rest)."""

    weight: int
    value: float
    items: tuple[int, object] | None


def best_within(values: Sequence[float], weights: Sequence[int], budget: int) -> list[int]:
    """Return the indices of the items of the highest total value whose weights sum to no more than a budget.

    Exact: of the choices among the first items only those are kept that no other beats in weight and value (Nemhauser
    and Ullmann, 1969) and whose value, if the rest were divisible, would still reach that of a greedy choice.

    Args:
        values: What each item is worth; those that are worth nothing are left out.
        weights: Positive whole numbers.
        budget: The highest total weight.
    """
    useful = [i for i, value in enumerate(values) if value > 0 and weights[i] <= budget]
    order = sorted(useful, key=lambda i: values[i] / weights[i], reverse=True)
    cumulative = [0, *accumulate(weights[i] for i in order)]
    gains = [0.0, *accumulate(values[i] for i in order)]
    reached = _greedy(order, values, weights, budget)
    kept = [_Packed(0, 0.0, None)]
    for position, i in enumerate(order):
        added = [_Packed(p.weight + weights[i], p.value + values[i], (i, p.items)) for p in kept]
        candidates = sorted(kept + added, key=lambda p: (p.weight, -p.value))
        kept = []
        first, end = position + 1, len(order)  # of the items that are still to come and would fit as a whole
        for packed in candidates:
            room = budget - packed.weight
            if room < 0:
                break
            if kept and packed.value <= kept[-1].value:
                continue
            while end > first and cumulative[end] - cumulative[first] > room:
                end -= 1
            bound = packed.value + gains[end] - gains[first]
            if end < len(order):
                rest = room - (cumulative[end] - cumulative[first])
                bound += rest * values[order[end]] / weights[order[end]]
            if bound >= reached * (1 - 1e-12):
                kept.append(packed)
        reached = max(reached, kept[-1].value)
    chosen, items = [], kept[-1].items
    while items is not None:
        chosen.append(items[0])
        items = items[1]  # type: ignore[assignment]
    return sorted(chosen)


def _greedy(order: Sequence[int], values: Sequence[float], weights: Sequence[int], budget: int) -> float:
    value = 0.0
    for i in order:
        if weights[i] <= budget:
            budget -= weights[i]
            value += values[i]
    return value
