"""Lightning callbacks."""

from lightning_lora.callbacks.ema import AdapterEMA
from lightning_lora.callbacks.lora import LoRACallback

__all__ = ["AdapterEMA", "LoRACallback"]
