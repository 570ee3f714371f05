r"""How LoRA's factors start: pure functions that return ``A`` (..., r, in) and ``B`` (..., out, r).

=============  ==========================================  =========================================
name           A, B                                        ``B @ A``
=============  ==========================================  =========================================
kaiming        uniform, 0                                  0
gaussian       N(0, 1 / r^2), 0                            0
orthogonal     random, from orthogonal subspaces of R^r    0 up to rounding
pissa          from the SVD of the weight, largest values  the weight's best rank-r part, over s
milora         likewise, smallest values                   the weight's least rank-r part, over s
pissa_niter_n  as pissa, by n rounds of a fast SVD         the same nearly
olora          from the QR decomposition of the weight     the weight's first columns, and what they span
eva            directions of the layer's inputs, 0         0
lora_ga        from the SVD of the weight's gradient       orthogonal to the gradient
=============  ==========================================  =========================================

Where ``B @ A`` is not 0 the papers subtract ``s * B @ A`` from the base. Here the base is never written: the adapter
keeps frozen copies ``A0``, ``B0`` of its start and adds ``s * (B @ A - B0 @ A0)``, which is the same function of the
factors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

Initialisation = Literal["kaiming", "gaussian", "orthogonal", "pissa", "milora", "olora", "eva", "lora_ga"]
FROM_DATA = ("eva", "lora_ga")
KEEPS_START = ("pissa", "milora", "olora", "lora_ga")  # B @ A is not 0, so the adapter keeps A0 and B0
_OVERSAMPLING = 10  # directions that a fast SVD takes beyond those asked for
_GAMMA = 16.0  # of LoRA-GA: how small its start is


def family(init: str) -> str:
    """Return an initialisation without a number of rounds: ``pissa`` of ``pissa_niter_16``.

    Args:
        init: As ``LoRA`` has it.
    """
    return "pissa" if re.fullmatch(r"pissa_niter_\d+", str(init)) else init


def kaiming(size_A: torch.Size, size_B: torch.Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return LoRA's start in its released code: A is drawn as an ``nn.Linear``'s weight, ``U(+-1 / sqrt(in))``; B is 0.

    Args:
        size_A: (..., r, in).
        size_B: (..., out, r).
        generator: Source of the random numbers, on the CPU.
    """
    bound = 1 / math.sqrt(size_A[-1])
    return torch.empty(size_A).uniform_(-bound, bound, generator=generator), torch.zeros(size_B)


