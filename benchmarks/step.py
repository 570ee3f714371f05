"""One training step beside PEFT's: two Llama layers with random weights, all contenders by turns in one process.

The floor is the same model without adapters, differentiated with respect to its input: what no adapter can undercut.
Times are this process's CPU time on one thread, as the median ratio to PEFT's step of the same round; launches and
bytes kept for the backward pass are counted, not timed, and are the same on every machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_lora
from lightning_lora import AdaLoRA, DoRA, LoRA, LoRAFA, Method, VeRA, inject

RESULTS = Path(__file__).parent / "results"
LAYERS, HIDDEN, INNER, HEADS, VOCABULARY, RANK = 2, 512, 1376, 8, 1000, 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WITHOUT_KERNEL = {
    *("view", "_unsafe_view", "t", "transpose", "expand", "detach", "alias", "unsqueeze", "squeeze", "slice", "select"),
    *("split", "split_with_sizes", "empty", "empty_like", "new_empty", "promote_types", "scalar_tensor"),
}
Model = Any


class Launches(TorchDispatchMode):
    """Counts the operations that run a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += op.overloadpacket.__name__ not in WITHOUT_KERNEL
        return op(*args, **(kwargs or {}))


def base(dtype: torch.dtype) -> Model:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).to(dtype).requires_grad_(False)


def ours(method: Method, dtype: torch.dtype, adapters: torch.dtype) -> Model:
    model = base(dtype)
    inject(model, method, TARGETS, dtype=adapters)
    return model


def pefts(config: peft.PeftConfig, dtype: torch.dtype, adapters: torch.dtype, frozen: str = "") -> Model:
    model = peft.get_peft_model(base(dtype), config, autocast_adapter_dtype=adapters == torch.float32)
    for name, parameter in model.named_parameters():
        if frozen and frozen in name:
            parameter.requires_grad_(False)
    if isinstance(config, peft.AdaLoraConfig):
        return model.base_model.model  # the step alone: its regulariser, which the wrapper adds, is not compared
    return model


class Contender:
    """A model with its optimizer and its input."""

    def __init__(self, model: Model, rows: tuple[int, int], dtype: torch.dtype, amp: bool) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
        self.model, self.amp = model, amp
        torch.manual_seed(1)
        self.x = torch.randn(*rows, HIDDEN, dtype=dtype).requires_grad_()
        self.labels = torch.randint(VOCABULARY, rows)

    def forward(self) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.amp):
            loss: Tensor = self.model(inputs_embeds=self.x, labels=self.labels).loss
        return loss

    def step(self) -> None:
        self.forward().backward()
        self.x.grad = None
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def seconds(self) -> float:
        before = time.process_time()
        self.step()
        return time.process_time() - before

    def counts(self) -> dict[str, float]:
        """Launches of forward and backward, MiB kept for the backward pass beside the parameters."""
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with Launches() as launches, saved_tensors_hooks(pack, lambda t: t):
            loss = self.forward()
        forward = launches.count
        with Launches() as launches:
            loss.backward()
        self.x.grad = None
        self.model.zero_grad()
        return {"forward": forward, "backward": launches.count, "MiB": sum(kept.values()) / 2**20}


W32, W16, AMP, ALL16 = "fp32", "bf16 base, fp32 adapters", "bf16-mixed", "all bf16"
DTYPES = {  # of the base, of the adapters, autocast
    W32: (torch.float32, torch.float32, False),
    W16: (torch.bfloat16, torch.float32, False),
    AMP: (torch.float32, torch.float32, True),
    ALL16: (torch.bfloat16, torch.bfloat16, False),
}
LORA = {"r": RANK, "target_modules": TARGETS}
METHODS: dict[str, tuple[Method, Callable[[], peft.PeftConfig], str]] = {
    "LoRA": (LoRA(r=RANK), lambda: peft.LoraConfig(**LORA), ""),
    "LoRA, dropout 0.1": (LoRA(r=RANK, dropout=0.1), lambda: peft.LoraConfig(**LORA, lora_dropout=0.1), ""),
    "LoRA-FA": (LoRAFA(r=RANK), lambda: peft.LoraConfig(**LORA), "lora_A"),
    "DoRA": (DoRA(r=RANK), lambda: peft.LoraConfig(**LORA, use_dora=True), ""),
    "AdaLoRA": (
        AdaLoRA(r=RANK),
        lambda: peft.AdaLoraConfig(init_r=RANK, target_modules=TARGETS, tinit=1, tfinal=1, total_step=10),
        "",
    ),
    "VeRA": (VeRA(r=256), lambda: peft.VeraConfig(r=256, target_modules=TARGETS), ""),
}
CASES = [  # method, regime, batch, tokens
    *(("LoRA", regime, 4, 256) for regime in DTYPES),
    *(("LoRA", regime, 1, 16) for regime in DTYPES),
    *((method, regime, 4, 256) for method in ("LoRA, dropout 0.1", "DoRA") for regime in (W32, W16)),
    *((method, W16, 4, 256) for method in ("LoRA-FA", "AdaLoRA", "VeRA")),
]


