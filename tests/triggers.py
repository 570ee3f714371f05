"""What the rows of test_messages.py have in common: models, files and runs that are special in one way."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as L
import safetensors.torch
import torch
import torch.distributed as dist
from conftest import Lit, loader
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint as checkpoint_of
from torch.utils.data import DataLoader, IterableDataset

from lightning_lora import (
    AdapterEMA,
    DeltaLoRA,
    LoRA,
    LoRACallback,
    LoRADrop,
    Method,
    PreemptionCheckpoint,
    inject,
    merged,
    per_example,
    recommend_targets,
    remove,
    save_adapter,
    sites,
)
from lightning_lora.callbacks.audit import Audit
from lightning_lora.callbacks.preemption import _requeue
from lightning_lora.callbacks.silent_batches import silent_losses
from lightning_lora.derived_groups import split
from lightning_lora.files import read_tensors, to_bytes
from lightning_lora.input_statistics import InputStatistics
from lightning_lora.offline import merge
from lightning_lora.sharing import share
from lightning_lora.strategies import LoRAFSDP2Strategy
from lightning_lora.strategies.base_weights import fill_base
from lightning_lora.strategies.ddp import check_alike

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FIRST = "base_model.model.first."  # PEFT's name of the first layer of Net


def net(**layers: nn.Module) -> Any:
    """The network of `conftest.Lit` with the same values at every call; given layers are added or replace its own."""
    model = Lit().net
    for name, layer in layers.items():
        setattr(model, name, layer)
    return model


def adapted(model: nn.Module | None = None, method: Method | None = None, **options: Any) -> Any:
    model = net() if model is None else model
    inject(model, method or LoRA(r=2, alpha=4), **options)
    return model


def in_place(model: nn.Module) -> Any:
    """A model to whose base a run has written."""
    method = DeltaLoRA(start_step=-1, in_place=True)
    (schedule,) = method.schedules(sites(adapted(model, method)), "default")
    optimizer = over_trainable(model)
    schedule.before_step(optimizer)
    schedule.after_step(optimizer)
    return model


def saved(model: nn.Module | None = None, **options: Any) -> Path:
    save_adapter(adapted(model, **options), "best.adapter")
    return Path("best.adapter")


def changed(tensors: Mapping[str, Any] = {}, site: Mapping[str, Any] = {}, model: Any = None, **fields: Any) -> Path:
    """A saved adapter with other tensors, another first site or other fields in its description; the checksum fits."""
    weights = saved(model, bias="lora_only", target_modules=["first", "second"]) / WEIGHTS
    present, described = read_tensors(weights)
    assert described is not None
    described["sites"]["first.weight"] |= site
    kept = {name: tensor for name, tensor in {**present, **tensors}.items() if tensor is not None}
    weights.write_bytes(to_bytes(kept, described | fields))
    return weights.parent


def by_peft(
    tensors: dict[str, Tensor] | None = None,
    model: nn.Module | None = None,
    method: Method = LoRA(r=2, alpha=4),  # noqa: B008
    **fields: Any,
) -> Path:
    """A saved adapter as PEFT would write it, perhaps with other tensors or other fields in its config."""
    folder = saved(model, method=method)
    present, _ = read_tensors(folder / WEIGHTS)
    safetensors.torch.save_file(tensors or present, folder / WEIGHTS, {"format": "pt"})
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))
    return folder


def without_alpha(folder: Path) -> Path:
    config = json.loads((folder / CONFIG).read_text())
    del config["lora_alpha"]
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def base(model: nn.Module | None = None, **tensors: Tensor | None) -> Path:
    """The file ``base.pt`` with a model's weights, some of them replaced or, where None, left out."""
    values = {**(model or net()).state_dict(), **{name.replace("_", "."): tensor for name, tensor in tensors.items()}}
    torch.save({name: tensor for name, tensor in values.items() if tensor is not None}, "base.pt")
    return Path("base.pt")


def written(path: str, content: str | bytes = b"") -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return Path(path)


def stored(path: str, content: Any) -> Path:
    torch.save(content, path)
    return Path(path)


