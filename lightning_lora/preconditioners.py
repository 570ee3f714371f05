r"""Gradients of A and B changed before the optimizer sees them, so that the step on ``W + s * B @ A`` is a better one.

With ``G`` the gradient of the loss with respect to the weight, A (..., r, in) and B (..., out, r) have the gradients
``g_A = s B^T G``, ``g_B = s G A^T``. A step along them moves the weight by ``s (B g_A + g_B A)``, which depends on how
large A and B are, not only on ``G``. Each function here takes and returns gradients; clipping and any optimizer come
after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.schedule import Schedule

Gradient = Literal["plain", "fa", "riemannian", "lora_pro"]
_TINY = 1e-8  # added to A A^T and B^T B by LoRA-FA and LoRA-Pro, so that their inverses are finite
_DAMPING = 1e-2  # added by PEFT's Riemannian optimizer


def check_gradient(gradient: Gradient, freeze_A: bool) -> None:
    """Check what LoRA says of its gradients.

    Args:
        gradient: Which of the functions.
        freeze_A: Whether B is trained alone.

    Raises:
        ValueError: If there is none of the name, or it is for the other case.
    """
    if gradient not in get_args(Gradient):
        raise ValueError(f"gradient={gradient!r}: must be one of {', '.join(get_args(Gradient))}")
    if gradient == "fa" and not freeze_A:
        raise ValueError("gradient='fa' is for a frozen A: use LoRAFA(gradient='fa'), or gradient='lora_pro'")
    if gradient in _ON_BOTH and freeze_A:
        raise ValueError(f"gradient={gradient!r} is for a trained A: with a frozen one use gradient='fa'")


def inverse(gram: Tensor, damping: float) -> Tensor:
    """Return ``(gram + damping * I)^-1``, finite for every positive semidefinite matrix.

    Args:
        gram: (..., r, r), symmetric; rounding may have made eigenvalues negative.
        damping: What is added to the eigenvalues.
    """
    values, vectors = _eigen(gram)
    return (vectors / (values + damping)[..., None, :]) @ vectors.mT


def fa(inverse_gram: Tensor, g_B: Tensor, s: float) -> Tensor:
    """Return LoRA-FA's gradient of B: a step along it moves W by ``G P_A``, the best that a frozen A allows.

    ``g_B (A A^T)^-1 / s^2`` minimises ``||s g A - G||_F`` over g; ``P_A = A^T (A A^T)^-1 A`` (second version of
    arXiv:2308.03303, as in PEFT's ``create_lorafa_optimizer``).

    Args:
        inverse_gram: ``(A A^T + 1e-8 I)^-1`` (..., r, r).
        g_B: (..., out, r).
        s: The factor on ``B @ A``.
    """
    return g_B @ inverse_gram / s**2


def riemannian(A: Tensor, B: Tensor, g_A: Tensor, g_B: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """Return ``(B^T B + d I)^-1 g_A`` and ``g_B (A A^T + d I)^-1``: with d = 0, steps that only ``B @ A`` matters to.

    Zhang and Pilanci, 2024, arXiv:2402.02347; d is 0.01, as in PEFT. Where B is 0, so is ``g_A``.

    Args:
        A: (..., r, in).
        B: (..., out, r).
        g_A: As A.
        g_B: As B.
        s: Has no part in it; here because LoRA-Pro has it.
    """
    return inverse(B.mT @ B, _DAMPING) @ g_A, g_B @ inverse(A @ A.mT, _DAMPING)


def lora_pro(A: Tensor, B: Tensor, g_A: Tensor, g_B: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """Return LoRA-Pro's gradients: a step along both moves W as nearly by ``G`` as one of A and B can.

    ``(B^T B)^-1 g_A / s^2 + X A`` and ``(I - P_B) g_B (A A^T)^-1 / s^2 - B X`` leave ``(I - P_B) G (I - P_A)`` of G
    with every X. X here is the paper's, with which they are nearest to the plain gradients: it solves
    ``B^T B X + X A A^T = -(B^T B)^-1 g_A A^T / s^2`` (Wang et al., 2024, arXiv:2407.18242). 1e-8 is added before a
    matrix is inverted. Where B is 0, so is ``g_A``, and the gradient of B is LoRA-FA's.

    Args:
        A: (..., r, in).
        B: (..., out, r).
        g_A: As A.
        g_B: As B.
        s: The factor on ``B @ A``.
    """
    gram_A, gram_B = A @ A.mT, B.mT @ B
    inverse_B = inverse(gram_B, _TINY)
    new_A = inverse_B @ g_A / s**2
    new_B = fa(inverse(gram_A, _TINY), g_B - B @ (inverse_B @ (B.mT @ g_B)), s)
    X = sylvester(gram_B, gram_A, -new_A @ A.mT)
    return new_A + X @ A, new_B - B @ X


def sylvester(left: Tensor, right: Tensor, target: Tensor) -> Tensor:
    """Return X with ``left X + X right = target``, by the eigenvectors of both.

    Args:
        left: (..., r, r), symmetric and positive semidefinite.
        right: Likewise.
        target: (..., r, r).
    """
    (values, vectors), (other_values, other_vectors) = _eigen(left), _eigen(right)
    sums = (values[..., :, None] + other_values[..., None, :]).clamp_min(_TINY)
    return vectors @ (vectors.mT @ target @ other_vectors / sums) @ other_vectors.mT


def _eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, none of them below 0, and eigenvectors."""
    values, vectors = torch.linalg.eigh(gram)
    return values.clamp_min(0), vectors


_ON_BOTH: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {
    "riemannian": riemannian,
    "lora_pro": lora_pro,
}


class Preconditioner(Schedule):
    """Changes the gradients of all pairs of a task before each step, in fp32 or wider.

    Args:
        gradient: Which of the functions.
        adapters: With ``lora_A``, ``lora_B`` and ``scaling``; a pair that several of them share is changed once.
    """

    def __init__(self, gradient: Gradient, adapters: Sequence[Any]) -> None:
        super().__init__()
        self.gradient = gradient
        self.adapters = list({id(adapter.lora_B): adapter for adapter in adapters}.values())
        self._inverses: dict[int, Tensor] = {}  # of A A^T, which stays what it is where A is frozen

    @override
    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        """Replace the values of the gradients; a pair without gradients is left alone."""
        for number, adapter in enumerate(self.adapters):
            A, B, s = _wide(adapter.lora_A), _wide(adapter.lora_B), adapter.scaling
            if adapter.lora_B.grad is None:
                continue
            if self.gradient == "fa":
                if number not in self._inverses:
                    self._inverses[number] = inverse(A @ A.mT, _TINY)
                adapter.lora_B.grad.copy_(fa(self._inverses[number], _wide(adapter.lora_B.grad), s))
            elif adapter.lora_A.grad is not None:
                g_A, g_B = adapter.lora_A.grad, adapter.lora_B.grad
                for old, new in zip((g_A, g_B), _ON_BOTH[self.gradient](A, B, _wide(g_A), _wide(g_B), s), strict=True):
                    old.copy_(new)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
