"""Adapter folders: written whole or not at all, read strictly, and a model is untouched by what cannot be read."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from lightning_lora import (
    AdapterError,
    LoRA,
    inject,
    load_adapter,
    merge_,
    merged,
    offline,
    remove,
    save_adapter,
    sites,
)
from lightning_lora.files import SCHEMA, SECTION, read_tensors, to_bytes
from lightning_lora.fingerprint import digest
from lightning_lora.state import trained_in_full
from lightning_lora.whole_files import _exchange, write_file, write_folder

WEIGHTS, CONFIG, OUTSIDE = "adapter_model.safetensors", "adapter_config.json", "trained_in_full.safetensors"
X = torch.linspace(-1, 1, 12).view(3, 4)


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6))
        self.norm = nn.BatchNorm1d(6)
        self.out = nn.Linear(6, 2)
        self.register_buffer("positions", torch.arange(3.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.body(x)))


class Wrapper(nn.Module):
    """What a LightningModule looks like from here."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.net = Net(seed)
        self.head = nn.Linear(2, 2)
        self.register_buffer("class_weights", torch.ones(2))

    def training_step(self, batch: Any) -> None: ...

    def configure_optimizers(self) -> None: ...

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))


class Pretrained(Net):
    """What a transformers model looks like from here."""

    config = None

    def save_pretrained(self) -> None: ...


