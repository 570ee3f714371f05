"""Dropout of an adapter's input, and its mask."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from lightning_lora.dropout import dropout, dropped, factor

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)


@DTYPES
@pytest.mark.parametrize("shape", [(3, 5), (7,), (0, 4), ()])
def test_elements_are_zero_or_divided_by_the_probability_that_they_stay(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape, dtype=dtype)
    left, mask = dropped(x, 0.25)
    assert (left.dtype, left.shape) == (dtype, shape)
    assert (mask.dtype, mask.shape) == (torch.bool, shape)
    assert torch.equal(left, torch.where(mask, x * (1 / 0.75), 0.0).to(dtype))


@pytest.mark.parametrize("p", [1e-4, 0.05, 0.5, 0.9, 0.9999, 1 - 1e-12])
def test_as_many_stay_as_are_to_stay_in_every_place(p: float) -> None:
    """Each element is drawn from one half of 64 bits, so both halves are looked at, and that they are independent."""
    _, mask = dropped(torch.ones(2**20, 2), p)
    n, stay = 2**20, 1 - p
    within = 5 * math.sqrt(n * p * stay)
    assert ((mask.sum(0) - n * stay).abs() <= within).all()
    both = stay**2
    assert abs(mask.all(1).sum().item() - n * both) <= 5 * math.sqrt(n * both * (1 - both))
    assert abs((mask[1:, 0] & mask[:-1, 1]).sum().item() - (n - 1) * both) <= 5 * math.sqrt(n * both * (1 - both))


def test_gradients_are_those_of_a_product_with_the_mask() -> None:
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)

    def seeded(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return dropout(x, 0.4)

    assert gradcheck(seeded, x)
    assert gradgradcheck(seeded, x)
    assert torch.equal(seeded(x) == 0, seeded(torch.ones(6, 5)) == 0)


class Tracked(Tensor):
    """A subclass, which may have a random number generator of its own."""


Function = Callable[[Tensor, float], Tensor]


@pytest.mark.parametrize(
    "looking_at",
    [
        lambda function: torch.compile(function, backend="eager", fullgraph=True),
        lambda function: torch.vmap(function, in_dims=(0, None), randomness="different"),
        lambda function: lambda x, p: function(x.as_subclass(Tracked), p),
    ],
    ids=["compiled", "vmap", "subclass"],
)
def test_it_is_pytorchs_own_where_something_looks_at_each_operation(looking_at: Callable[[Function], Function]) -> None:
    left = []
    for function in (dropout, F.dropout):
        torch.manual_seed(0)
        left.append(looking_at(function)(torch.ones(100, 100), 0.5))
    assert torch.equal(*left)
    assert set(left[0].unique().tolist()) == {0.0, 2.0}
    assert 4500 < (left[0] == 0).sum() < 5500


def test_nothing_is_dropped_at_zero() -> None:
    x = torch.randn(1000)
    left, mask = dropped(x, 0.0)
    assert mask.all()
    assert torch.equal(left, x)


def test_the_same_seed_gives_the_same_mask_and_the_generator_moves_on() -> None:
    x = torch.randn(50, 50)
    torch.manual_seed(1)
    first, second = dropped(x, 0.5)[1], dropped(x, 0.5)[1]
    torch.manual_seed(1)
    assert torch.equal(dropped(x, 0.5)[1], first)
    assert not torch.equal(first, second)


@DTYPES
def test_a_factor_multiplies_as_the_mask_does(dtype: torch.dtype) -> None:
    x, mask = torch.randn(9, 4, dtype=dtype), torch.rand(9, 4) < 0.5
    assert torch.equal(x * factor(mask, x), x * mask)
