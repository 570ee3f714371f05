"""What is compared: the same model without adapters (the floor), with PEFT's, with ours, with those of others."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn

from bases import Base, Batch, loss_of
from lightning_lora import AdaLoRA, DoRA, LoRA, LoRAFA, Method, VeRA, inject
from measuring import Kernels, by_turns, floating_point_operations, kept, peak_bytes, quartiles
from peers import PEERS, adapt

W32, W16, AMP, ALL16 = "fp32", "bf16 base, fp32 adapters", "bf16-mixed", "all bf16"
REGIMES = {  # the dtype of the base, that of the adapters, whether autocast computes in bf16
    W32: (torch.float32, torch.float32, False),
    W16: (torch.bfloat16, torch.float32, False),
    AMP: (torch.float32, torch.float32, True),
    ALL16: (torch.bfloat16, torch.bfloat16, False),
}


@dataclass(frozen=True)
class Pair:
    """A method here and at PEFT, both from a rank and a dropout; and what of PEFT's is frozen besides."""

    ours: Callable[[int, float], Method]
    peft: Callable[..., peft.PeftConfig]
    frozen: str = ""


def _lora(r: int, dropout: float, **options: Any) -> peft.PeftConfig:
    return peft.LoraConfig(r=r, lora_alpha=16, lora_dropout=dropout, **options)


def _adalora(r: int, dropout: float, **options: Any) -> peft.PeftConfig:
    return peft.AdaLoraConfig(init_r=r, lora_dropout=dropout, tinit=1, tfinal=1, total_step=10, **options)


METHODS = {
    "LoRA": Pair(lambda r, p: LoRA(r=r, dropout=p), _lora),
    "LoRA-FA": Pair(lambda r, p: LoRAFA(r=r, dropout=p), _lora, "lora_A"),
    "DoRA": Pair(lambda r, p: DoRA(r=r, dropout=p), lambda r, p, **o: _lora(r, p, use_dora=True, **o)),
    "AdaLoRA": Pair(lambda r, p: AdaLoRA(r=r, dropout=p), _adalora),
    "VeRA": Pair(lambda r, p: VeRA(r=r, dropout=p), lambda r, p, **o: peft.VeraConfig(r=r, vera_dropout=p, **o)),
}


@dataclass(frozen=True)
class Case:
    """One comparison."""

    base: str
    method: str = "LoRA"
    regime: str = W32
    rank: int = 16
    dropout: float = 0.0
    batch: int = 4
    tokens: int = 256

    def __str__(self) -> str:
        drops = f", dropout {self.dropout}" if self.dropout else ""
        return f"{self.method}, {self.regime}, r = {self.rank}{drops}, {self.batch} x {self.tokens}"


def plain(base: Base, dtype: torch.dtype) -> nn.Module:
    """Return a base, the same at every call."""
    torch.manual_seed(0)
    return base.build().to(dtype).requires_grad_(False)


def ours(base: Base, method: Method, regime: str) -> nn.Module:
    """Return it with adapters of this library."""
    dtype, adapters, _ = REGIMES[regime]
    model = plain(base, dtype)
    inject(model, method, base.names(model), dtype=adapters)
    return model


def pefts(base: Base, case: Case) -> nn.Module:
    """Return it with PEFT's."""
    dtype, adapters, _ = REGIMES[case.regime]
    pair, model = METHODS[case.method], plain(base, dtype)
    options = base.peft if pair.peft is not METHODS["VeRA"].peft else {}
    config = pair.peft(case.rank, case.dropout, target_modules=base.names(model), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the model's config does not say whether weights are tied
        adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=adapters == torch.float32)
    for name, parameter in adapted.named_parameters():
        if pair.frozen and pair.frozen in name:
            parameter.requires_grad_(False)
    if case.method == "AdaLoRA":  # the step alone: its regulariser, which the wrapper adds, is not compared
        return adapted.base_model.model  # type: ignore[no-any-return]
    return adapted  # type: ignore[no-any-return]