def compare(name: str, regime: str, batch: int, tokens: int, rounds: int) -> dict[str, Any]:
    method, config, frozen = METHODS[name]
    dtype, adapters, amp = DTYPES[regime]
    models = {"floor": base(dtype), "peft": pefts(config(), dtype, adapters, frozen)}
    models["ours"] = ours(method, dtype, adapters)
    contenders = {who: Contender(model, (batch, tokens), dtype, amp) for who, model in models.items()}
    seconds: dict[str, list[float]] = {who: [] for who in contenders}
    for contender in contenders.values():
        contender.step()
    for _ in range(rounds):
        for who, contender in contenders.items():
            seconds[who].append(contender.seconds())
    ratios = {who: [a / b for a, b in zip(seconds[who], seconds["peft"], strict=True)] for who in ("floor", "ours")}
    quartiles = {who: statistics.quantiles(values, n=4) for who, values in ratios.items()}
    case = {"method": name, "regime": regime, "batch": batch, "tokens": tokens, "rounds": rounds}
    counted = {who: contender.counts() for who, contender in contenders.items()}
    return {**case, "quartiles of the ratio to PEFT": quartiles, "seconds": seconds, "counted": counted}


def page(found: dict[str, Any]) -> str:
    rows = []
    for case in found["cases"]:
        floor, mine = (case["quartiles of the ratio to PEFT"][who] for who in ("floor", "ours"))
        counted = case["counted"]
        cells = [
            f"{case['method']}, {case['regime']}",
            f"{case['batch']} x {case['tokens']}",
            f"{floor[1]:.2f}",
            f"**{mine[1]:.2f}** ({mine[0]:.2f} to {mine[2]:.2f})",
            *(f"{counted[who]['forward']}+{counted[who]['backward']}" for who in ("floor", "peft", "ours")),
            " / ".join(f"{counted[who]['MiB']:.1f}" for who in ("floor", "peft", "ours")),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    load = ", ".join(f"{one:.1f}" for one in found["load"])
    return f"""# One training step beside PEFT's

{LAYERS} Llama layers, hidden size {HIDDEN}, inner size {INNER}, rank {RANK} (VeRA 256) on all seven linear layers of
each, AdamW. `python benchmarks/step.py` writes this page. The floor is the same frozen model without adapters,
differentiated with respect to its input.

Time is CPU time on one thread as a ratio to PEFT's of the same round: the median and the quartiles. Launches (forward +
backward, without the optimizer) and MiB kept for the backward pass are counted and exact.

| step | batch x tokens | floor's time | our time | launches: floor | PEFT | ours | MiB kept: floor / PEFT / ours |
|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

Measured on {found["machine"]}; load averages at the end {load} on {found["cores"]} cores{found["remark"]}.
{found["versions"]}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--remark", default="", help="what else was going on, for the page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = []
    for name, regime, batch, tokens in CASES:
        rounds = options.rounds * (3 if batch * tokens < 64 else 1)
        cases.append(compare(name, regime, batch, tokens, rounds))
        median = cases[-1]["quartiles of the ratio to PEFT"]["ours"][1]
        print(f"{name}, {regime}, {batch} x {tokens}: {median:.2f} of PEFT's time", flush=True)
    found = {
        "cases": cases,
        "machine": f"{platform.machine()} {processor()}".strip(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "remark": f": {options.remark}" if options.remark else "",
        "versions": f"lightning_lora {lightning_lora.__version__}, PEFT {peft.__version__}, PyTorch "
        f"{torch.__version__}, transformers {transformers.__version__}",
    }
    (RESULTS / "step.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "step.md").write_text(page(found))


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


if __name__ == "__main__":
    main()
