"""Lightning's checkpoints with our entries only: written whole, read strictly, with the adapter folder beside them."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.description import describe
from lightning_lora.files import SECTION, AdapterError, some
from lightning_lora.fingerprint import base_weights
from lightning_lora.full_fingerprint import Fingerprint, frozen_digests
from lightning_lora.loading import adopt
from lightning_lora.merge import check_not_merged, merge_
from lightning_lora.resuming import Mismatch, check_same, read_whole, refit, restructure
from lightning_lora.saving import check_finite, folder_contents
from lightning_lora.sites import clean, named_submodules, sites
from lightning_lora.state import base_entries, mark_trained_in_full, own_entries, trained_in_full
from lightning_lora.whole_files import sweep, write_file, write_folder

MARKER = "only adapters are in this file, read it with lightning_lora.load_from_checkpoint or with LoRACallback"
TASK = "default"
LM = TypeVar("LM", bound=LightningModule)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's own reader and writer, but a local file is written beside its target, synced, and then renamed.

    Lightning's writer goes through the system's temporary folder, so across file systems a crash loses the old file.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint; other places than local files are left to Lightning."""
        if storage_options is not None or is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_file(path, lambda file: torch.save(checkpoint, file))


class AdapterCheckpointIO(_WrappingCheckpointIO):
    """The outermost writer, through which every saver passes: it drops the base and writes the adapter folder.

    Args:
        checkpoint_io: The writer that the strategy had.
        module: The adapted module.
        allow_base_mismatch: Resume on another base than the one trained on.
        resume_mismatch: What to do with adapters that are configured otherwise than those of a checkpoint.
        keep_going: Warn of a save that failed, and remove nothing until one succeeds.
        fingerprint: As for ``save_adapter``; the base is read at the first save, as it does not change.
    """

    def __init__(
        self,
        checkpoint_io: Any,
        module: nn.Module,
        allow_base_mismatch: bool = False,
        resume_mismatch: Mismatch = "error",
        keep_going: bool = False,
        fingerprint: Fingerprint = "sampled",
    ) -> None:
        super().__init__(_atomic(checkpoint_io))
        self.module = module
        self.allow_base_mismatch = allow_base_mismatch
        self.resume_mismatch = resume_mismatch
        self.keep_going = keep_going
        self._failed = False
        self._digests: dict[str, str] | None = {} if fingerprint == "sampled" else None

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write our entries of a checkpoint, then the adapter folder of the same name.

        Raises:
            AdapterError: If the module keeps trained entries out of its state dict, or they are not finite.
            RuntimeError: If the adapters are merged.
            OSError: If it could not be written, unless that is to be a warning.
        """
        try:
            self._save(checkpoint, path, storage_options)
        except OSError as error:
            if not self.keep_going:
                raise
            rank_zero_warn(f"{error}; training goes on, and no checkpoint is removed until one is written")
            self._failed = True
        else:
            self._failed = False

    def _save(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None) -> None:
        state = checkpoint.get("state_dict")
        if state is None:  # no checkpoint of Lightning's, such as what spawned processes send back
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        check_not_merged(self.module, "save a checkpoint")
        ours = {clean(name) for name in own_entries(self.module)}
        own_state = {name: tensor for name, tensor in state.items() if clean(name) in ours}
        if len(own_state) < len(ours):
            absent = sorted(ours - {clean(name) for name in own_state})
            raise AdapterError(
                f"{path}: not written, because state_dict() of {type(self.module).__name__} leaves out "
                f"{some(absent)}: do not override it, the base is kept out of checkpoints without that"
            )
        check_finite(self.module, own_state, path)
        slim = _without(
            checkpoint, {name: None if name in own_state else _shape(value) for name, value in state.items()}
        )
        slim["state_dict"] = {**own_state, MARKER: torch.empty(0)}
        found = sites(self.module, TASK)
        bases = base_weights(found)  # once, for the checkpoint and the folder
        digests = self._frozen_digests()
        described = describe(self.module, found, TASK, "", trained_in_full(self.module), bases)
        slim[SECTION] = described | ({"weights": digests} if digests else {})
        if is_remote(path):
            super().save_checkpoint(slim, path, storage_options)
            rank_zero_warn(
                f"{path} is not a local file: its adapter folder is not written: call "
                "save_adapter(model, folder) for one"
            )
        else:
            if os.path.islink(path):  # what `save_last="link"` left: the checkpoint that it points to stays as it is
                os.unlink(path)
            super().save_checkpoint(slim, path, storage_options)
            write_folder(adapter_folder(path), folder_contents(self.module, own_state, TASK, bases, digests))

    def _frozen_digests(self) -> dict[str, str]:
        if self._digests is None:
            self._digests = frozen_digests(self.module)
        if not self._digests:
            return {}
        frozen = {clean(name) for name in base_entries(self.module)}  # not what was thawed since, or turned out to move
        return {name: digest for name, digest in self._digests.items() if name in frozen}

    @override
    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint and check that it belongs to this model.

        Raises:
            AdapterError: If it is damaged, holds no adapters, others than this run's, or was trained on another base.
        """
        if kwargs.get("weights_only", True) is None:
            kwargs["weights_only"] = True  # Lightning would run the code in a pickle from the web
        if not is_remote(path):
            sweep(Path(path).parent)
        inner = super().load_checkpoint
        checkpoint = read_whole(path, lambda: inner(path, *args, **kwargs))
        section = checkpoint.get(SECTION)
        if section is None:
            raise AdapterError(
                f"{path} was not written with LoRACallback, so it holds no adapters: load its weights where the module "
                "builds its base, and start without ckpt_path"
            )
        restructure(self.module, section, path)
        allow = self.allow_base_mismatch
        if self.resume_mismatch == "error":
            check_same(self.module, section, path, allow_base_mismatch=allow)
            checkpoint["state_dict"] = own_state(self.module, checkpoint["state_dict"], path)
        else:
            checkpoint["state_dict"].pop(MARKER, None)
            resize = self.resume_mismatch == "resize"
            doubt = refit(self.module, section, checkpoint, path, resize=resize, allow_base_mismatch=allow)
            if doubt is not None:
                rank_zero_warn(doubt)
        return checkpoint

    @override
    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint and its adapter folder; one that is still being written goes when it is there."""
        if self._failed:
            return
        folder = adapter_folder(path)
        if not os.path.islink(path) and not is_remote(path):
            shutil.rmtree(folder, ignore_errors=True)
        executor = self._executor()
        if executor is None:
            super().remove_checkpoint(path)
        else:
            executor.submit(super().remove_checkpoint, path)

    @override
    def teardown(self) -> None:
        """Let the inner writer finish; Lightning's wrapper does not pass this on."""
        if self.checkpoint_io is not None:
            self.checkpoint_io.teardown()

    def _executor(self) -> Executor | None:
        """Return the thread in which an asynchronous writer inside writes, one file after the other."""
        inner: Any = self.checkpoint_io
        while inner is not None:
            executor = getattr(inner, "_executor", None)
            if executor is not None:
                return executor  # type: ignore[no-any-return]
            inner = getattr(inner, "_checkpoint_io", None)
        return None


