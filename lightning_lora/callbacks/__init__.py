"""Lightning callbacks."""

from lightning_lora.callbacks.ema import AdapterEMA
from lightning_lora.callbacks.lora import LoRACallback
from lightning_lora.callbacks.preemption import PreemptionCheckpoint

__all__ = ["AdapterEMA", "LoRACallback", "PreemptionCheckpoint"]
