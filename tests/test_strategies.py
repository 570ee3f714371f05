"""Strategies that would lose adapters are refused with the line to write."""

import pytest
from conftest import Lit, loader
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_lora import LoRACallback
from lightning_lora.callbacks.guards import check_launcher, check_strategy


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


@pytest.mark.parametrize("name", ["ddp_spawn", "ddp_fork", "ddp_notebook", "ddp_fork_find_unused_parameters_true"])
def test_processes_that_would_keep_the_adapters_are_refused(name, trainer):
    run = trainer(strategy=name, devices=2)
    with pytest.raises(ValueError, match=r"stay there: use strategy='ddp', or in a notebook call inject\(model, LoRA"):
        check_launcher(run.strategy)


def test_the_plain_strategy_is_not(trainer):
    trainer(callbacks=[LoRACallback()], max_epochs=1).fit(Lit(), loader())