class Contender:
    """A model with its optimizer and its inputs.

    Args:
        model: The model; it is trained where its parameters ask for it.
        batch: Its inputs, the first of which is differentiated.
        regime: A key of ``REGIMES``.
        fused: Whether AdamW is PyTorch's fused one.
    """

    def __init__(self, model: nn.Module, batch: Batch, regime: str, fused: bool = False) -> None:
        dtype, _, self.amp = REGIMES[regime]
        self.model = model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=fused or None) if trained else None
        self.first = next(iter(batch))
        self.take({**batch, self.first: batch[self.first].to(dtype)})

    def take(self, batch: Batch) -> None:
        """Use other inputs from now on."""
        self.batch = {**batch, self.first: batch[self.first].detach().requires_grad_()}

    def forward(self) -> Tensor:
        """Return the loss."""
        with torch.autocast(self.batch[self.first].device.type, torch.bfloat16, enabled=self.amp):
            return loss_of(self.model(**self.batch))

    def forward_and_backward(self) -> None:
        """Compute gradients and let go of them."""
        self.forward().backward()
        self.batch[self.first].grad = None
        for parameter in self.model.parameters():
            parameter.grad = None

    def step(self) -> Tensor:
        """Train one step and return its loss."""
        loss = self.forward()
        loss.backward()
        self.batch[self.first].grad = None
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach()

    def counts(self) -> dict[str, int]:
        """Return what forward and backward cost: launches, bytes kept, traffic, operations, and bytes at the peak."""
        with Kernels() as ahead, kept(self.model.parameters()) as bytes_kept:
            loss = self.forward()
        found = {"forward": ahead.launches, "kept": sum(bytes_kept.values())}
        with Kernels() as back:
            loss.backward()
        del loss
        self.forward_and_backward()
        return {
            **found,
            "backward": back.launches,
            "traffic": ahead.traffic + back.traffic,
            "operations": floating_point_operations(self.forward_and_backward),
            "peak": peak_bytes(self.forward_and_backward),
        }


def compare(base: Base, case: Case, rounds: int, peers: Sequence[str] = ()) -> dict[str, Any]:
    """Measure one case: floor, PEFT, ours, and other libraries' linear layers where they are asked for.

    Args:
        base: The model.
        case: The method and the sizes.
        rounds: The number of rounds; three times as many where steps are short.
        peers: Keys of ``PEERS``.
    """
    dtype, adapters, _ = REGIMES[case.regime]
    pair = METHODS[case.method]
    builders: dict[str, Callable[[], nn.Module]] = {
        "floor": lambda: plain(base, dtype),
        "PEFT": lambda: pefts(base, case),
        "ours": lambda: ours(base, pair.ours(case.rank, case.dropout), case.regime),
    }
    for peer in peers:
        builders[peer] = lambda peer=peer: adapt(  # type: ignore[misc]
            model := plain(base, dtype), base.names(model), PEERS[peer](), case.rank, case.dropout, adapters
        )
    torch.manual_seed(1)
    batch = base.draw(case.batch, case.tokens)
    contenders, failed = {}, {}
    for who, build in builders.items():
        try:
            contenders[who] = Contender(build(), batch, case.regime)
            contenders[who].step()
        except (RuntimeError, ValueError, TypeError) as error:
            contenders.pop(who, None)
            failed[who] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    rounds *= 3 if case.batch * case.tokens < 256 else 1
    seconds = by_turns({who: contender.step for who, contender in contenders.items()}, rounds, warmup=1)
    against = "PEFT" if "PEFT" in contenders else "floor"
    return {
        "case": str(case),
        **vars(case),
        "rounds": rounds,
        "seconds": seconds,
        "ratios to": against,
        "ratios": quartiles(seconds, against),
        "counted": {who: contender.counts() for who, contender in contenders.items()},
        "failed": failed,
    }