def change(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def adapted(model: nn.Module | None = None, **options: Any) -> nn.Module:
    model = Net() if model is None else model
    inject(model, LoRA(r=2, alpha=3), **options)
    change(model)
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved adapter with a module that is trained in full."""
    save_adapter(adapted(modules_to_save=["out"]), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def foreign(folder: Path) -> Path:
    """The same folder as PEFT would write it."""
    without_description(folder)
    return folder


def without_description(path: Path) -> None:
    tensors = safetensors.torch.load_file(path / WEIGHTS)
    safetensors.torch.save_file(tensors, path / WEIGHTS, {"format": "pt"})


def snapshot(model: nn.Module) -> list[Any]:
    parts: list[Any] = []
    for name, module in model.named_modules():
        parts.append((name, type(module), sorted(module.__dict__), list(module._modules), module.training))
        parts += [(key, id(p), p._version, p.requires_grad) for key, p in module._parameters.items() if p is not None]
        parts += [(key, id(buffer), buffer._version) for key, buffer in module._buffers.items() if buffer is not None]
    return parts


def refused(path: Path, model: nn.Module | None = None, **options: Any) -> str:
    """The message of the refusal, after a check that the model is as it was."""
    model = Net() if model is None else model
    before = snapshot(model)
    with pytest.raises(AdapterError) as raised:
        load_adapter(model, path, **options)
    assert snapshot(model) == before
    assert str(path) in str(raised.value)
    return str(raised.value)


def description(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path / WEIGHTS, "pt") as file:
        return json.loads(file.metadata()[SECTION])


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object], describe: dict[str, Any] | None = None) -> None:
    """Change the tensors or the description and put the checksum right again."""
    tensors = safetensors.torch.load_file(path / WEIGHTS)
    described = description(path) | (describe or {})
    change(tensors)
    (path / WEIGHTS).write_bytes(to_bytes(tensors, described))


A, B = "base_model.model.body.0.lora_A.weight", "base_model.model.body.0.lora_B.weight"


def test_a_folder_holds_two_files_and_the_weights_say_what_they_are(folder: Path) -> None:
    assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS]
    described = description(folder)
    assert described["schema"] == SCHEMA
    assert (described["method"], described["task"], described["root"]) == ("LoRA", "default", "")
    assert described["hyperparameters"] == LoRA(r=2, alpha=3).hyperparameters()
    assert set(described["sites"]) == {"body.0.weight", "body.2.weight"}
    assert described["trained_in_full"] == ["out.bias", "out.weight"]
    config = json.loads((folder / CONFIG).read_text())
    assert config["target_modules"] == ["body.0", "body.2"]
    assert config["modules_to_save"] == ["out"]
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["bias"]) == ("LORA", 2, 3, "none")


def test_what_is_loaded_is_what_was_saved(folder: Path) -> None:
    ours, fresh = adapted(modules_to_save=["out"]), Net().eval()
    found = load_adapter(fresh, folder)
    assert [site.name for site in found] == ["body.0.weight", "body.2.weight"]
    assert torch.equal(fresh(X), ours(X))
    assert trained_in_full(fresh) == {"out.weight", "out.bias"}
    assert {n for n, p in fresh.named_parameters() if p.requires_grad} == {
        n for n, p in ours.named_parameters() if p.requires_grad
    }
    assert torch.equal(merge_(fresh)(X), merge_(ours)(X))


def test_a_folder_loads_under_another_task_name_and_over_present_values(folder: Path) -> None:
    model = adapted(modules_to_save=["out"])
    change(model, seed=5)
    expected = adapted(modules_to_save=["out"])(X)
    load_adapter(model, folder)
    assert torch.equal(model(X), expected)
    load_adapter(model, folder, task="again")
    assert {site.slot.active for site in sites(model)} == {("again",)}
    assert torch.equal(model(X), expected)


def test_only_the_task_that_is_asked_for_is_saved(tmp_path: Path) -> None:
    model = adapted(target_modules=["body.0"], task="one")
    inject(model, LoRA(r=3), ["body.2"], task="two")
    save_adapter(model, tmp_path / "adapter", task="two")
    assert set(description(tmp_path / "adapter")["sites"]) == {"body.2.weight"}
    with pytest.raises(ValueError, match="task='three': the model has no adapter of that name to save"):
        save_adapter(model, tmp_path / "adapter", task="three")


def test_running_statistics_of_what_is_trained_in_full_are_saved(tmp_path: Path) -> None:
    model = adapted(modules_to_save=["norm"])
    model.train()(X)
    save_adapter(model, tmp_path / "adapter")
    fresh = Net()
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh.norm.running_mean, model.norm.running_mean)
    assert fresh.norm.num_batches_tracked == 1
    assert torch.equal(fresh.eval()(X), model.eval()(X))


def test_an_untrained_buffer_of_the_network_is_the_bases_own(folder: Path) -> None:
    assert not any("positions" in name for name in safetensors.torch.load_file(folder / WEIGHTS))


def test_a_compiled_model_is_saved_and_loaded_under_its_own_names(folder: Path, tmp_path: Path) -> None:
    compiled = torch.compile(adapted(modules_to_save=["out"]), backend="eager")
    save_adapter(compiled, tmp_path / "compiled")
    assert (tmp_path / "compiled" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    fresh = torch.compile(Net(), backend="eager")
    load_adapter(fresh, folder)
    assert torch.equal(fresh.eval()(X), compiled(X))


def test_saving_the_same_twice_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    save_adapter(adapted(modules_to_save=["out"]), tmp_path / "again")
    for name in (WEIGHTS, CONFIG):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_saving_while_merged_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    model = adapted()
    with merged(model), pytest.raises(RuntimeError, match="cannot save while the adapters are merged: leave `merged"):
        save_adapter(model, tmp_path / "adapter")
    assert os.listdir(tmp_path) == []


def test_saving_over_other_files_is_refused_and_keeps_them(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    with pytest.raises(
        FileExistsError, match=r"holds other files, such as notes\.txt: give the adapter its own folder"
    ):
        save_adapter(adapted(), tmp_path)
    assert (tmp_path / "notes" / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError):
        save_adapter(adapted(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_saving_over_an_adapter_leaves_nothing_of_it(folder: Path) -> None:
    save_adapter(adapted(target_modules=["body.2"]), folder)
    assert set(description(folder)["sites"]) == {"body.2.weight"}
    assert os.listdir(folder.parent) == ["adapter"]


def test_a_link_to_a_folder_stays_a_link(folder: Path) -> None:
    link = folder.with_name("latest")
    link.symlink_to(folder)
    save_adapter(adapted(target_modules=["body.2"]), link)
    assert link.is_symlink()
    assert set(description(folder)["sites"]) == {"body.2.weight"}
    assert sorted(os.listdir(folder.parent)) == ["adapter", "latest"]


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing factor": (lambda f: rewrite(f, lambda t: t.pop(B)), f"{B} is missing"),
    "a missing head": (
        lambda f: rewrite(f, lambda t: t.pop("base_model.model.out.bias")),
        "base_model.model.out.bias is missing",
    ),
    "a factor of no module": (
        lambda f: rewrite(f, lambda t: t.update({A.replace("body.0", "body.9"): t[A].clone()})),
        "tensors that belong to no adapted module: base_model.model.body.9.lora_A.weight",
    ),
    "a factor of another shape": (
        lambda f: rewrite(f, lambda t: t.update({B: t[B][:, :1].clone()})),
        f"{B} has shape [6, 1], but [6, 2] is expected: r=2 on a 6 x 4 matrix",
    ),
    "factors of another rank": (
        lambda f: rewrite(f, lambda t: t.update({A: t[A][:1].clone(), B: t[B][:, :1].clone()})),
        f"{A} has shape [1, 4], but [2, 4] is expected: r=2",
    ),
    "a head of another shape": (
        lambda f: rewrite(f, lambda t: t.update({"base_model.model.out.bias": torch.zeros(3)})),
        "out.bias has shape [3], the model's is [2]",
    ),
    "a head of whole numbers": (
        lambda f: rewrite(f, lambda t: t.update({"base_model.model.out.bias": torch.zeros(2, dtype=torch.long)})),
        "out.bias is stored as torch.int64, the model's is torch.float32",
    ),
    "a value that is not a number": (
        lambda f: rewrite(f, lambda t: t[A].__setitem__((0, 0), float("nan"))),
        f"{A} holds values that are not finite; the run that wrote it had diverged",
    ),
    "an infinite value": (lambda f: rewrite(f, lambda t: t[B].__setitem__((0, 0), float("inf"))), f"{B} holds values"),
    "a factor of whole numbers": (
        lambda f: rewrite(f, lambda t: t.update({A: t[A].to(torch.int32)})),
        f"{A} is stored as torch.int32, not as floating point",
    ),
    "a newer schema": (
        lambda f: rewrite(f, lambda t: None, {"schema": SCHEMA + 1}),
        f"written by a newer lightning_lora (schema {SCHEMA + 1}, this version reads up to {SCHEMA}): upgrade",
    ),
    "an unknown method": (
        lambda f: rewrite(f, lambda t: None, {"method": "Nora"}),
        "method 'Nora' is unknown here; known: ",
    ),
    "an unknown hyperparameter": (
        lambda f: rewrite(f, lambda t: None, {"hyperparameters": {"rank": 2}}),
        "hyperparameters of LoRA: ",
    ),
    "a rank out of range": (
        lambda f: rewrite(f, lambda t: None, {"sites": {"body.0.weight": {"r": 0, "alpha": 1.0}}}),
        "hyperparameters of LoRA: r=0",
    ),
    "a rank beyond all bounds": (
        lambda f: rewrite(f, lambda t: None, {"sites": {"body.0.weight": {"r": 10**30, "alpha": 1.0}}}),
        "body.0.weight: r=1000000000000000000000000000000 is beyond all bounds",
    ),
    "an alpha beyond all bounds": (
        lambda f: rewrite(f, lambda t: None, {"sites": {"body.0.weight": {"r": 2, "alpha": 10**400}}}),
        "hyperparameters of LoRA: int too large",
    ),
    "a form that is unknown": (
        lambda f: rewrite(f, lambda t: None, {"sites": {"body.0.weight": {"r": 2, "alpha": 1.0, "form": "cube"}}}),
        "of body.0.weight, which no save writes",
    ),
    "a form of another kind of layer": (
        lambda f: rewrite(f, lambda t: None, {"sites": {"body.0.weight": {"r": 2, "alpha": 1.0, "form": "embedding"}}}),
        "base_model.model.body.0.lora_embedding_B is missing",
    ),
    "a level that would fill the memory": (
        lambda f: rewrite(f, lambda t: None, {"sites": {"body.0.weight": {"r": 2, "alpha": 1.0, "level": 10**12}}}),
        "of body.0.weight, which no save writes",
    ),
    "a size that is none": (
        lambda f: rewrite(f, lambda t: None, {"sites": {"body.0.weight": {"r": 2, "alpha": 1.0, "size": [-1, "x"]}}}),
        "of body.0.weight, which no save writes",
    ),
    "a reason that is no text": (
        lambda f: rewrite(f, lambda t: None, {"not_for_peft": 3}),
        "field 'not_for_peft' of its description is 3",
    ),
    "no site": (lambda f: rewrite(f, lambda t: None, {"sites": {}}), "its description names no adapted matrix"),
    "a site that is no object": (
        lambda f: rewrite(f, lambda t: None, {"sites": {"body.0.weight": 2}}),
        "body.0.weight",
    ),
    "a field of another type": (
        lambda f: rewrite(f, lambda t: None, {"trained_in_full": "out"}),
        "field 'trained_in_full' of its description is a str where a list is expected",
    ),
    "a list of other things": (lambda f: rewrite(f, lambda t: None, {"trained_in_full": [["out"]]}), "trained_in_full"),
    "a file cut short": (lambda f: os.truncate(f / WEIGHTS, 900), "damaged or not a safetensors file"),
    "an empty file": (lambda f: os.truncate(f / WEIGHTS, 0), "damaged or not a safetensors file"),
    "a header that claims gigabytes": (
        lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 2**40) + b"{}"),
        "its header claims 1099511627776 bytes",
    ),
    "another kind of file": (lambda f: (f / WEIGHTS).write_bytes(b"PK\x03\x04" + bytes(100)), "not an adapter"),
    "a folder in the file's place": (
        lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()),
        "no adapter_model.safetensors in this folder",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "no adapter_model.safetensors in this folder"),
    "a pickle only": (
        lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"),
        "adapter_model.bin is a pickle, which could run code: convert it to safetensors first",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_refused_with_the_reason(damage: Any, message: str, folder: Path) -> None:
    damage(folder)
    assert message in refused(folder)


def test_every_changed_byte_is_detected(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    random.seed(0)
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << random.randrange(8)
        (folder / WEIGHTS).write_bytes(flipped)
        with pytest.raises(AdapterError):
            read_tensors(folder / WEIGHTS)


def test_a_changed_value_fails_the_checksum(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    assert "the checksum does not fit: the file was changed or damaged after it was written" in refused(folder)


def test_weights_and_description_of_different_saves_do_not_fit(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    safetensors.torch.save_file({name: t + 1 for name, t in tensors.items()}, folder / WEIGHTS, metadata)
    assert "checksum" in refused(folder)


def test_a_file_in_the_folders_place_is_refused(folder: Path) -> None:
    assert "give the adapter folder" in refused(folder / WEIGHTS)
    assert "no adapter_model.safetensors in this folder" in refused(folder / "nowhere")


FOREIGN: dict[str, tuple[dict[str, Any] | str, str]] = {
    "an alpha pattern that is a regular expression": (
        {"alpha_pattern": {r"body\.\d+": 4}},
        r"alpha_pattern key 'body\\.\\d+' is a regular expression, and none from a file is run",
    ),
    "an alpha pattern that would never end": ({"alpha_pattern": {"(a+)+$": 4}}, "is a regular expression"),
    "target parameters that are no names": ({"target_parameters": [3]}, "target_parameters=[3] is no list of names"),
    "a rank pattern of a parameter that is a regular expression": (
        {"target_parameters": ["body.0.weight"], "rank_pattern": {".*weight": 3}},
        "rank_pattern key '.*weight' is a regular expression, and none from a file is run",
    ),
    "an alpha that is no number": ({"alpha_pattern": {"body.0": "x"}}, "body.0"),
    "an alpha pattern that is no object": ({"alpha_pattern": ["body.0"]}, "alpha_pattern is a list"),
    "a rank that is no number": ({"r": "two"}, "r='two': the rank must be a whole number"),
    "another type of adapter": ({"peft_type": "LOHA"}, "peft_type='LOHA' is not supported; known: "),
    "our own type without our description": ({"peft_type": "LIGHTNING_LORA"}, "is not supported; known: "),
    "a value that is no JSON": ('{"peft_type": "LORA", "r": NaN}', "not readable as JSON: NaN is not a number"),
    "a list": ("[]", "holds a list where an object is expected"),
    "nesting without end": ("[" * 100_000, "not readable as JSON"),
    "bytes that are no text": ("\udcff", "not readable as JSON"),
}


@pytest.mark.parametrize(("config", "message"), FOREIGN.values(), ids=FOREIGN)
def test_a_config_of_another_library_is_read_as_strictly(config: Any, message: str, foreign: Path) -> None:
    if isinstance(config, dict):
        config = json.dumps(json.loads((foreign / CONFIG).read_text()) | config)
    (foreign / CONFIG).write_text(config, errors="surrogateescape")
    assert message in refused(foreign)


def test_a_folder_of_another_library_needs_its_config(foreign: Path) -> None:
    load_adapter(Net(), foreign)
    (foreign / CONFIG).unlink()
    assert "no adapter_config.json beside adapter_model.safetensors" in refused(foreign)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(A), f"tensors that belong to no adapted module: {B}"),
        (lambda t: t.pop(B), f"{B} is missing"),
        (lambda t: t.update({A: torch.tensor(1.0)}), "body.0: r=0"),
        (lambda t: t.update({A: torch.zeros(0, 4)}), "body.0: r=0"),
        (
            lambda t: t.update({A: t[A][:1].clone()}),
            "body.0: r=2 in the config, 1 in the tensors: the files are of different",
        ),
        (lambda t: t.update({"base_model.model.extra": torch.zeros(1)}), "it holds extra, which the model does not"),
        (lambda t: t.update({A: t[A] / 0}), "values that are not finite"),
        (lambda t: [t.pop(name) for name in list(t) if "lora" in name], "nothing here is an adapter"),
    ],
)
def test_tensors_of_another_library_are_read_as_strictly(change: Any, message: str, foreign: Path) -> None:
    tensors = safetensors.torch.load_file(foreign / WEIGHTS)
    change(tensors)
    safetensors.torch.save_file(tensors, foreign / WEIGHTS, {"format": "pt"})
    assert message in refused(foreign)


def test_literal_patterns_are_read_as_names(foreign: Path) -> None:
    config = json.loads((foreign / CONFIG).read_text())
    patterns = {r"^body\.0$": 4, "2": 5, "body.2": 6}
    (foreign / CONFIG).write_text(json.dumps(config | {"alpha_pattern": patterns}))
    found = load_adapter(Net(), foreign)
    assert {site.name: site.adapter("default").method.alpha for site in found} == {
        "body.0.weight": 4,
        "body.2.weight": 5,
    }


def test_another_base_is_refused_unless_that_is_wanted(folder: Path) -> None:
    message = refused(folder, Net(seed=1))
    assert "trained on another base: 2 of 2 adapted weights differ (body.0.weight, body.2.weight)" in message
    assert "allow_base_mismatch=True" in message
    other = Net(seed=1)
    load_adapter(other, folder, allow_base_mismatch=True)
    assert len(sites(other)) == 2


def test_one_changed_weight_of_a_small_base_is_another_base(folder: Path) -> None:
    base = Net()
    with torch.no_grad():
        base.body[2].weight[3, 3] += 1
    assert "1 of 2 adapted weights differ (body.2.weight)" in refused(folder, base)


def test_the_same_base_in_another_precision_is_the_same_base(folder: Path) -> None:
    for base in (Net().bfloat16(), Net().double()):
        load_adapter(base, folder)


def test_a_base_without_values_is_refused(folder: Path) -> None:
    message = refused(folder, Net().to("meta"))
    assert "body.0.weight, body.2.weight is on the meta device: give the base its values, then load" in message


def test_a_digest_reads_whole_numbers_of_values_of_any_size() -> None:
    for size in (1, 63, 64, 65, 4096, 9856, 100_003):
        values = torch.arange(size, dtype=torch.float32)
        assert digest(values) == digest(values.clone())
        assert digest(values) != digest(values.view(1, -1))
        changed = values.clone()
        changed[-1] = -1
        assert digest(changed) != digest(values)
    assert digest(torch.arange(4097 * 4099, dtype=torch.bfloat16)) is not None
    assert digest(torch.empty(2, device="meta")) is None


def test_another_architecture_is_refused(folder: Path) -> None:
    message = refused(folder, nn.Sequential(nn.Linear(4, 6)))
    assert "the adapters belong to body.0.weight, body.2.weight, which the model does not have" in message
    wider = Net()
    wider.body[2] = nn.Linear(6, 8)
    assert "trained on another base" in refused(folder, wider)
    assert "is expected: r=2 on a 8 x 6 matrix" in refused(folder, wider, allow_base_mismatch=True)


def test_another_configuration_under_the_same_task_is_refused(folder: Path) -> None:
    model = Net()
    inject(model, LoRA(r=4))
    assert "body.0.weight already has the adapter 'default'" in refused(folder, model)


def test_names_are_those_of_the_network_inside_a_wrapper(tmp_path: Path) -> None:
    wrapper = adapted(Wrapper(), exclude_modules=["head"])
    save_adapter(wrapper, tmp_path / "adapter")
    assert set(description(tmp_path / "adapter")["sites"]) == {"net.body.0.weight".removeprefix("net.")} | {
        "body.2.weight",
        "out.weight",
    }
    assert sorted(os.listdir(tmp_path / "adapter")) == [CONFIG, WEIGHTS]
    net = Net().eval()
    load_adapter(net, tmp_path / "adapter")
    assert torch.equal(net(X), wrapper.net(X))
    save_adapter(net, tmp_path / "back")
    fresh = Wrapper().eval()
    load_adapter(fresh, tmp_path / "back")
    assert torch.equal(fresh.net(X), wrapper.net(X))
    assert json.loads((tmp_path / "back" / CONFIG).read_text()) == json.loads(
        (tmp_path / "adapter" / CONFIG).read_text()
    )


def test_a_wrapper_may_call_its_network_otherwise(folder: Path) -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"student": Net()}), "b": nn.Linear(2, 2)})
    assert [site.name for site in load_adapter(model, folder)] == ["a.student.body.0.weight", "a.student.body.2.weight"]


def test_two_networks_that_fit_alike_are_not_guessed_between(folder: Path) -> None:
    model = nn.ModuleDict({"student": Net(), "teacher": Net()})
    assert "fit student and teacher alike: load them into that one" in refused(folder, model)
    load_adapter(model["teacher"], folder)
    assert {site.name.partition(".")[0] for site in sites(model)} == {"teacher"}


def test_what_is_trained_in_full_outside_of_the_network_lies_beside_it(tmp_path: Path) -> None:
    wrapper = adapted(Wrapper(), target_modules=["body.*"], modules_to_save=["net.out", "head"])
    save_adapter(wrapper, tmp_path / "adapter")
    assert sorted(os.listdir(tmp_path / "adapter")) == [CONFIG, WEIGHTS, OUTSIDE]
    assert set(safetensors.torch.load_file(tmp_path / "adapter" / OUTSIDE)) == {"head.weight", "head.bias"}
    torch.manual_seed(3)
    fresh = Wrapper().eval()
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(X), wrapper(X))
    assert trained_in_full(fresh) == trained_in_full(wrapper)
    net = Net().eval()
    net.head = nn.Linear(5, 5)
    load_adapter(net, tmp_path / "adapter")
    assert torch.equal(net(X), wrapper.net(X))
    assert trained_in_full(net) == {"out.weight", "out.bias"}
    other = Wrapper()
    del other.head
    assert "it holds head.bias, which the model does not have" in refused(tmp_path / "adapter", other)


def test_each_network_has_its_own_folder(tmp_path: Path) -> None:
    def model() -> nn.Module:
        return nn.ModuleDict({"text": Pretrained(0), "image": Pretrained(1), "mix": nn.Linear(2, 2)}).eval()

    ours = adapted(model(), target_modules=["body.*", "mix"], modules_to_save=["image.out"])
    save_adapter(ours, tmp_path / "adapter")
    parts = {folder.name for folder in (tmp_path / "adapter").iterdir()}
    assert {"text", "image"} < parts
    assert len(parts) == 3
    fresh = model()
    load_adapter(fresh, tmp_path / "adapter")
    for name, inputs in (("text", X), ("image", X), ("mix", X[:, :2])):
        assert torch.equal(fresh[name](inputs), ours[name](inputs))
    alone = Pretrained(1).eval()
    load_adapter(alone, tmp_path / "adapter" / "image")
    assert torch.equal(alone(X), ours["image"](X))


def test_a_wrapper_around_one_pretrained_network_saves_that_network(tmp_path: Path) -> None:
    class Module(Wrapper):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.ModuleDict({"deep": Pretrained()})

    save_adapter(adapted(Module(), target_modules=["body.*"]), tmp_path / "adapter")
    alone = Pretrained()
    assert len(load_adapter(alone, tmp_path / "adapter")) == 2


@pytest.mark.parametrize("by_peft", [False, True], ids=["in our file", "in PEFT's file"])
def test_modules_called_base_layer_keep_their_name(by_peft: bool, tmp_path: Path) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        inner = nn.ModuleDict({"base_layer": nn.ModuleDict({"fc": nn.Linear(4, 4)}), "fc": nn.Linear(4, 4)})
        return nn.ModuleDict({"x": inner, "y": nn.Linear(4, 4)})

    ours = adapted(model(), target_modules=["x.base_layer.fc", "y"], bias="all")
    save_adapter(ours, tmp_path / "adapter")
    if by_peft:
        without_description(tmp_path / "adapter")
    fresh = model()
    load_adapter(fresh, tmp_path / "adapter")
    assert {name: t.tolist() for name, t in fresh.state_dict().items()} == {
        name: t.tolist() for name, t in ours.state_dict().items()
    }


def test_damage_at_random_never_ends_in_another_error(folder: Path) -> None:
    """Wrong values under a right checksum: what reads the description must check all of it."""
    random.seed(1)
    odd = [None, True, -1, 0, 2.5, 10**12, float("1e300"), "", "x", "../up", [], [1], {}, {"r": 1}, ["out.bias"] * 2]
    tensors, described = read_tensors(folder / WEIGHTS)
    assert described is not None
    for _ in range(300):
        broken = json.loads(json.dumps(described))
        place: Any = broken
        while True:
            key = random.choice(sorted(place))
            if isinstance(place[key], dict) and place[key] and random.random() < 0.7:
                place = place[key]
                continue
            place[key] = random.choice(odd)
            break
        (folder / WEIGHTS).write_bytes(to_bytes(tensors, broken))
        model = Net()
        try:
            load_adapter(model, folder)
        except AdapterError:
            assert sites(model) == []
        with suppress(AdapterError):
            list(offline.inspect(folder))


def leftovers(path: Path) -> list[str]:
    return [name for name in os.listdir(path) if name.startswith(".")]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_the_old_file_survives_an_error_while_writing(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_file(path, lambda file: file.write(b"old"))

    def fail(file: Any) -> None:
        file.write(b"half of the n")
        raise error

    with pytest.raises(type(error)):
        write_file(path, fail)
    assert path.read_bytes() == b"old"
    assert leftovers(tmp_path) == []


def test_the_old_folder_survives_an_error_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder"
    write_folder(path, {"a": b"old", "sub/b": b"old"})
    with pytest.raises(TypeError):
        write_folder(path, {"a": b"new", "c": "no bytes"})  # type: ignore[dict-item]
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_folder(path, {"a": b"new"})
    assert {name: (path / name).read_bytes() for name in ("a", "sub/b")} == {"a": b"old", "sub/b": b"old"}
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("exchanges", [True, False], ids=["in one step", "where a swap is not possible"])
def test_a_folder_is_replaced_as_a_whole(exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchanges:
        monkeypatch.setattr("lightning_lora.whole_files._exchange", lambda one, other: False)
    path = tmp_path / "folder"
    write_folder(path, {"a": b"old", "sub/b": b"old"})
    write_folder(path, {"a": b"new", "c": b"new"})
    assert sorted(os.listdir(path)) == ["a", "c"]
    assert (path / "a").read_bytes() == b"new"
    assert leftovers(tmp_path) == []


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder"
    write_folder(path, {"a": b"old"})
    monkeypatch.setattr("lightning_lora.whole_files._exchange", lambda one, other: False)
    rename, moves = os.rename, []

    def fail_third(source: Any, target: Any) -> None:  # the first finds the old folder, the second moves it aside
        moves.append(target)
        if len(moves) == 3:
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_third)
    with pytest.raises(OSError, match="no"):
        write_folder(path, {"a": b"new"})
    assert (path / "a").read_bytes() == b"old"
    assert leftovers(tmp_path) == []


def test_linux_swaps_folders_in_one_step(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not _exchange(tmp_path / "one", tmp_path / "other"):
        pytest.skip("this system cannot")
    assert os.listdir(tmp_path / "one") == ["other"]


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/../../out"])
def test_a_folder_holds_no_name_that_leads_out_of_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no name inside the folder"):
        write_folder(tmp_path / "folder", {name: b""})
    assert os.listdir(tmp_path) == []


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.skipif(os.name != "posix", reason="modes of other systems")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_mode_of_the_umask_and_a_replaced_one_keeps_its_own(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_file(tmp_path / "file", lambda file: file.write(b"old"))
        write_folder(tmp_path / "folder", {"a": b"old"})
        assert mode(tmp_path / "file") == mode(tmp_path / "folder" / "a") == 0o666 & ~umask
        assert mode(tmp_path / "folder") == 0o777 & ~umask
        (tmp_path / "file").chmod(0o640)
        write_file(tmp_path / "file", lambda file: file.write(b"new"))
        assert mode(tmp_path / "file") == 0o640
        for path, bits in {"folder/a": 0o664, "folder": 0o2775}.items():
            (tmp_path / path).chmod(bits)
        write_folder(tmp_path / "folder", {"a": b"new", "sub/b": b"new"})
        assert mode(tmp_path / "folder" / "a") == 0o664
        assert (tmp_path / "folder").stat().st_mode & 0o7777 == 0o2775
        assert mode(tmp_path / "folder" / "sub" / "b") == 0o666 & ~umask
        assert (tmp_path / "file").read_bytes() == b"new"
    finally:
        os.umask(before)


def test_a_file_behind_a_link_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_file(tmp_path / "file", lambda file: file.write(b"old"))
    write_file(tmp_path / "link", lambda file: file.write(b"new"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"


def test_missing_folders_are_made(tmp_path: Path) -> None:
    write_file(tmp_path / "a" / "b" / "file", lambda file: file.write(b"new"))
    write_folder(tmp_path / "c" / "d", {"e": b"new"})
    assert (tmp_path / "a" / "b" / "file").read_bytes() == (tmp_path / "c" / "d" / "e").read_bytes() == b"new"


def test_a_file_and_its_folder_are_synced_before_and_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_sync(handle: int) -> None:
        calls.append("sync folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "sync file")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("rename") or replace(*paths))
    write_file(tmp_path / "file", lambda file: file.write(b"new"))
    assert calls == ["sync file", "rename", "sync folder"]


def test_shared_and_strided_tensors_are_written_whole() -> None:
    whole = torch.arange(6.0).view(2, 3)
    content = to_bytes({"one": whole.T, "two": whole, "three": whole}, {"schema": SCHEMA})
    read = safetensors.torch.load(content)
    assert torch.equal(read["one"], whole.T)
    assert torch.equal(read["two"], whole)


def test_a_removed_adapter_leaves_nothing_to_save(tmp_path: Path) -> None:
    model = adapted()
    remove(model)
    with pytest.raises(ValueError, match="no adapter of that name to save"):
        save_adapter(model, tmp_path / "adapter")