def gaussian(size_A: torch.Size, size_B: torch.Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return A from ``N(0, 1 / r^2)``, as PEFT's ``gaussian`` has it; B is 0.

    Args:
        size_A: (..., r, in).
        size_B: (..., out, r).
        generator: Source of the random numbers, on the CPU.
    """
    return torch.empty(size_A).normal_(std=1 / size_A[-2], generator=generator), torch.zeros(size_B)


def looked_up(size_A: torch.Size, size_B: torch.Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the start of an embedding's factors in the released code: A is N(0, 1), B, which is looked up, is 0.

    Args:
        size_A: (..., r, in).
        size_B: (..., out, r).
        generator: Source of the random numbers, on the CPU.
    """
    return torch.empty(size_A).normal_(generator=generator), torch.zeros(size_B)


def orthogonal(size_A: torch.Size, size_B: torch.Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return random A and B, neither of them 0, whose product is 0 up to rounding, as PEFT's ``orthogonal`` has it.

    With an orthogonal Q (r, r) and Gaussian M, N: ``A = Q[0::2].T @ M / 10`` and ``B = N @ Q[1::2] / 10``, so
    ``B @ A = N @ (Q[1::2] @ Q[0::2].T) @ M / 100 = 0``.

    Args:
        size_A: (..., r, in) with an even r.
        size_B: (..., out, r).
        generator: Source of the random numbers, on the CPU.
    """
    (*stack, r, width), height = size_A, size_B[-2]
    Q = torch.linalg.qr(torch.randn(*stack, r, r, generator=generator, dtype=torch.float64))[0]
    M = torch.randn(*stack, r // 2, width, generator=generator, dtype=torch.float64)
    N = torch.randn(*stack, height, r // 2, generator=generator, dtype=torch.float64)
    return Q[..., 0::2, :].mT @ M / 10, N @ Q[..., 1::2, :] / 10


FROM_SHAPE = {"gaussian": gaussian, "orthogonal": orthogonal}


def pissa(weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return PiSSA's start, the principal part of a weight: ``s * B @ A`` is its best approximation of rank r.

    With ``W = U diag(S) V^T``: ``A = sqrt(S_r / s) V_r^T``, ``B = U_r sqrt(S_r / s)`` (Meng et al., 2024,
    arXiv:2404.02948, equations 2 and 3, where s is 1).

    Args:
        weight: (..., out, in).
        r: Rank.
        scaling: The factor s on ``B @ A``.
    """
    U, S, Vh = _svd(weight)
    return _shared(U[..., :r], S[..., :r] / scaling, Vh[..., :r, :])


def fast_pissa(weight: Tensor, r: int, scaling: float, *, rounds: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return nearly what ``pissa`` does, for less where r is small beside the weight's sides.

    The SVD is taken of what remains in r + 10 directions, which start random and go through rounds of subspace
    iteration (Halko et al., 2009, arXiv:0909.4061, algorithms 4.4 and 5.1). PiSSA has it too, PEFT without the 10.

    Args:
        weight: (..., out, in).
        r: Rank.
        scaling: The factor s on ``B @ A``.
        rounds: Number of rounds; with more it comes closer.
        seed: Of the random directions, which are drawn on the CPU.
    """
    wide = _wide(weight)
    size = min(r + _OVERSAMPLING, *wide.shape[-2:])
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(*wide.shape[:-2], wide.shape[-1], size, generator=generator).to(wide)
    basis = torch.linalg.qr(wide @ random)[0]
    for _ in range(rounds):
        basis = torch.linalg.qr(wide @ torch.linalg.qr(wide.mT @ basis)[0])[0]
    U, S, Vh = _svd(basis.mT @ wide)
    return _shared((basis @ U)[..., :r], S[..., :r] / scaling, Vh[..., :r, :])


def milora(weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return MiLoRA's start: that of PiSSA with the r smallest singular values (Wang et al., 2024, arXiv:2406.09044).

    Args:
        weight: (..., out, in).
        r: Rank.
        scaling: The factor s on ``B @ A``.
    """
    U, S, Vh = _svd(weight)
    return _shared(U[..., -r:], S[..., -r:] / scaling, Vh[..., -r:, :])


def olora(weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return OLoRA's start: with ``W = Q R``, ``B = Q_r`` and ``A = R_r`` (Büyükakyüz, 2024, arXiv:2406.01775).

    Args:
        weight: (..., out, in).
        r: Rank.
        scaling: Has no part in it; here because PiSSA and MiLoRA have it.
    """
    Q, R = torch.linalg.qr(_wide(weight))
    return R[..., :r, :], Q[..., :r]


FROM_WEIGHT: dict[str, Callable[[Tensor, int, float], tuple[Tensor, Tensor]]] = {
    "pissa": pissa,
    "milora": milora,
    "olora": olora,
}


def from_weight(init: str, seed: int) -> Callable[[Tensor, int, float], tuple[Tensor, Tensor]] | None:
    """Return the function of a weight, a rank and a scale that gives the start, or None if it takes no weight.

    Args:
        init: As ``LoRA`` has it.
        seed: Of what is random in it.
    """
    if family(init) != init:
        return partial(fast_pissa, rounds=int(init.rpartition("_")[2]), seed=seed)
    return FROM_WEIGHT.get(init)


def lora_ga(gradient: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return LoRA-GA's start, from the gradient of the loss with respect to the weight.

    With ``G = U diag(S) V^T``: ``A = c V_{1..r}^T``, ``B = c U_{r+1..2r}``, ``c = out^(1/4) / sqrt(gamma)`` and
    gamma 16 (Wang et al., 2024, arXiv:2407.05000, as the authors' code has it).

    Args:
        gradient: (..., out, in), with ``2 r <= min(out, in)``.
        r: Rank.
    """
    U, _, Vh = _svd(gradient)
    size: float = gradient.shape[-2] ** 0.25 / _GAMMA**0.5
    return size * Vh[..., :r, :], size * U[..., r : 2 * r]


def doubled(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the LoRA of twice the rank that a pair with a kept start is: ``[A; A0]`` and ``[B, -B0]``.

    Args:
        factors: ``lora_A``, ``lora_A0`` unless A is frozen, ``lora_B``, ``lora_B0``, and others, which stay.
    """
    others = dict(factors)
    A, B, B0 = (others.pop(name) for name in ("lora_A", "lora_B", "lora_B0"))
    return {"lora_A": torch.cat([A, others.pop("lora_A0", A)], -2), "lora_B": torch.cat([B, -B0], -1), **others}


def halved(factors: Mapping[str, Tensor], freeze_A: bool) -> dict[str, Tensor]:
    """Return what ``doubled`` was given, bit for bit.

    Args:
        factors: What it returned.
        freeze_A: Whether there is no ``lora_A0``.
    """
    (A, A0), (B, negative_B0) = factors["lora_A"].chunk(2, -2), factors["lora_B"].chunk(2, -1)
    pair = {"lora_A": A, "lora_B": B, "lora_A0": A0, "lora_B0": -negative_B0}
    return {**factors, **{name: value for name, value in pair.items() if not (freeze_A and name == "lora_A0")}}


def eva_ranks(shares: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """Return ranks that give a budget to the directions with the largest shares, at least one to each matrix.

    Args:
        shares: Of each matrix, the share of its inputs' energy along each direction that it could have, largest first.
        budget: The sum of all ranks (Paischer et al., 2024, arXiv:2410.07170).
    """
    ranks = dict.fromkeys(shares, 1)
    further = [(-float(share), name) for name, of_one in shares.items() for share in of_one[1:]]
    for _, name in sorted(further, key=lambda one: one[0])[: max(0, budget - len(ranks))]:
        ranks[name] += 1
    return ranks


def check_init(init: str, r: int, batches: int, similarity: float, spread: float, refused: Mapping[str, str]) -> None:
    """Check what LoRA says of its start.

    Args:
        init: The initialisation.
        r: Rank.
        batches: Number of batches that a start from data takes.
        similarity: Cosine from which a direction of the data counts as settled.
        spread: How many times its own rank a matrix may get.
        refused: Initialisations that the method cannot have, and why.

    Raises:
        ValueError: If a value is out of its range.
    """
    if family(init) not in get_args(Initialisation):
        names = ", ".join(get_args(Initialisation))
        raise ValueError(f"init={init!r}: must be one of {names}, or pissa_niter_16 with any number of rounds")
    if family(init) in refused:
        raise ValueError(f"init={init!r}: {refused[family(init)]}")
    if init == "orthogonal" and r % 2:
        raise ValueError(f"r={r}: init='orthogonal' gives half of the rank to each factor: use an even r")
    if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
        raise ValueError(f"init_batches={batches!r}: must be a whole number of at least 1, for example init_batches=8")
    if not (isinstance(similarity, int | float) and 0 <= similarity <= 1):
        raise ValueError(f"init_similarity={similarity!r}: must be from 0 to 1, for example init_similarity=0.99")
    if not (isinstance(spread, int | float) and 1 <= spread < math.inf):
        raise ValueError(f"rank_spread={spread!r}: must be a finite number of at least 1, at which no rank changes")
    if spread != 1 and init != "eva":
        raise ValueError(f"rank_spread={spread:g} is for init='eva', which has measures of directions to go by")


def check_rank(init: str, r: int, shape: tuple[int, ...]) -> None:
    """Check that a matrix has as many directions as a start takes from it.

    Args:
        init: The initialisation.
        r: Rank.
        shape: (..., out, in).

    Raises:
        ValueError: If it has fewer.
    """
    there = shape[-1] if init == "eva" else min(shape[-2:])
    needed = 2 * r if init == "lora_ga" else r
    if family(init) in (*KEEPS_START, "eva") and needed > there:
        raise ValueError(
            f"r={r}: init={init!r} takes {needed} directions of a matrix, and this one is {shape[-2]} x {shape[-1]}: "
            "give it a smaller rank by rank_pattern, or leave it out with exclude_modules"
        )


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(_wide(matrix), full_matrices=False)
    return U, S, Vh


def _shared(U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of ``U diag(S) V^T`` with half of the singular values in each."""
    root = S.sqrt()
    return root[..., :, None] * Vh, U * root[..., None, :]


def _wide(matrix: Tensor) -> Tensor:
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))