def own_state(module: nn.Module, state: Mapping[str, Tensor], path: object) -> dict[str, Tensor]:
    """Return a checkpoint's entries under the names that they have in a module, which has to want exactly these.

    Names differ where only one of the two was compiled. Buffers that turned out to change during training are noted
    as trained, as they were in the run that wrote them.

    Args:
        module: The adapted module.
        state: The checkpoint's state dict.
        path: For the message.

    Raises:
        AdapterError: If an entry is missing, or is one that the module does not train.
    """
    modules = named_submodules(module)
    found = {clean(name): value for name, value in state.items() if name != MARKER}
    trained = {clean(name) for name in own_entries(module)}
    buffers = {name for name in found.keys() - trained if _is_buffer(modules, name)}
    missing, extra = sorted(trained - found.keys()), sorted(found.keys() - trained - buffers)
    if missing:
        raise AdapterError(
            f"{path}: {some(missing)} is missing, which this run trains: give modules_to_save and bias as they were"
        )
    if extra:
        raise AdapterError(
            f"{path}: it holds {some(extra)}, which this run does not train: give modules_to_save and bias as they were"
        )
    for name in buffers:
        owner, _, entry = name.rpartition(".")
        mark_trained_in_full(modules[owner], [entry])
    return {name: found[clean(name)] for name in own_entries(module)}


def _is_buffer(modules: Mapping[str, nn.Module], name: str) -> bool:
    owner, _, entry = name.rpartition(".")
    return owner in modules and entry in modules[owner]._buffers


def adapter_folder(path: str | os.PathLike[str]) -> Path:
    """Return the adapter folder that belongs to a checkpoint: ``best.ckpt`` has ``best.adapter``."""
    path = Path(path)
    path = path.resolve() if path.is_symlink() else path
    return path.with_name(path.name.removesuffix(".ckpt") + ".adapter")


