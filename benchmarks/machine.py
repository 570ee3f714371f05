"""Where and with what something was measured, for the pages of the benchmarks."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import peft
import torch
import transformers

import lightning_lora


def measured_on(remark: str) -> str:
    """Return the last sentences of a page; to be called at the end, because they say how busy the machine was."""
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    name = f"{platform.machine()} {_processor()}".strip()
    remark = f": {remark}" if remark else ""
    return (
        f"Measured on {name}; load averages at the end {load} on {os.cpu_count()} cores{remark}.\n"
        f"lightning_lora {lightning_lora.__version__}, PEFT {peft.__version__}, PyTorch {torch.__version__}, "
        f"transformers {transformers.__version__}."
    )


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
