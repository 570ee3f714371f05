"""``lora_fsdp``: the frozen base divided by PyTorch's first FSDP, adapters whole on every process."""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy
from typing_extensions import override

from lightning_lora.files import some
from lightning_lora.sites import clean
from lightning_lora.strategies.blocks import blocks_of, kept_whole
from lightning_lora.strategies.replication import ReplicatesAdapters

WRAPPER = "_fsdp_wrapper"


def is_wrapped(module: nn.Module) -> bool:
    """Tell whether a LightningModule was divided by `LoRAFSDPStrategy`, in this run or an earlier one."""
    return WRAPPER in module.__dict__


class LoRAFSDPStrategy(ReplicatesAdapters, FSDPStrategy):
    """Shard the frozen base over all processes with FSDP; each holds the adapters whole.

    Takes the arguments of Lightning's ``FSDPStrategy``. Where no ``auto_wrap_policy`` is given, each element of an
    ``nn.ModuleList`` is a unit. ``lora_fsdp2`` does the same with less, and can start from a base on the meta device.

    Args:
        kwargs: As for Lightning's strategy.

    Raises:
        ValueError: If checkpoints are to be divided too.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self._state_dict_type != "full":
            raise ValueError(
                f"state_dict_type={self._state_dict_type!r}: adapters are whole on every process and written to one "
                "file: leave it out"
            )

    @override
    def setup(self, trainer: Trainer) -> None:
        """Wrap the module and make the optimizers.

        Raises:
            ValueError: If the base has no values.
        """
        empty = [clean(name) for name, parameter in self._module.named_parameters() if parameter.is_meta]
        if empty:
            raise ValueError(
                f"strategy={type(self).__name__}: {some(empty)} is on the meta device: give the base its values first, "
                "or use LoRAFSDP2Strategy(base_weights=...), which reads them shard by shard"
            )
        self.prepare()
        super().setup(trainer)
        self.clip_here()

    @override
    def _setup_model(self, model: nn.Module) -> nn.Module:
        """Wrap a module once: a later run, which gets the module and not its wrapper, takes up the old one."""
        if not is_wrapped(model):
            ignored = kept_whole(model)
            for parameter in ignored:
                parameter.data = parameter.data.to(self.root_device)
            blocks = {id(block) for block in blocks_of(model)}
            options = {"auto_wrap_policy": partial(lambda_auto_wrap_policy, lambda_fn=lambda one: id(one) in blocks)}
            model.__dict__[WRAPPER] = FullyShardedDataParallel(
                model,
                cpu_offload=self.cpu_offload,
                mixed_precision=self.mixed_precision_config,
                sharding_strategy=self.sharding_strategy,
                device_id=self.root_device,
                ignored_states=ignored,
                **options | self.kwargs,
            )
        return model.__dict__[WRAPPER]  # type: ignore[no-any-return]
