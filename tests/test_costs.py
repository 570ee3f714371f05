"""What things cost beside the step, counted and never timed: bytes made, files opened, Python calls made."""

from __future__ import annotations

import builtins
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lora import (
    DoRA,
    HiRA,
    LoRA,
    Method,
    inject,
    load_adapter,
    merge_,
    merged,
    remove,
    save_adapter,
    use,
    using,
)
from lightning_lora.adapter import BLOCK_ON_CPU
from lightning_lora.sites import sites
from lightning_lora.state import own_state_dict

SIDE = 1024  # of a matrix of eight blocks


class Made(TorchDispatchMode):
    """Notes the bytes of each tensor that an operation makes, and not those that it returns as they were."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.operations = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {a.untyped_storage().data_ptr() for a in (*args, *(kwargs or {}).values()) if isinstance(a, Tensor)}
        result = op(*args, **(kwargs or {}))
        self.operations += 1
        for one in result if isinstance(result, tuple | list) else [result]:
            made = isinstance(one, Tensor) and not one.is_meta
            if made and one.untyped_storage().data_ptr() not in given:
                self.sizes.append(one.untyped_storage().nbytes())
        return result


def layers(number: int = 1, side: int = 8, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(number))).to(dtype)


def adapted(model: nn.Module, method: Method, *tasks: str) -> nn.Module:
    for task in tasks or ("default",):
        inject(model, method, task=task)
        for site in sites(model, task):
            nn.init.normal_(site.adapter(task).lora_B, std=0.1)
    return model


def python_calls(run: Callable[[], object]) -> list[str]:
    """Return the names of all Python functions and builtins that are called."""
    names: list[str] = []

    def note(frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            names.append(frame.f_code.co_qualname if event == "call" else argument.__name__)

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [LoRA(r=4), DoRA(r=4), HiRA(r=4)], ids=lambda method: type(method).__name__)
def test_merging_makes_blocks_of_some_rows_and_no_second_weight(method: Method, dtype: torch.dtype) -> None:
    model = adapted(layers(1, SIDE, dtype), method)
    expected = sites(model)[0].adapter("default").adapted(model[0].weight).detach()
    before = model[0].weight
    with Made() as made:
        merge_(model)
    assert model[0].weight is before
    assert max(made.sizes, default=0) <= 4 * BLOCK_ON_CPU < 4 * SIDE**2 // 4
    torch.testing.assert_close(before.detach(), expected)


def test_merging_for_a_while_makes_one_copy_of_the_weight() -> None:
    model = adapted(layers(1, SIDE), LoRA(r=4))
    with Made() as made, merged(model):
        pass
    assert [size for size in made.sizes if size > 4 * BLOCK_ON_CPU] == [4 * SIDE**2]


def test_merging_in_blocks_reaches_every_row_of_a_matrix_that_is_no_multiple_of_them() -> None:
    model = adapted(nn.Sequential(nn.Linear(300, 1000, bias=False)), LoRA(r=4))
    adapter, weight = sites(model)[0].adapter("default"), model[0].weight.detach().clone()
    expected = weight.double() + adapter.delta().double()
    torch.testing.assert_close(merge_(model)[0].weight.double(), expected, rtol=0, atol=1e-6)


def test_switching_touches_no_tensor() -> None:
    model = adapted(layers(3), LoRA(r=2), "a", "b")
    with Made() as made:
        use(model, "a")
        with using(model):
            pass
    assert made.operations == 0


def test_the_entries_of_a_state_dict_share_the_memory_of_the_adapters() -> None:
    model = adapted(layers(3), LoRA(r=2))
    with Made() as made:
        state = own_state_dict(model)
    assert made.sizes == []
    whole = model.state_dict()
    assert state.keys() == {name for name in whole if ".adapters." in name}
    assert all(state[name].data_ptr() == whole[name].data_ptr() for name in state)
    assert not any(tensor.requires_grad for tensor in state.values())


def test_a_loaded_file_is_opened_once_and_its_values_become_the_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(layers(3, 64), LoRA(r=13))
    save_adapter(model, tmp_path / "a")
    opened: list[str] = []
    real = builtins.open

    def counting(path: Any, *args: Any, **options: Any) -> Any:
        opened.append(os.path.basename(path))
        return real(path, *args, **options)

    monkeypatch.setattr(builtins, "open", counting)
    with Made() as made:
        load_adapter(model, tmp_path / "a", "second")
    assert opened == ["adapter_model.safetensors"]
    factor = 4 * 64 * 13
    assert sum(size == factor for size in made.sizes) == 2 * 3  # made once each, to read into
    for site in sites(model):
        first, second = site.adapter("default"), site.adapter("second")
        assert torch.equal(first.lora_A, second.lora_A)
        assert torch.equal(first.lora_B, second.lora_B)
        assert second.lora_A.untyped_storage().nbytes() == factor
        assert second.lora_A.requires_grad


def test_what_was_loaded_does_not_follow_the_file(tmp_path: Path) -> None:
    model = adapted(layers(), LoRA(r=2))
    save_adapter(model, tmp_path / "a")
    load_adapter(model, tmp_path / "a", "second")
    adapter = sites(model)[0].adapter("second")
    before = adapter.lora_B.detach().clone()
    file = tmp_path / "a" / "adapter_model.safetensors"
    with open(file, "r+b") as opened:  # another program writes over it, in place
        opened.write(bytes(file.stat().st_size))
    assert torch.equal(adapter.lora_B, before)


def test_values_are_copied_into_adapters_that_an_optimizer_may_hold(tmp_path: Path) -> None:
    model = adapted(layers(), LoRA(r=2))
    save_adapter(model, tmp_path / "a")
    held = sites(model)[0].adapter("default").lora_B
    saved = held.detach().clone()
    nn.init.ones_(held)
    load_adapter(model, tmp_path / "a")
    assert sites(model)[0].adapter("default").lora_B is held
    assert torch.equal(held, saved)


@pytest.mark.parametrize("run", ["forward", "switch", "bare base", "sites of one task"])
def test_adapters_that_are_not_in_use_cost_nothing(run: str) -> None:
    x = torch.randn(2, 8)
    counts = []
    for number in (1, 50):
        model = adapted(layers(4), LoRA(r=2), *(f"task{i}" for i in range(number)))
        runs: dict[str, Callable[[], object]] = {
            "forward": lambda model=model: model(x),
            "switch": lambda model=model: use(model, "task0"),
            "bare base": lambda model=model: using(model).__enter__(),
            "sites of one task": lambda model=model: sites(model, "task0"),
        }
        use(model, "task0")
        runs[run]()
        with Made() as made:
            runs[run]()
        counts.append((python_calls(runs[run]), made.operations))
    assert counts[0] == counts[1]


def test_a_removed_adapter_leaves_the_others_as_they_were() -> None:
    model = adapted(layers(3), LoRA(r=2), "a", "b")
    use(model, "a")
    output = model(torch.ones(8))
    remove(model, "b")
    assert torch.equal(model(torch.ones(8)), output)