def is_remote(path: Any) -> bool:
    """Tell whether a path names another place than a local file."""
    return "://" in str(path)


def tolerate_missing_base(module: nn.Module, incompatible: Any) -> None:
    """Strike the frozen base off the missing keys after ``load_state_dict``; all of our entries stay required.

    Keys carry a prefix where the module is inside another one, as in the copy that averages weights.
    """
    known = dict.fromkeys(base_entries(module), True) | dict.fromkeys(own_entries(module), False)
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not _meant(key, known)]


def _meant(name: str, known: Mapping[str, Any]) -> Any:
    """Return what is known of the entry that a name means, which may have a prefix: the longest end that is known."""
    parts = name.split(".")
    ends = (".".join(parts[start:]) for start in range(len(parts)))
    return next((known[end] for end in ends if end in known), None)


def load_from_checkpoint(
    cls: type[LM],
    checkpoint_path: str | Path,
    *,
    setup_stage: str | None = None,
    merge: bool = False,
    allow_base_mismatch: bool = False,
    **kwargs: Any,
) -> LM:
    """Build a LightningModule and load into it a checkpoint that holds adapters only.

    The class's own ``load_from_checkpoint`` cannot know about adapters: it raises on such a file, and with
    ``strict=False`` returns the bare base.

    Args:
        cls: The LightningModule's class; it builds its base as it did for training.
        checkpoint_path: A checkpoint written with ``LoRACallback``.
        setup_stage: Call ``setup`` with this stage first, for modules that build their layers there.
        merge: Return a plain model with the adapters merged.
        allow_base_mismatch: Load although the base is not the one that the adapters were trained on.
        kwargs: As for the class's ``load_from_checkpoint``, hyperparameters among them.

    Raises:
        AdapterError: If the file holds no adapters, or they do not fit the model.
    """
    if kwargs.get("weights_only") is None:
        kwargs["weights_only"] = True  # Lightning would run the code in a pickle from the web
    options = {"map_location": kwargs.get("map_location"), "weights_only": kwargs["weights_only"]}
    checkpoint = read_whole(checkpoint_path, lambda: TorchCheckpointIO().load_checkpoint(checkpoint_path, **options))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found keys that are")  # the base is loaded first, adapters below
        model = cls.load_from_checkpoint(checkpoint_path, strict=False, **kwargs)
    if setup_stage is not None:
        model.setup(setup_stage)
    if SECTION not in checkpoint:
        raise AdapterError(
            f"{checkpoint_path} was not written with LoRACallback: use {cls.__name__}.load_from_checkpoint instead"
        )
    try:
        adopt(model, checkpoint[SECTION], checkpoint_path, allow_base_mismatch=allow_base_mismatch)
    except AdapterError as error:
        own_setup = cls.setup.__module__.partition(".")[0] not in ("lightning", "pytorch_lightning")
        hint = "; if it builds its layers in setup, pass setup_stage='predict'" if own_setup and not setup_stage else ""
        raise AdapterError(f"{error}{hint}") from None
    state = own_state(model, checkpoint["state_dict"], checkpoint_path)
    hook = model.register_load_state_dict_post_hook(tolerate_missing_base)  # type: ignore[no-untyped-call]
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise AdapterError(f"{checkpoint_path}: {error}") from None
    finally:
        hook.remove()
    return merge_(model) if merge else model  # type: ignore[return-value]


def _atomic(checkpoint_io: Any) -> Any:
    """Return the writer with Lightning's plain one replaced by the atomic one, also inside a wrapper."""
    if type(checkpoint_io).__name__ == "TorchCheckpointIO":
        return AtomicCheckpointIO()
    inner = getattr(checkpoint_io, "_checkpoint_io", None)
    if inner is not None:
        checkpoint_io._checkpoint_io = _atomic(inner)
    return checkpoint_io


def _without(value: Any, base: Mapping[str, Any]) -> Any:
    """Return a copy of nested containers without the base's tensors, wherever a callback put them.

    Args:
        value: A checkpoint, or a part of it.
        base: Shapes by name, None for our entries; copies of a module may have longer names.
    """
    if isinstance(value, dict):
        kept = {
            key: _without(inner, base)
            for key, inner in value.items()
            if not (isinstance(inner, Tensor) and _meant(str(key), base) == inner.shape)
        }
        same = len(kept) == len(value) and all(kept[key] is value[key] for key in kept)
        return value if same else kept
    if type(value) in (list, tuple):
        return type(value)(_without(inner, base) for inner in value)
    return value


def _shape(value: Any) -> Any:
    return value.shape if isinstance(value, Tensor) else None
