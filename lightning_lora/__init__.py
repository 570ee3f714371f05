"""LoRA for any PyTorch Lightning model, by adding one callback."""

from lightning_lora import methods as methods
from lightning_lora import strategies as strategies
from lightning_lora.callbacks import AdapterEMA, LoRACallback, PreemptionCheckpoint
from lightning_lora.checkpoints import load_from_checkpoint
from lightning_lora.data_starts import start_from_data
from lightning_lora.files import AdapterError
from lightning_lora.inject import inject, remove
from lightning_lora.loading import load_adapter
from lightning_lora.merge import dequantize_, merge_, merged
from lightning_lora.method import Method, known_methods
from lightning_lora.methods.adalora import AdaLoRA
from lightning_lora.methods.delta_lora import DeltaLoRA
from lightning_lora.methods.dora import DoRA
from lightning_lora.methods.dylora import DyLoRA, at_rank, truncate_
from lightning_lora.methods.hira import HiRA
from lightning_lora.methods.lora import LoRA
from lightning_lora.methods.lora_drop import LoRADrop
from lightning_lora.methods.lora_fa import LoRAFA
from lightning_lora.methods.relora import ReLoRA
from lightning_lora.methods.vera import VeRA
from lightning_lora.mixed_batches import per_example
from lightning_lora.optim import param_groups
from lightning_lora.rank_curve import RankCurve, rank_curve
from lightning_lora.recommendation import Recommendation, Score, recommend_targets
from lightning_lora.saving import save_adapter
from lightning_lora.sites import Site, sites
from lightning_lora.switch import use, using
from lightning_lora.version import __version__

__all__ = [
    "AdaLoRA",
    "AdapterEMA",
    "AdapterError",
    "DoRA",
    "DeltaLoRA",
    "HiRA",
    "DyLoRA",
    "LoRA",
    "LoRACallback",
    "LoRADrop",
    "LoRAFA",
    "Method",
    "PreemptionCheckpoint",
    "ReLoRA",
    "RankCurve",
    "Recommendation",
    "Score",
    "Site",
    "VeRA",
    "at_rank",
    "dequantize_",
    "inject",
    "known_methods",
    "load_adapter",
    "load_from_checkpoint",
    "merge_",
    "merged",
    "param_groups",
    "per_example",
    "rank_curve",
    "recommend_targets",
    "remove",
    "save_adapter",
    "sites",
    "start_from_data",
    "truncate_",
    "use",
    "using",
    "__version__",
]
