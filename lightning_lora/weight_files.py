"""Read and write the weights of a base: a checkpoint, a state dict, a safetensors file or a folder of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lightning_lora.files import AdapterError
from lightning_lora.whole_files import write_file


def weight_files(path: Path) -> list[Path]:
    """Return the weight files that a path means: itself, or the safetensors files in a folder.

    Raises:
        AdapterError: If there is none.
    """
    if path.is_file():
        return [path]
    found = sorted(path.glob("*.safetensors"))
    if not found:
        raise AdapterError(f"{path}: no such file, or a folder without .safetensors files")
    return found


def target_files(into: Path, sources: list[Path], out: Path) -> dict[Path, Path]:
    """Return where the new version of each source is to be written.

    Args:
        into: The path that the sources are, or are in.
        sources: The weight files.
        out: A new file, or a folder.

    Raises:
        FileExistsError: If there is a file already.
    """
    to_folder = into.is_dir() or not out.suffix or out.is_dir()
    targets = {source: out / source.name if to_folder else out for source in sources}
    present = [target for target in targets.values() if target.exists()]
    if present:
        raise FileExistsError(f"{present[0]} exists: give another --out")
    return targets


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Return the tensors of a weight file, and the checkpoint around them if there is one.

    Raises:
        AdapterError: If the file is damaged or holds something else.
    """
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path), None
        except (safetensors.SafetensorError, OSError) as error:
            raise AdapterError(f"{path}: damaged or not a safetensors file: {error}") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged or unsafe file
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise AdapterError(
            f"{path}: not readable as plain weights ({reason}): give what torch.save(model.state_dict(), path) wrote"
        ) from None
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise AdapterError(f"{path}: holds no state dict: expected are tensors by name, or these under 'state_dict'")
    return dict(state), content if state is not content else None


def write_weights(path: Path, state: dict[str, Tensor], container: dict[str, Any] | None) -> None:
    """Write tensors as they were read, without the optimizers' states of a checkpoint around them.

    Args:
        path: The file; its suffix decides the format.
        state: The tensors by name.
        container: The checkpoint that they belong into, if any.
    """
    if path.suffix == ".safetensors":
        whole = {key: tensor.contiguous() for key, tensor in state.items()}
        write_file(path, lambda file: file.write(safetensors.torch.save(whole, {"format": "pt"})))
        return
    training = ("optimizer_states", "lr_schedulers")  # they belong to the base's own training, not to new weights
    kept = {key: value for key, value in (container or {}).items() if key not in training}
    content = {**kept, "state_dict": state} if container is not None else state
    write_file(path, lambda file: torch.save(content, file))


def aliases(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return, for each tensor, the further names under which a file has the same memory: weights that are tied.

    Args:
        state: The tensors by name.
    """
    places: dict[tuple[int, torch.Size], list[str]] = {}
    at = {name: (tensor.data_ptr(), tensor.shape) for name, tensor in state.items() if tensor.numel()}
    for name, place in at.items():
        places.setdefault(place, []).append(name)
    return {name: [other for other in places[place] if other != name] for name, place in at.items()}


def turned(state: Mapping[str, Tensor]) -> list[str]:
    """Return the names of weights that lie as (in, out), as far as their biases show it.

    Args:
        state: The tensors by name.
    """
    biases = {name: state.get(name.removesuffix("weight") + "bias") for name in state if name.endswith(".weight")}
    return [
        name
        for name, bias in biases.items()
        if bias is not None and state[name].dim() == 2 and state[name].shape[0] != state[name].shape[1] == len(bias)
    ]
