"""Change an adapter folder at random, and load it: that is an error of one kind, or exactly what was saved."""

from __future__ import annotations

import copy
import json
import random
import shutil
import struct
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora import AdapterError, LoRA, inject, load_adapter, save_adapter
from lightning_lora.files import SECTION, read_tensors, to_bytes

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
X = torch.linspace(-1, 1, 8).view(2, 4)
KINDS = ("header bytes", "tensor bytes", "config bytes", "config values")
ODD: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2.5,
    7,
    10**12,
    10**400,
    1e30,
    "",
    "x",
    "../up",
    "(a+)+b",
    "a\0",
    [],
    [1],
]
ODD += [{}, {"r": 1}, ["first"] * 2, [[]], {"first": 0}, "LORA", "ADALORA", "VERA", "NaN", "\ud800"]


def network() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).eval()


BASE = network()


def saved(where: Path) -> Tensor:
    """Save an adapter and return the output of the model that has it."""
    model = copy.deepcopy(BASE)
    inject(model, LoRA(r=2, alpha=4), ["0", "2"], seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape))
    save_adapter(model, where)
    return model(X).detach()


class Folder:
    """An adapter folder with one thing in it changed at a time."""

    def __init__(self, where: Path, seed: int) -> None:
        self.where, self.draw = where, random.Random(seed)
        torch.manual_seed(seed)
        self.expected = saved(where)
        self.weights, self.config = (where / WEIGHTS).read_bytes(), (where / CONFIG).read_bytes()
        self.start = 8 + struct.unpack("<Q", self.weights[:8])[0]
        self.tensors, described = read_tensors(where / WEIGHTS)
        self.described: dict[str, Any] = described or {}

    def change(self, kind: str) -> None:
        weights, config = self.weights, self.config
        if kind == "header bytes":
            weights = self.mutated(weights[: self.start]) + weights[self.start :]
        elif kind == "tensor bytes":
            weights = weights[: self.start] + self.mutated(weights[self.start :])
        elif kind == "config bytes":
            config = self.mutated(config)
        elif kind == "config values":  # both of the config and of the description in the header, whose checksum stays
            config = json.dumps(self.with_odd_value(json.loads(config))).encode()
            weights = self.unsigned(self.with_odd_value(self.described))
        else:  # signed values: the checksum is right
            weights = to_bytes(self.tensors, self.with_odd_value(self.described))
        (self.where / WEIGHTS).write_bytes(weights)
        (self.where / CONFIG).write_bytes(config)

    def mutated(self, content: bytes) -> bytes:
        """Flip bits, set, remove, insert, repeat or cut bytes, once to four times."""
        data = bytearray(content)
        for _ in range(self.draw.choice((1, 1, 1, 2, 4))):
            place, length = self.draw.randrange(max(1, len(data))), self.draw.choice((1, 1, 2, 8, 64))
            act = self.draw.randrange(6)
            if act == 0:
                data[place : place + 1] = bytes([(data[place : place + 1] or b"\0")[0] ^ 1 << self.draw.randrange(8)])
            elif act == 1:
                data[place : place + length] = self.draw.randbytes(length)
            elif act == 2:
                del data[place : place + length]
            elif act == 3:
                data[place:place] = self.draw.randbytes(length)
            elif act == 4:
                data[place:place] = data[place : place + length]
            else:
                data[place : place + length] = bytes([self.draw.choice((0, 255, 34, 91, 123))]) * length
        return bytes(data)

    def with_odd_value(self, value: dict[str, Any]) -> dict[str, Any]:
        """Replace, remove or add one entry, at any depth."""
        place: Any = (whole := copy.deepcopy(value))
        while True:
            key = self.draw.choice(sorted(place))
            if isinstance(place[key], dict) and place[key] and self.draw.random() < 0.7:
                place = place[key]
                continue
            act = self.draw.random()
            if act < 0.15:
                del place[key]
            elif act < 0.25:
                place[f"{key}2"] = place[key]
            else:
                place[key] = self.draw.choice(ODD)
            return whole

    def unsigned(self, described: dict[str, Any]) -> bytes:
        header = json.loads(self.weights[8 : self.start])
        header["__metadata__"][SECTION] = json.dumps(described)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + self.weights[self.start :]


def ours(where: Path) -> Tensor:
    model = copy.deepcopy(BASE)
    load_adapter(model, where)
    return model(X).detach()


def by_peft(where: Path) -> Tensor:
    from peft import PeftModel

    return PeftModel.from_pretrained(copy.deepcopy(BASE), where)(X).detach()


def measure(load: Callable[[Path], Tensor], kind: str, count: int, where: Path, seed: int = 0) -> Counter[str]:
    """Load mutated folders and count what comes of it: names of errors, ``exact`` and ``silent``.

    Args:
        load: Returns the output of the model with the folder's adapter.
        kind: What is changed.
        count: How often.
        where: A folder to work in.
        seed: Of the changes.
    """
    folder, found = Folder(where, seed), Counter[str]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(count):
            folder.change(kind)
            try:
                output = load(where)
            except AdapterError:
                found["AdapterError"] += 1
            except Exception as error:  # of whatever class: that is what is counted
                found[type(error).__name__] += 1
            else:
                found["exact" if torch.equal(output, folder.expected) else "silent"] += 1
    shutil.rmtree(where)
    return found


def flip(load: Callable[[Path], Tensor], every: int, where: Path) -> tuple[int, int]:
    """Flip each bit of a small adapter's weights file and return how many flips were seen, and of how many.

    Args:
        load: As for ``measure``.
        every: Take every so-manieth bit only.
        where: A folder to work in.
    """
    folder = Folder(where, 0)
    seen = total = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for bit in range(0, 8 * len(folder.weights), every):
            content = bytearray(folder.weights)
            content[bit // 8] ^= 1 << bit % 8
            (where / WEIGHTS).write_bytes(content)
            total += 1
            try:
                load(where)
            except Exception:  # it was seen
                seen += 1
    shutil.rmtree(where)
    return seen, total
