r"""VeRA (Kopiczko et al., 2023, arXiv:2310.11454).

::

       x (..., in)
       |        \
       |         A (r, in)      random, frozen, one for all layers
     W (out, in)  |  * d (r)      0.1 at the start
     frozen      B (out, r)     random, frozen, one for all layers
       |        /   * b (out)     zero at the start, so the model starts as the base
       + <-----
       |
       y (..., out)

A layer takes the first ``in`` columns of A and the first ``out`` rows of B, which are as large as the largest needs.
With a trained magnitude for each output unit it is DVoRA, of the paper on DoRA (Liu et al., 2024, arXiv:2402.09353).
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.adapter import Adapter, Role, Shared
from lightning_lora.layout import Layout
from lightning_lora.method import Method, check_fraction, check_r
from lightning_lora.methods.dora import WithMagnitude


@dataclass(frozen=True, kw_only=True)
class VeRA(Method):
    """Vector-based random matrix adaptation: ``W' = W + diag(b) @ B @ diag(d) @ A`` with trained vectors b and d.

    Args:
        r: Rank of the change; the adapter of an (out, in) matrix has ``out + r`` parameters.
        d_init: What the elements of d start from.
        projection_seed: Seed of A and B, which are the same for every layer and in every run.
        save_projection: Whether files hold A and B; if not they hold the seed and a checksum, and A and B are drawn
            again, which another version of PyTorch might do in another way: then the file is refused.
        dropout: Probability with which an element of the adapter's input is zeroed during training.
        magnitude: Whether a magnitude is trained for each output unit as well, as in ``DoRA``.

    Raises:
        ValueError: If a value is out of its range.
    """

    refused: ClassVar[Mapping[str, str]] = {
        "alpha": "VeRA has no alpha / r scale",
        "scaling": "VeRA has no alpha / r scale",
        "init": "VeRA's projections are shared and random by definition",
        "freeze_A": "VeRA already freezes A and B",
        "gradient": "VeRA already freezes A and B",
        "target_r": "VeRA has no per-layer rank",
        "threshold": "importance and sharing of d and b are not defined by either paper",
        "update_ratio": "Delta-LoRA's increment is defined for B A",
    }
    r: int = 256
    d_init: float = 0.1
    projection_seed: int = 0
    save_projection: bool = True
    dropout: float = 0.0
    magnitude: bool = False
    alpha: float = field(default=1.0, init=False, repr=False)  # a method has one; here nothing is scaled by it

    def __post_init__(self) -> None:
        check_r(self.r, 1, example=256)
        if not (isinstance(self.d_init, int | float) and math.isfinite(self.d_init) and self.d_init != 0):
            raise ValueError(
                f"d_init={self.d_init!r}: must be a finite number other than 0, at which b would get no gradient, for "
                "example d_init=0.1"
            )
        seed = self.projection_seed
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"projection_seed={seed!r}: must be a whole number of at least 0, such as 0")
        if not isinstance(self.save_projection, bool):
            raise ValueError(f"save_projection={self.save_projection!r}: must be True or False")
        check_fraction("dropout", self.dropout, example=0.05)
        if not isinstance(self.magnitude, bool):
            raise ValueError(f"magnitude={self.magnitude!r}: must be True (DVoRA) or False (VeRA)")

    def build(
        self,
        shape: tuple[int, ...],
        *,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        layout: Layout | None = None,
    ) -> Adapter:
        """Create the adapter of one (out, in) matrix, or of a stack of them, which ``attach`` then gives A and B."""
        adapter = DVoRAAdapter if self.magnitude else VeRAAdapter
        return adapter(self, shape, seed=seed, device=device, dtype=dtype, layout=layout or Layout())

    def attach(self, adapters: Mapping[str, Adapter]) -> None:
        """Give all adapters the one pair of A and B, drawn in the largest size that any of them needs.

        Args:
            adapters: All of one task, by the names of their sites.

        Raises:
            ValueError: If ranks differ, or a new site needs a larger pair than the one that the others have.
        """
        first = next(iter(adapters))
        for name, adapter in adapters.items():
            if adapter.method.r != adapters[first].method.r:
                raise ValueError(
                    f"{first} has r={adapters[first].method.r} and {name} has r={adapter.method.r}: VeRA has no "
                    "per-layer rank, because all layers share A and B: leave rank_pattern out"
                )
        ours: dict[str, VeRAAdapter] = {name: one for name, one in adapters.items() if isinstance(one, VeRAAdapter)}
        pair = next((one.shared for one in ours.values() if hasattr(one, "shared")), None)
        if pair is None:
            pair = Projections(
                self,
                max(one.out_features for one in ours.values()),
                max(one.in_features for one in ours.values()),
                device=next(iter(ours.values())).vera_lambda_d.device,
                dtype=max((one.vera_lambda_d.dtype for one in ours.values()), key=lambda dtype: dtype.itemsize),
            )
        rows, columns = pair.vera_B.shape[0], pair.vera_A.shape[1]
        for name, one in ours.items():
            if one.out_features > rows or one.in_features > columns:
                raise ValueError(
                    f"{name} is {one.out_features} x {one.in_features}, but the projections that its task shares were "
                    f"drawn for at most {rows} x {columns}, and larger ones would be other random numbers for every "
                    "layer: give all target_modules to the first call, or give this one another task name"
                )
            one.shared = pair

    def redrawn(self, described: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return A and B as a file's description says that they were drawn.

        Args:
            described: What `Projections.described` returned.

        Raises:
            ValueError: If they come out other than they were.
        """
        out_features, in_features = described["out_features"], described["in_features"]
        pair = Projections(self, out_features, in_features, device=torch.device("cpu"), dtype=torch.float32)
        if pair.described()["sha256"] != described["sha256"]:
            raise ValueError(
                f"its projections are not in it, and projection_seed={self.projection_seed} draws others with PyTorch "
                f"{torch.__version__} than with {described.get('torch')}, which wrote it: load it there and save it "
                "with save_projection=True"
            )
        return pair.state_dict()

    def at(self, r: int, alpha: float) -> VeRA:
        """Return the same method with another rank.

        Raises:
            ValueError: If there is an alpha.
        """
        if alpha != self.alpha:
            raise ValueError(f"alpha={alpha!r}: VeRA has no alpha / r scale: leave alpha_pattern out")
        return dataclasses.replace(self, r=r)

    def why_no_ratio(self) -> str:
        """Return that there is no trained A or B."""
        return (
            "VeRA trains the vectors d and b, not A and B: give them learning rates of their own with param_groups, "
            "which returns a group for each, called 'core' and 'scale'"
        )

    def peft_config(self) -> dict[str, Any]:
        """Return PEFT's names for these fields."""
        return {
            "peft_type": "VERA",
            "r": self.r,
            "d_initial": self.d_init,
            "projection_prng_key": self.projection_seed,
            "save_projection": self.save_projection,
            "vera_dropout": self.dropout,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> VeRA | None:
        """Read a config of PEFT's type VERA; its absent fields have PEFT's defaults."""
        if config.get("peft_type") != "VERA":
            return None
        return cls(
            r=config.get("r", 256),
            d_init=config.get("d_initial", 0.1),
            projection_seed=config.get("projection_prng_key", 0),
            save_projection=config.get("save_projection", True),
            dropout=config.get("vera_dropout", 0.0),
        )


class VeRAAdapter(Adapter):
    """The vectors ``vera_lambda_d`` (r) and ``vera_lambda_b`` (out), and the pair that all adapters of the task share.

    Those of a stack of matrices have one more dimension in front; the pair is the same for every matrix of it.
    """

    roles: ClassVar[dict[str, Role]] = {"vera_lambda_d": "core", "vera_lambda_b": "scale"}
    method: VeRA
    shared: Projections

    def __init__(
        self,
        method: VeRA,
        shape: tuple[int, ...],
        *,
        seed: int,  # nothing is drawn by it: A and B have a seed of their own
        device: torch.device,
        dtype: torch.dtype,
        layout: Layout,
    ) -> None:
        super().__init__()
        *stack, self.out_features, self.in_features = shape
        self.method = method
        self.layout = layout
        self.dropout = method.dropout
        self.vera_lambda_d = nn.Parameter(torch.empty(*stack, method.r, device=device, dtype=dtype))
        self.vera_lambda_b = nn.Parameter(torch.empty(*stack, self.out_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set d to its one value, and b to zero."""
        with torch.no_grad():
            self.vera_lambda_d.fill_(self.method.d_init)
            self.vera_lambda_b.zero_()

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return ``diag(b) @ B @ diag(d)`` (out, r) and A (r, in).

        With both vectors on the one side, the other factor is a view of the shared A, the same memory for every layer.
        """
        r, b, d = self.method.r, self.vera_lambda_b, self.vera_lambda_d
        up, down = self.shared.vera_B[: self.out_features, :r], self.shared.vera_A[:r, : self.in_features]
        up, down = up.to(d.device), down.to(d.device)  # a model can be spread over several devices
        return (b.unsqueeze(-1) * d.unsqueeze(-2)) * up, down.expand(*d.shape[:-1], *down.shape)

    def extra_repr(self) -> str:
        """Show the rank where the model is printed."""
        return f"r={self.method.r}, dropout={self.dropout:g}"


class DVoRAAdapter(WithMagnitude, VeRAAdapter):
    """VeRA's vectors with a magnitude for each output unit."""

    roles: ClassVar[dict[str, Role]] = {**VeRAAdapter.roles, "magnitude": "magnitude"}

    def why_not_peft(self) -> str:
        """Return that PEFT has no such adapter."""
        return "PEFT's VeRA has no magnitudes"


class Projections(Shared):
    """The random pair ``vera_A`` (r, in) and ``vera_B`` (out, r), as large as the largest matrix needs.

    It has the adapters' precision and is cast to that of the input where it is used, as all factors are: for a batch of
    n tokens that costs 1 / n of the product that follows, and merged weights stay exact.
    """

    def __init__(
        self, method: VeRA, out_features: int, in_features: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.seed = method.projection_seed
        self.stored = method.save_projection
        down = torch.empty(method.r, in_features, device=device, dtype=dtype)
        up = torch.empty(out_features, method.r, device=device, dtype=dtype)
        self.vera_A = nn.Parameter(down, requires_grad=False)
        self.vera_B = nn.Parameter(up, requires_grad=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw A, then B, from one generator: uniform within the root of 6 / fan-in, which of B is r (as PEFT does)."""
        generator = torch.Generator().manual_seed(self.seed)
        for parameter in (self.vera_A, self.vera_B):
            if parameter.is_meta:
                continue
            bound = math.sqrt(6 / parameter.shape[1])
            drawn = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            with torch.no_grad():
                parameter.copy_(drawn.uniform_(-bound, bound, generator=generator))

    def described(self) -> dict[str, Any]:
        """Return the sizes, the PyTorch that drew, and a digest of the numbers."""
        digest = hashlib.sha256()
        for parameter in (self.vera_A, self.vera_B):
            digest.update(parameter.detach().cpu().float().contiguous().view(torch.uint8).numpy().data)
        return {
            "out_features": self.vera_B.shape[0],
            "in_features": self.vera_A.shape[1],
            "torch": str(torch.__version__),  # plain text: it is none itself
            "sha256": digest.hexdigest(),
        }
