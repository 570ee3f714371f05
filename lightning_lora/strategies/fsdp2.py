"""``lora_fsdp2``: the frozen base divided by PyTorch's ``fully_shard``, adapters whole on every process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.utilities.init import _materialize_distributed_module
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from typing_extensions import override

from lightning_lora.strategies.base_weights import fill_base
from lightning_lora.strategies.blocks import blocks_of, kept_whole
from lightning_lora.strategies.replication import ReplicatesAdapters

STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class LoRAFSDP2Strategy(ReplicatesAdapters, ModelParallelStrategy):
    """Shard the frozen base over all processes with ``fully_shard``; each holds the adapters whole.

    A module that calls ``fully_shard`` in its ``configure_model``, with ``self.device_mesh["data_parallel"]``, is left
    as it divided itself. Any other is divided here: its repeated blocks, and what is left as one more unit.

    Args:
        blocks: Names of the classes whose modules are gathered one at a time; by default the elements of each
            ``nn.ModuleList``.
        replicas: Copies of the base (hybrid sharding): each is divided over as many processes as there are for it.
        reshard_after_forward: Let go of a block's weights between forward and backward; gathering them again costs
            time and saves memory.
        cpu_offload: Keep the shards in main memory.
        base_weights: Folders of safetensors files by the name of the part of the module that they are for, such as
            ``{"model": "/models/llama"}``; the module built these parts under `parameters_on_meta`. Each process reads
            its own shards alone, so that a base may be larger than the memory of one process.
        process_group_backend: As for Lightning's strategy.
        timeout: Likewise.

    Raises:
        ValueError: If the processes cannot be divided into that many replicas.
    """

    def __init__(
        self,
        blocks: Sequence[str] | None = None,
        replicas: int = 1,
        reshard_after_forward: bool = True,
        cpu_offload: bool = False,
        base_weights: Mapping[str, str] | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.blocks = blocks
        self.replicas = replicas
        self.reshard_after_forward = reshard_after_forward
        self.cpu_offload = cpu_offload
        self.base_weights = base_weights or {}

    @override
    def setup_environment(self) -> None:
        """Start the process group and lay the processes out."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        if self.replicas < 1 or self._data_parallel_size % self.replicas:
            raise ValueError(
                f"replicas={self.replicas}: {self._data_parallel_size} processes cannot be divided into that many "
                "equal parts: give a divisor"
            )
        super().setup_environment()

    @override
    def setup(self, trainer: Trainer) -> None:
        """Divide the base unless the module did, give it its values, and make the optimizers."""
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        module = self._module
        if not any(isinstance(inner, FSDPModule) for inner in module.modules()):
            self._shard(module)
        if self.base_weights:
            fill_base(module, self.base_weights, torch.device("cpu") if self.cpu_offload else self.root_device)
        else:
            _materialize_distributed_module(module, self.root_device)
        self.model = self.precision_plugin.convert_module(module)
        self.model_to_device()
        self.prepare()
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        self.clip_here()
        if trainer.state.fn == TrainerFn.FITTING:
            _optimizers_to_device(self.optimizers, self.root_device)

    @override
    def model_to_device(self) -> None:
        """Move what is whole, and the shards too unless they are to stay in main memory."""
        if not self.cpu_offload:
            super().model_to_device()
            return
        for tensor in (*kept_whole(self._module), *self._module.buffers()):
            tensor.data = tensor.data.to(self.root_device)

    def _shard(self, module: nn.Module) -> None:
        options: dict[str, Any] = {
            "mesh": self._mesh(),
            "ignored_params": kept_whole(module),
            "reshard_after_forward": self.reshard_after_forward,
            "offload_policy": CPUOffloadPolicy() if self.cpu_offload else OffloadPolicy(),
        }
        for block in blocks_of(module, self.blocks):
            fully_shard(block, **options)
        fully_shard(module, **options)
        for name in STEPS:
            register_fsdp_forward_method(module, name)

    def _mesh(self) -> DeviceMesh:
        """Return the processes over which the base is divided, with one more dimension if there are copies of it."""
        if self.replicas == 1:
            return self.device_mesh["data_parallel"]
        size = (self.replicas, self.world_size // self.replicas)
        return init_device_mesh(self.root_device.type, size, mesh_dim_names=("replicate", "shard"))
