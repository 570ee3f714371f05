"""Kill a process at a random moment inside a save that replaces a good artefact, and look at what is left.

Every save writes the next version number into all of its tensors and, where a writer has one, into its config. An
artefact is lost if it cannot be read, and torn if it has parts of two versions.
"""

from __future__ import annotations

import mmap
import os
import random
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor, nn

from lightning_lora import LoRA, inject, load_adapter, save_adapter
from lightning_lora.checkpoints import AtomicCheckpointIO

NUMBERS = 2**22  # of fp32: 16 MiB, in four tensors


class Writer(NamedTuple):
    """One way to save: what writes a version into a folder, and what reads the versions of its parts."""

    write: Callable[[Path, int], object]
    read: Callable[[Path], set[float]]
    elsewhere: bool = False  # the system's folder for temporary files is on another file system


class Measured(NamedTuple):
    """What a campaign counted."""

    kills: int
    inside: int
    lost: int
    torn: int
    left: int  # temporary files or folders, before the next save
    left_after: int  # and after it


def tensors(version: int) -> dict[str, Tensor]:
    return {name: torch.full((NUMBERS // 4,), float(version)) for name in "abcd"}


def values(state: dict[str, Any]) -> set[float]:
    return {extreme for value in state.values() for extreme in (value.min().item(), value.max().item())}


class Whole(nn.Module):
    """A network with adapters and a head outside of it: a folder of three files."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Sequential(nn.Linear(8, NUMBERS // 16, bias=False)))
        self.head = nn.Linear(NUMBERS // 2, 1, bias=False)

    def training_step(self, batch: Any) -> None: ...

    def configure_optimizers(self) -> None: ...


def adapted() -> nn.Module:
    model = Whole()
    inject(model, LoRA(r=8), ["net.0.0"], modules_to_save=["head"], seed=0)
    return model


def filled(model: nn.Module, version: int) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(version)
    return model


def our_folder() -> Writer:
    model, bare = adapted(), Whole()
    bare.net[0][0].weight = model.net[0][0].weight

    def read(where: Path) -> set[float]:
        load_adapter(bare, where / "adapter")
        return values({name: p for name, p in bare.named_parameters() if p.requires_grad})

    return Writer(lambda where, version: save_adapter(filled(model, version), where / "adapter"), read)


def checkpoint(io: Any, elsewhere: bool) -> Writer:
    return Writer(
        lambda where, version: io.save_checkpoint({"state": tensors(version)}, where / "a.ckpt"),
        lambda where: values(torch.load(where / "a.ckpt", weights_only=True)["state"]),
        elsewhere,
    )


def one_safetensors() -> Writer:
    return Writer(
        lambda where, version: safetensors.torch.save_file(tensors(version), where / "a.safetensors"),
        lambda where: values(safetensors.torch.load_file(where / "a.safetensors")),
    )


def plain() -> Writer:
    return Writer(
        lambda where, version: torch.save(tensors(version), where / "a.pt"),
        lambda where: values(torch.load(where / "a.pt", weights_only=True)),
    )


def by_peft() -> Writer:
    import json

    from peft import LoraConfig, get_peft_model

    model = get_peft_model(Whole().net[0], LoraConfig(r=8, target_modules=["0"], init_lora_weights=False))

    def write(where: Path, version: int) -> None:
        model.peft_config["default"].lora_alpha = version
        filled(model, version).save_pretrained(where / "peft")

    def read(where: Path) -> set[float]:
        alpha = json.loads((where / "peft" / "adapter_config.json").read_text())["lora_alpha"]
        return {float(alpha)} | values(safetensors.torch.load_file(where / "peft" / "adapter_model.safetensors"))

    return Writer(write, read)


def by_transformers() -> Writer:
    import json

    from transformers import BertConfig, BertModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = BertModel(BertConfig(vocab_size=8192, hidden_size=256, num_hidden_layers=2, num_attention_heads=4))

    def write(where: Path, version: int) -> None:
        model.config.version = version
        filled(model, version).save_pretrained(where / "model")

    def read(where: Path) -> set[float]:
        version = json.loads((where / "model" / "config.json").read_text())["version"]
        return {float(version)} | values(safetensors.torch.load_file(where / "model" / "model.safetensors"))

    return Writer(write, read)


def distributed() -> Writer:
    import torch.distributed.checkpoint as dcp

    def read(where: Path) -> set[float]:
        state = tensors(0)
        try:
            dcp.load(state, checkpoint_id=where / "dcp", no_dist=True)
        except BaseException as error:  # its own is no Exception
            raise OSError(str(error)) from error
        return values(state)

    return Writer(lambda where, version: dcp.save(tensors(version), checkpoint_id=where / "dcp", no_dist=True), read)


OURS: dict[str, Callable[[], Writer]] = {
    "our adapter folder": our_folder,
    "our checkpoint, $TMPDIR on the same file system": lambda: checkpoint(AtomicCheckpointIO(), False),
    "our checkpoint, $TMPDIR on another one": lambda: checkpoint(AtomicCheckpointIO(), True),
}
ANCHORS: dict[str, Callable[[], Writer]] = {
    "Lightning's checkpoint, $TMPDIR on the same file system": lambda: checkpoint(TorchCheckpointIO(), False),
    "Lightning's checkpoint, $TMPDIR on another one": lambda: checkpoint(TorchCheckpointIO(), True),
    "safetensors `save_file`": one_safetensors,
    "`torch.save`": plain,
    "PEFT `save_pretrained`": by_peft,
    "transformers `save_pretrained`": by_transformers,
    "torch.distributed.checkpoint, the same id again": distributed,
}


def other_file_system(where: Path) -> Path | None:
    """A folder on another device than this one, for temporary files."""
    shm = Path("/dev/shm")
    return shm if shm.is_dir() and os.access(shm, os.W_OK) and shm.stat().st_dev != where.stat().st_dev else None


def measure(writer: Writer, kills: int, where: Path, seed: int = 0) -> Measured:
    """Kill saves of one writer.

    Args:
        writer: What is measured.
        kills: How many processes are killed.
        where: An empty folder.
        seed: Of the moments.
    """
    warnings.simplefilter("ignore")
    draw, counts = random.Random(seed), dict.fromkeys(("inside", "lost", "torn", "left", "left_after"), 0)
    beside = other_file_system(where) if writer.elsewhere else where.parent
    place = Path(tempfile.mkdtemp(dir=beside))
    before, tempfile.tempdir = tempfile.tempdir, str(place)
    saving = mmap.mmap(-1, 1)
    try:
        version = 1
        writer.write(where, version)  # the first one imports and fills caches
        start = time.perf_counter()
        writer.write(where, version)
        expected, seconds = files(where), time.perf_counter() - start
        for _ in range(kills):
            version += 1
            saving[0] = 0
            child = os.fork()
            if child == 0:
                save_for_ever(writer, where, version, saving)
            while saving[0] == 0:
                time.sleep(0.0005)
            time.sleep(draw.uniform(0, 1.5 * seconds))
            counts["inside"] += saving[0] == 1
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            version += 1000
            counts["left"] += len(files(where) - expected) + len(files(place))
            try:
                found = writer.read(where)
            except Exception:  # whatever a reader says of a file that is no more
                counts["lost"] += 1
                shutil.rmtree(where)
                where.mkdir()
            else:
                counts["torn"] += len(found) > 1
            writer.write(where, version)
            counts["left_after"] += len(files(where) - expected) + len(files(place))
            for path in place.iterdir():  # else they fill the memory
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    finally:
        tempfile.tempdir = before
        shutil.rmtree(place)
    return Measured(kills, **counts)


def files(where: Path) -> set[str]:
    """The names in a folder; those below are not temporary."""
    found = {path.name for path in where.iterdir()}
    return found | {f"{path}" for part in ("peft/*", "model/*", "dcp/*.tmp") for path in where.glob(part)}


def save_for_ever(writer: Writer, where: Path, version: int, saving: mmap.mmap) -> None:
    try:
        while True:
            saving[0] = 1
            writer.write(where, version)
            saving[0] = 2
            version += 1
    finally:
        os._exit(1)