def trainer(*callbacks: L.Callback, **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    short = {"devices": 1, "max_epochs": 1, "enable_checkpointing": False}
    return L.Trainer(callbacks=[*callbacks], **quiet | short | options)


def fit(module: Any = None, *callbacks: L.Callback, method: Any = None, **options: Any) -> Any:
    """Train one batch with LoRACallback in front of other callbacks."""
    run = trainer(LoRACallback(method or LoRA(r=2), **options), *callbacks)
    run.fit(module or Lit(), loader(1))
    return run


def fit_again_after_dropping() -> None:
    """Fit a module from which LoRA-drop has dropped adapters."""
    module, method = Lit(), LoRADrop(r=2)
    inject(module, method)
    share(module, [])
    fit(module, method=method)


def raised_note(room: str, run: Callable[[], object]) -> None:
    """Raise what a room would only log."""

    def note(text: str) -> None:
        raise UserWarning(text)

    with mock.patch(f"lightning_lora.{room}.rank_zero_info", note):
        run()


def checkpoint(module: Any = None, **options: Any) -> str:
    fit(module, **options).save_checkpoint("best.ckpt")
    return "best.ckpt"


class Saves(L.Callback):
    """Saves a checkpoint after the first batch."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 1:
            trainer.save_checkpoint("best.ckpt")


class WithoutLength(IterableDataset[Any]):
    """Gives the batches of a loader."""

    def __iter__(self) -> Any:
        return iter(loader(2))


class Placed(DataLoader[Any]):
    """Says that it can go back to its place."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def resume_after_one_batch(batches: Any, **options: Any) -> None:
    """Save amid an epoch, and go on from there."""
    trainer(LoRACallback(LoRA(r=2)), Saves()).fit(Lit(), batches, **options)
    trainer(LoRACallback(LoRA(r=2))).fit(Lit(), batches, ckpt_path="best.ckpt", **options)


def with_random_states(change: Callable[[dict[str, Any], str], None]) -> str:
    """Change the random states in a checkpoint."""
    content = torch.load(checkpoint())
    change(content, "lightning_lora.random_states")
    torch.save(content, "best.ckpt")
    return "best.ckpt"


def resume(path: str, **options: Any) -> None:
    trainer(LoRACallback(LoRA(r=2), **options), max_epochs=2).fit(Lit(), loader(1), ckpt_path=path)


class Goes(L.Callback):
    """Sends this process a signal in the first batch."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def leave(*callbacks: L.Callback) -> None:
    """Fit with PreemptionCheckpoint, and give what it says as a warning."""

    def said(text: str) -> None:
        raise UserWarning(text)

    run = trainer(LoRACallback(LoRA(r=2)), PreemptionCheckpoint("."), *callbacks, enable_checkpointing=True)
    with warnings.catch_warnings(), mock.patch("lightning_lora.callbacks.preemption.rank_zero_info", said):
        warnings.filterwarnings("ignore", ".*no last checkpoint available")
        run.fit(Lit(), loader(1), ckpt_path="last")


def leaving() -> None:
    leave(ModelCheckpoint("others"), Goes())


def requeue() -> None:
    with mock.patch.dict(os.environ, {"PATH": "", "SLURM_JOB_ID": "4217"}):
        _requeue()


def beside(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    """Compare checksums with those that another rank would send."""
    sent: list[Tensor] = []
    with mock.patch.object(dist, "all_reduce", lambda tensor, op: sent.append(tensor.clone())):
        check_alike(theirs, torch.device("cpu"))
    with mock.patch.object(dist, "all_reduce", lambda tensor, op: tensor.copy_(tensor.maximum(sent.pop(0)))):
        check_alike(ours, torch.device("cpu"))


def while_merged(act: Callable[[Any], object], model: Any = None) -> None:
    model = model or adapted()
    with merged(model):
        act(model)


def in_mixed_batches(
    act: Callable[[Any], object] = id, model: Any = None, tasks: Any = ("default", None), **options: Any
) -> None:
    model = model or adapted()
    with per_example(model, tasks, **options):
        act(model)


# ---- models and files that are special in one way


def with_attribute(name: str, value: object) -> nn.Linear:
    layer = nn.Linear(4, 8)
    setattr(layer, name, value)
    return layer


def tied(first: nn.Module, other: nn.Module) -> Any:
    """The network with another layer ``third`` that has the weight of the first one."""
    other.weight = first.weight
    return net(first=first, third=other)


class NoisyLinear(nn.Module):
    """A linear layer of somebody's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 3))


def sharded(model: Any = None) -> Any:
    """The network with one weight divided over a group of one process."""
    model = net() if model is None else model
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model.first.weight = nn.Parameter(
            distribute_tensor(model.first.weight, init_device_mesh("cpu", (1,)), [Shard(0)])
        )
    finally:
        dist.destroy_process_group()
    return model


def set_up(strategy: Any, module: L.LightningModule) -> None:
    """Set a strategy up for a module, as far as it gets."""
    strategy.connect(module)
    strategy.setup(trainer())


def dividing(*callbacks: L.Callback) -> Any:
    """A Trainer whose strategy divides the base."""
    run = trainer(*callbacks)
    run._accelerator_connector.strategy = LoRAFSDP2Strategy()
    return run


def filled_from(shapes: Mapping[str, Any], **buffers: Tensor) -> None:
    """Fill a linear layer on the meta device, with buffers that files do not hold, from a file of such tensors."""
    model = nn.Linear(2, 2, device="meta")
    for name, buffer in buffers.items():
        model.register_buffer(name, buffer, persistent=False)
    safetensors.torch.save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is one process only
        fill_base(model, {"": "."}, torch.device("cpu"))


def on_two_devices(strategy: Any) -> Any:
    """The strategy as its Trainer has it on a machine with two devices."""
    strategy.parallel_devices = [torch.device("cpu")] * 2
    return strategy


class Int4Tensor(Tensor):
    """A packed weight as torchao has them; layers give no gradient through this one."""

    __module__ = "torchao.quantization"

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        return result.detach() if function is nn.functional.linear else result


def in_int4() -> nn.Linear:
    layer = nn.Linear(4, 8)
    layer._parameters["weight"] = torch.ones(8, 4).as_subclass(Int4Tensor)  # type: ignore[assignment]
    return layer


def packed_convolution() -> nn.Module:
    layer = nn.Conv1d(4, 8, 1)
    layer.weight.quant_state = None  # by which weights of bitsandbytes are told
    return layer


def two_tables() -> Path:
    """An adapter that PEFT wrote for two parameters of one module."""
    factors = {f"{level}lora_{factor}.weight": torch.ones(4, 4) for level in ("", "base_layer.") for factor in "AB"}
    names = ["first.down", "first.up"]
    tensors = {f"{FIRST}{name}": tensor for name, tensor in factors.items()}
    return by_peft(tensors, r=4, target_parameters=names, alpha_pattern={"first.up": 8})


def packed() -> nn.Module:
    """A layer as ``quantize_dynamic`` leaves it, told by its class's name and module."""
    return type("Linear", (nn.Module,), {"__module__": "torch.ao.nn.quantized.dynamic.modules.linear"})()


class Pretrained(nn.Sequential):
    """What a transformers model looks like from here: its last layer is the output head."""

    config = None

    def save_pretrained(self) -> None: ...

    def get_output_embeddings(self) -> nn.Module:
        return self[-1]


class Looking(Lit):
    """Looks at its training data before it trains.

    Args:
        automatic: Whether Lightning steps the optimizer.
    """

    def __init__(self, automatic: bool = True) -> None:
        super().__init__()
        self.automatic_optimization = automatic

    def configure_model(self) -> None:
        list(silent_losses(self.trainer, self, 1))


class Fetching(Looking):
    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        return self.loss(next(dataloader_iter)[0])


class Outer:
    """An optimizer without torch's base class."""


class Stateful(torch.optim.SGD):
    """An optimizer that makes its state when it is built, out of arguments of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), lr=0.1)
        for parameter in model.parameters():
            self.state[parameter]["sum"] = torch.zeros_like(parameter)


class Bare(Lit):
    def build(self) -> nn.Module:
        return nn.Identity()


class InSetup(Lit):
    """Builds its network in ``setup``, anew each time."""

    def build(self) -> nn.Module:
        return nn.Identity()

    def setup(self, stage: str) -> None:
        self.net = super().build()


class Replaces(Lit):
    def setup(self, stage: str) -> None:
        self.configure_optimizers = super().configure_optimizers  # type: ignore[method-assign]


class Forgetful(Lit):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {}


class Attending(Lit):
    def build(self) -> nn.Module:
        return nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)


class Normed(Lit):
    def build(self) -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(4), super().build())


class Idle(Lit):
    def build(self) -> nn.Module:
        model = super().build()
        model.idle = nn.Linear(4, 4)
        return model


class Tied(Lit):
    def build(self) -> nn.Module:
        model = super().build()
        model.tied = nn.Linear(8, 3)
        model.tied.weight = model.second.weight
        return model


def groups(*parameters: nn.Parameter) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [parameter]} for parameter in parameters], lr=0.1)


def over_trainable(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)


def repeated(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer that was given a group twice behind torch's back."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups.append(dict(optimizer.param_groups[0]))
    return optimizer


def split_optimizer(*sizes: int) -> torch.optim.Optimizer:
    parameters = iter(adapted().parameters())
    optimizer = torch.optim.SGD([{"params": [next(parameters) for _ in range(size)]} for size in sizes], lr=0.1)
    split(adapted(), optimizer)
    return optimizer


def removed() -> Any:
    model = adapted()
    site = sites(model)[0]
    remove(model)
    return site


def fail(error: Exception) -> None:
    raise error


def damaged() -> Path:
    weights = saved() / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    return weights.parent


def without_config() -> Path:
    (by_peft() / CONFIG).unlink()
    return Path("best.adapter")


def merge_square() -> None:
    """Merge into a square weight, where PEFT's config says what the other layer contradicts."""
    model = net(first=nn.Linear(4, 4))
    merge(by_peft(model=copy.deepcopy(model), fan_in_fan_out=True), base(model), Path("merged.pt"))


def two_networks() -> nn.Module:
    return nn.ModuleDict({name: Pretrained(nn.Linear(4, 8), nn.Linear(8, 3)) for name in ("one", "two")})


def merge_tied() -> None:
    """Merge into one of two tied layers."""
    model = tied(nn.Linear(4, 8), nn.Linear(4, 8))
    merge(saved(copy.deepcopy(model), target_modules=["first"]), base(model), Path("merged.pt"))


def twice() -> str:
    for name in ("one", "two"):
        shutil.copytree(saved(), f"both/{name}")
    return "both"


def full_checkpoint() -> str:
    run = trainer()
    run.fit(Lit(), loader(1))
    run.save_checkpoint("full.ckpt")
    return "full.ckpt"


def changed_checkpoint(**fields: Any) -> str:
    content = torch.load(checkpoint())
    content["lightning_lora"] |= fields
    torch.save(content, "best.ckpt")
    return "best.ckpt"


def flipped(path: str, place: int) -> str:
    content = bytearray(Path(path).read_bytes())
    content[place] ^= 1
    Path(path).write_bytes(content)
    return path


def averaged_checkpoint() -> str:
    fit(None, AdapterEMA(decay=0.9)).save_checkpoint("best.ckpt")
    return "best.ckpt"


def checkpoint_without_names() -> str:
    content = torch.load(checkpoint())
    del content["optimizer_states"][0]["lora_names"]
    torch.save(content, "best.ckpt")
    return "best.ckpt"


def diverged(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.first.adapters["weight"]["default"].lora_A.fill_(torch.nan)
    return model


class Both(nn.Module):
    """What a LightningModule with two networks and a head looks like from here."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 2)
        self.student, self.teacher = (Pretrained(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in "12")


def both(path: str, r: int = 2) -> nn.Module:
    torch.manual_seed(0)
    model = Both()
    inject(model, LoRA(r=r), ["student.0", "teacher.0"], modules_to_save=["head"], seed=0)
    save_adapter(model, path)
    torch.manual_seed(0)
    return Both()


def of_two_saves() -> tuple[nn.Module, Path]:
    model = both("best.adapter")
    both("other.adapter", r=1)
    shutil.copytree("other.adapter/teacher", "best.adapter/teacher", dirs_exist_ok=True)
    return model, Path("best.adapter")


def without_file(name: str) -> tuple[nn.Module, Path]:
    model = both("best.adapter")
    Path("best.adapter", name).unlink()
    return model, Path("best.adapter")


def load_state_of_other_groups() -> None:
    model = adapted()
    orders = [[model.first, model.second], [model.second, model.first]]
    one, other = (torch.optim.SGD([{"params": [*m.adapters.parameters()]} for m in order]) for order in orders)
    split(model, one)
    split(model, other)
    other.load_state_dict(one.state_dict())


def clip_weights() -> None:
    model = adapted()
    audit = Audit(model)
    model(torch.ones(1, 4)).sum().backward()
    model.first.weight.data.mul_(2)
    audit.check()


def strategy(name: str, launcher: str = "") -> object:
    """A strategy as `check_strategy` and `check_launcher` see it: by the names of its class and of its launcher's."""
    return type(name, (), {"launcher": type(launcher, (), {})()})()


def seen_inputs() -> InputStatistics:
    """Return the statistics of two inputs of a layer."""
    statistics = InputStatistics("first.weight", (8, 4))
    statistics.update(torch.ones(2, 4))
    return statistics


def without_matplotlib(plot: Callable[[str], object]) -> None:
    """Plot where matplotlib cannot be imported."""
    with mock.patch.dict("sys.modules", {"matplotlib": None, "matplotlib.figure": None}):
        plot("plot.png")


def gradient_in_parts() -> None:
    """Score a layer that two reentrant checkpoints run."""
    model = net()

    def loss(x: Tensor) -> Tensor:
        halves = [checkpoint_of(model.first, half, use_reentrant=True) for half in x.requires_grad_().chunk(2)]
        return torch.stack(halves).sum()

    recommend_targets(model, [torch.ones(4, 4)], loss)
