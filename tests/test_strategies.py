"""Strategies that would lose adapters are refused with the line to write."""

import lightning.pytorch as L
import pytest
from conftest import Lit, loader
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_lora import LoRACallback
from lightning_lora.callbacks.guards import check_strategy


class OwnFSDP(FSDPStrategy):
    """What a user derives is refused like its parent."""


@pytest.mark.parametrize(
    ("cls", "ours"),
    [
        (FSDPStrategy, "lora_fsdp"),
        (OwnFSDP, "lora_fsdp"),
        (ModelParallelStrategy, "lora_fsdp2"),
        (DeepSpeedStrategy, "lora_fsdp2"),
    ],
)
def test_a_sharded_strategy_of_lightning_is_refused_by_name_with_the_one_to_use(cls, ours):
    with pytest.raises(ValueError, match=rf"strategy={cls.__name__}: .* use strategy='{ours}'"):
        check_strategy(cls.__new__(cls))


@pytest.mark.parametrize("start_method", ["spawn", "fork"])
def test_processes_that_would_keep_the_adapters_are_refused(start_method):
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=DDPStrategy(start_method=start_method), logger=False, barebones=True
    )
    with pytest.raises(ValueError, match="the adapters would stay there: use strategy='ddp'"):
        LoRACallback().setup(trainer, Lit(), "fit")


def test_the_plain_strategy_is_not(trainer):
    trainer(callbacks=[LoRACallback()], max_epochs=1).fit(Lit(), loader())
