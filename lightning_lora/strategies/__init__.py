"""Strategies for adapters over many processes, by name for the Trainer: ``strategy="lora_fsdp2"``."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_lora.strategies.base_weights import parameters_on_meta as parameters_on_meta
from lightning_lora.strategies.ddp import LoRADDPStrategy
from lightning_lora.strategies.fsdp import LoRAFSDPStrategy
from lightning_lora.strategies.fsdp2 import LoRAFSDP2Strategy

_BY_NAME = {"lora_ddp": LoRADDPStrategy, "lora_fsdp": LoRAFSDPStrategy, "lora_fsdp2": LoRAFSDP2Strategy}
for _name, _strategy in _BY_NAME.items():
    if _name not in StrategyRegistry:
        StrategyRegistry.register(_name, _strategy, description=(_strategy.__doc__ or "").partition("\n")[0])
