"""Faults, one by one: what the machine, the file system, another program or a wrong file can do to an adapter.

Each is a real one where it can be had on one machine. Others are shown elsewhere:

- F2, shapes, dtypes and ranks: `test_files.py`, test_a_damaged_folder_is_refused_with_the_reason.
- F3, another base: `test_files.py`, test_another_base_is_refused_unless_that_is_wanted and the tests after it;
  `test_quantized.py`, test_a_folder_loads_on_the_same_quantized_base_and_on_no_other.
- F4, files of different saves: `test_files.py`, test_weights_and_description_of_different_saves_do_not_fit.
- F12, signals: `test_preempted_ranks.py`, test_whichever_rank_is_told_all_save_and_leave_at_one_step, and
  `campaigns/signals.py`.
- F13, a rank that dies: `test_clusters.py`, test_when_a_rank_dies_the_other_ends_with_an_error_and_...
- F14, another number of ranks: `test_clusters.py`, test_a_run_by_one_two_four_and_one_processes_is_the_run_by_one.
- F15 and F16, resuming after a change: `test_resuming.py`.
- F17, merging: `campaigns/merges.py`, and test_files.py, test_saving_while_merged_is_refused_and_writes_nothing.
- F18, merging into quantized weights: `test_quantized.py`, test_merging_packs_again_and_says_what_that_costs.
- F20, adapters that learn nothing: `test_callback.py`, test_a_layer_that_the_forward_does_not_reach_stops_the_run_...,
  test_reentrant_checkpointing_of_a_frozen_input_stops_although_a_head_trains; `test_optim.py`,
  test_an_optimizer_that_lightning_cli_built_from_the_command_line_trains_the_adapters.
- F22, other callbacks: `test_composition.py`, test_a_callback_of_lightning_that_would_undo_ours_is_refused and
  test_a_callback_of_lightning_does_what_it_is_for; `test_traps.py`, test_two_callbacks_would_train_what_neither_says.
"""

from __future__ import annotations

import ast
import errno
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import Lit, Net, loader
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lightning_lora
from lightning_lora import (
    AdapterError,
    LoRA,
    LoRACallback,
    full_fingerprint,
    inject,
    load_adapter,
    load_from_checkpoint,
    merged,
    offline,
    save_adapter,
    sites,
)
from lightning_lora.checkpoints import AdapterCheckpointIO
from lightning_lora.files import MAX_HEADER_BYTES, read_tensors, to_bytes
from lightning_lora.peft_reading import _doubles
from lightning_lora.whole_files import _UNFINISHED, _here, sweep, write_file, write_folder

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PACKAGE = Path(lightning_lora.__file__).parent
often = settings(max_examples=60, deadline=None, derandomize=True, database=None)
posix = pytest.mark.skipif(os.name != "posix", reason="signals, modes and pipes of POSIX")
as_root = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounts and changes of user need root")


def adapted(seed: int = 0, **options: Any) -> nn.Module:
    """The same base at every call, with adapters whose values depend on the seed."""
    torch.manual_seed(7)
    model = Net()
    inject(model, LoRA(r=2, alpha=4), seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def base() -> nn.Module:
    torch.manual_seed(7)
    return Net().eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adapter(adapted(), tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(path: Path) -> str:
    with pytest.raises(AdapterError) as raised:
        load_adapter(base(), path)
    return str(raised.value)


def by_peft(folder: Path, tensors: dict[str, Any] | None = None, **fields: Any) -> Path:
    """The folder as another library would have written it, with other fields or tensors."""
    present = safetensors.torch.load_file(folder / WEIGHTS)
    safetensors.torch.save_file({**present, **(tensors or {})}, folder / WEIGHTS, {"format": "pt"})
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))
    return folder


def forked(act: Callable[[], object]) -> str:
    """Run a function in another process, which has everything imported, and return what it printed or raised."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forks beside threads: nothing here waits for one
        child = os.fork()
    if child == 0:
        try:
            os.dup2(writer, 1)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            act()
        except BaseException:
            traceback.print_exc(file=sys.stdout)
        finally:
            sys.stdout.flush()
            os._exit(0)
    os.close(writer)
    with open(reader) as file:
        text = file.read()
    os.waitpid(child, 0)
    return text


def started(act: Callable[..., object], *args: object) -> Any:
    """Fork a process that runs a function; not from a thread, which could be forked while another holds a lock."""
    process = get_context("fork").Process(target=act, args=args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forks beside threads: nothing here waits for one
        process.start()
    return process


@contextmanager
def stopped_after(seconds: int) -> Iterator[None]:
    """Fail what does not end: seconds are for a machine that is busy, and what is meant would take years."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of another library's, alone in its place."""
    folder = tmp_path_factory.mktemp("scratch") / "adapter"
    save_adapter(adapted(), folder)
    return by_peft(folder)


@pytest.fixture(scope="module")
def scratch_of_ours(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor], dict[str, Any]]:
    """A folder of ours, with what is in its weights file."""
    folder = tmp_path_factory.mktemp("scratch") / "ours"
    save_adapter(adapted(), folder)
    tensors, description = read_tensors(folder / WEIGHTS)
    assert description is not None
    return folder, tensors, description


# ---- S1 to S8: what a file may do to its reader


def test_every_row_has_a_test_here_or_is_named_above_with_one_that_there_is() -> None:
    there = "\n".join(path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))
    named = re.findall(r"test_\w+(?=[\s,.;])(?!\.py)", __doc__ or "")
    assert [name for name in named if f"def {name}" not in there] == []
    assert len(named) > 12
    for row in [*(f"S{number}" for number in range(1, 9)), *(f"F{number}" for number in range(1, 24))]:
        assert f"def test_{row.lower()}_" in there or re.search(rf"^- .*\b{row}\b", __doc__ or "", re.MULTILINE), row


class Canary:
    """Writes a file where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("canary", "w")


ENTRIES: dict[str, Callable[[Any, Path], object]] = {
    "load_adapter": lambda run, path: load_adapter(base(), path.parent),
    "load_from_checkpoint": lambda run, path: load_from_checkpoint(Lit, path),
    "fit": lambda run, path: run.fit(Lit(), loader(), ckpt_path=path),
    "test": lambda run, path: run.test(Lit(), loader(), ckpt_path=path),
    "merge": lambda run, path: offline.merge(path.parent / "adapter", path, path.with_name("merged.pt")),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_s1_no_pickle_runs_code_wherever_it_is_given(
    entry: str, folder: Path, trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    path = folder.parent / "adapter_model.bin"
    torch.save({"state_dict": {}, "hyper_parameters": Canary(), "pytorch-lightning_version": "2.6.0"}, path)
    if entry == "load_adapter":
        shutil.rmtree(folder)
    with pytest.raises(AdapterError):
        ENTRIES[entry](trainer(callbacks=[LoRACallback()]), path)
    assert not Path("canary").exists()


def test_s1_a_checkpoint_from_the_web_is_read_as_plain_values_too(monkeypatch: Any) -> None:
    asked: list[Any] = []

    def download(url: str, map_location: Any = None, weights_only: Any = None) -> None:
        asked.append(weights_only)
        raise RuntimeError("no such host")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", download)
    monkeypatch.setattr("fsspec.implementations.http.HTTPFileSystem.exists", lambda *_: True)
    with pytest.raises(AdapterError, match="no such host"):
        AdapterCheckpointIO(TorchCheckpointIO(), Lit()).load_checkpoint(
            "https://there.is.none/a.ckpt", weights_only=None
        )
    with pytest.raises(AdapterError, match="no such host"):
        load_from_checkpoint(Lit, "https://there.is.none/a.ckpt")
    assert asked == [True, True]


def header(text: str | bytes, tail: bytes = b"", claims: int | None = None) -> bytes:
    text = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(text) if claims is None else claims) + text + tail


def at(start: int, end: int, name: str = "a", shape: Any = (1,), dtype: str = "F32") -> str:
    return f'"{name}": ' + json.dumps({"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]})


HEADERS = {
    "a length of 2 ** 63": header("{}", claims=2**63),
    "a length beyond the file": header("{}", claims=1000),
    "a length beyond the limit": header(b" " * 100, claims=MAX_HEADER_BYTES + 1),
    "one tensor twice": header(f"{{{at(0, 4)}, {at(0, 4)}}}", bytes(4)),
    "a hole": header(f"{{{at(4, 8)}}}", bytes(8)),
    "two tensors in one place": header(f"{{{at(0, 4)}, {at(0, 4, 'b')}}}", bytes(4)),
    "bytes that belong to nothing": header(f"{{{at(0, 4)}}}", bytes(8)),
    "a shape of 10 ** 18": header(f"{{{at(0, 4, shape=[10**18])}}}", bytes(4)),
    "a shape that overflows": header(f"{{{at(0, 4, shape=[2**62, 8])}}}", bytes(4)),
    "a type that is unknown": header(f"{{{at(0, 4, dtype='F7')}}}", bytes(4)),
    "a name twice, as two tensors": header(f"{{{at(0, 4)}, {at(4, 8)}}}", bytes(8)),
    "no metadata where there is a place for it": header(f'{{"__metadata__": null, {at(0, 4)}}}', bytes(4)),
    "an end that is text": header('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, "4"]}}', bytes(4)),
    "an end that is not there": header('{"a": {"dtype": "F32", "shape": [1], "data_offsets": []}}', bytes(4)),
    "a tensor that is a list": header('{"a": [1]}', bytes(4)),
    "nesting": header("[" * 100_000),
    "objects in objects": header('{"a": ' * 100_000),
    "no text": header(b"\xff" * 64),
}


@pytest.mark.parametrize("name", HEADERS)
def test_s2_a_header_that_cannot_be_is_refused_without_taking_memory(name: str, folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(HEADERS[name])
    refused(folder)  # imports and caches are filled
    tracemalloc.start()
    refused(folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * 2**20


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_s2_a_name_that_is_there_twice_is_refused_wherever_it_is(name: str, folder: Path) -> None:
    """Readers differ in which of the two they take, so what one checks another would not load."""
    by_peft(folder)
    content = (folder / name).read_bytes()
    if name == WEIGHTS:
        start = 8 + struct.unpack("<Q", content[:8])[0]
        text = content[8:start].rstrip()
        content = header(text[:-1] + b", " + text.lstrip()[1:], content[start:])
    else:
        content = content.replace(b'"r": 2', b'"r": 2, "r": 3')
    (folder / name).write_bytes(content)
    assert "is in it twice" in refused(folder)


@posix
@pytest.mark.parametrize("text", ["{}", f"{{{at(0, 4)}}}", "{", f"{{{at(0, 4)}, {at(0, 4)}}}"])
def test_s2_of_a_file_no_more_is_read_than_its_header_accounts_for(text: str, folder: Path) -> None:
    """The rest is a hole of 8 GiB."""
    (folder / WEIGHTS).write_bytes(header(text))
    os.truncate(folder / WEIGHTS, 2**33)
    refused(folder)
    tracemalloc.start()
    refused(folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * 2**20


@posix
def test_s2_a_file_that_claims_more_than_there_is_memory_is_refused_within_it(folder: Path) -> None:
    """The process may take 64 MiB more than it has when it starts to read."""
    with open(folder / WEIGHTS, "wb") as file:  # sparse: 8 GiB that take no room
        file.write(struct.pack("<Q", 2**33 - 8))
        file.truncate(2**33)

    def read() -> None:
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + 2**26, now + 2**26))
        try:
            load_adapter(base(), folder)
        except AdapterError as error:
            print(error)

    assert "its header claims 8589934584 bytes" in forked(read)


def described(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors, description = read_tensors(folder / WEIGHTS)
    assert description is not None
    change(description)
    (folder / WEIGHTS).write_bytes(to_bytes(tensors, description))


def test_s3_values_beyond_all_bounds_are_refused_before_anything_is_allocated(folder: Path) -> None:
    by_peft(shutil.copytree(folder, folder.with_name("peft")), r=10**9)
    described(folder, lambda d: d["sites"]["first.weight"].update(r=10**9))
    tracemalloc.start()
    assert "but [1000000000, 4] is expected" in refused(folder)
    assert "r=1000000000 in the config, 2 in the tensors" in refused(folder.with_name("peft"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * 2**20


def test_s3_a_million_targets_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {f"base_model.model.m{i}.lora_A.weight": torch.zeros(0) for i in range(1000)}
    by_peft(folder, names)
    content = (folder / WEIGHTS).read_bytes()
    monkeypatch.setattr("lightning_lora.files.MAX_HEADER_BYTES", 2**16)  # in proportion
    assert "its header claims" in refused(folder)
    assert int.from_bytes(content[:8], "little") * 1000 > MAX_HEADER_BYTES
    (folder / CONFIG).write_bytes(b" " * (2**16 + 1))
    (folder / WEIGHTS).write_bytes(safetensors.torch.save({"a": torch.zeros(1)}))
    assert "is longer than" in refused(folder)


def test_s3_no_number_in_a_file_sets_off_work_or_ends_in_another_error(tmp_path: Path) -> None:
    model = base()
    inject(model, LoRA(r=1, init="pissa"), ["first"], seed=0)
    save_adapter(model, tmp_path / "ours")
    rounds = "pissa_niter_1" + "0" * 12
    described(tmp_path / "ours", lambda d: d["hyperparameters"].update(init=rounds))
    with stopped_after(60):
        load_adapter(base(), tmp_path / "ours")
    save_adapter(adapted(), tmp_path / "peft")
    by_peft(tmp_path / "peft", peft_version="9" * 5000 + ".1.1")
    assert load_adapter(base(), tmp_path / "peft")
    assert _doubles({"peft_version": "9" * 5000 + ".1.1"})  # no version that is known
    for field, value in {"lora_alpha": 10**400, "r": None, "lora_dropout": [1], "peft_type": ["LORA"]}.items():
        by_peft(shutil.copytree(tmp_path / "peft", tmp_path / field), **{field: value})
        refused(tmp_path / field)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ["peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "target_parameters"]
FIELDS += ["modules_to_save", "use_rslora", "use_dora", "bias", "lora_dropout", "init_lora_weights", "peft_version"]


@often
@given(field=st.sampled_from(FIELDS), value=VALUES)
def test_s3_whatever_a_config_holds_it_loads_or_is_refused(field: str, value: Any, scratch: Path) -> None:
    config = json.loads((scratch / CONFIG).read_text())
    (scratch / CONFIG).write_text(json.dumps(config | {field: value}))
    try:
        load_adapter(model := base(), scratch)
    except AdapterError:
        assert not sites(model)
    finally:
        (scratch / CONFIG).write_text(json.dumps(config))


@often
@given(
    field=st.sampled_from(
        ["schema", "task", "root", "method", "hyperparameters", "trained_in_full", "save", "weights"]
    ),
    site=st.sampled_from(["r", "alpha", "base", "size", "layout", "tied", "tied_to", "shares", "form", "level"]),
    value=VALUES,
    in_site=st.booleans(),
)
def test_s3_whatever_a_description_holds_it_loads_or_is_refused(
    field: str, site: str, value: Any, in_site: bool, scratch_of_ours: tuple[Path, Any, Any]
) -> None:
    folder, tensors, known = scratch_of_ours
    changed = json.loads(json.dumps(known))
    if in_site:
        changed["sites"]["first.weight"][site] = value
    else:
        changed[field] = value
    (folder / WEIGHTS).write_bytes(to_bytes(tensors, changed))
    try:
        load_adapter(model := base(), folder)
    except AdapterError:
        assert not sites(model)


EVIL = [
    "(a+)+$",
    "(a|a)*b",
    "(a|aa)+$",
    "([a-z]+)*!",
    "(.*a){20}",
    "((a*)*)*c",
    "(x+x+)+y",
    r"(\w+\s?)*$",
    r"^(([a-z])+.)+[A-Z]$",
]
PATTERNS = ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern", "target_parameters"]


@posix
@pytest.mark.parametrize("field", PATTERNS)
def test_s4_no_pattern_in_a_file_is_run(field: str, folder: Path) -> None:
    """The names are such that a matcher would go on for years, as each of the patterns is of exponential time."""
    long = "a" * 40 + "!"
    model = nn.Module()
    setattr(model, long, base())
    inject(model, LoRA(r=2), ["*first", "*second"], seed=0)
    for evil in EVIL:
        save_adapter(model, folder)
        by_peft(folder, **{field: {evil: 4} if field in ("rank_pattern", "alpha_pattern") else evil})
        fresh, said = nn.Module(), ""
        setattr(fresh, long, base())
        with stopped_after(60):
            try:
                load_adapter(fresh, folder)
            except AdapterError as error:
                said = str(error)
        if field == "alpha_pattern":
            assert "is a regular expression, and none from a file is run" in said
        elif field == "target_parameters":
            assert "is no list of names" in said
        else:
            assert said == ""  # what they choose is what the tensors say


@pytest.mark.parametrize("name", ["../up", "a/b", "a\0b", "/etc", "CON.txt", "a" * 65, "", "."])
def test_s5_names_in_a_file_are_checked_as_those_of_a_user(name: str, folder: Path) -> None:
    described(folder, lambda d: d.update(task=name))
    assert "use 1 to 64 letters, digits" in refused(folder)


@often
@given(name=st.text(max_size=80))
def test_s5_a_task_has_a_plain_name_or_none(name: str) -> None:
    plain = re.fullmatch("[A-Za-z0-9_-]{1,64}", name) is not None
    with suppress(ValueError):
        inject(model := base(), LoRA(r=1), ["first"], task=name, seed=0)
        assert plain
        assert {key for site in sites(model) for key in site.slot} == {name}


@often
@given(parts=st.lists(st.sampled_from(["..", ".", "", "/", "a", "b", "~", "C:", "NUL", "\0", "a\\..\\b"]), max_size=5))
def test_s5_whatever_a_folder_is_to_hold_lies_in_it(parts: list[str], scratch: Path) -> None:
    place = scratch.parent / "place"
    place.mkdir(exist_ok=True)
    with suppress(ValueError, OSError):  # as a NUL
        write_folder(place / "folder", {"/".join(parts): b"new"})
    assert {path.name for path in place.iterdir()} <= {"folder"}
    assert sorted(path.name for path in scratch.parent.iterdir()) == ["adapter", "place"]
    shutil.rmtree(place)


@pytest.mark.parametrize("field", ["auto_mapping", "megatron_core", "custom_module", "trainable_token_indices"])
def test_s6_fields_that_name_code_lead_to_none(field: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    (folder.parent / "evil.py").write_text("open('canary', 'w')")
    monkeypatch.syspath_prepend(folder.parent)
    by_peft(folder, **{field: {"base_model_class": "Net", "parent_library": "evil"}})
    try:
        load_adapter(base(), folder)
    except AdapterError:
        assert field == "trainable_token_indices"
    assert not Path("canary").exists()


def test_s6_nothing_that_loads_imports_by_name_or_unpickles() -> None:
    """No importlib, no eval, no pickle in the whole package; torch.load only with weights_only=True."""
    allowed = {
        "methods/__init__.py": {"importlib", "import_module"},  # the files of its own folder
        "report.py": {"find_spec"},  # is a package for drawing there?
        "resuming.py": {"pickle"},  # the class of an error
    }
    forbidden = {"importlib", "import_module", "find_spec", "__import__", "eval", "exec", "compile", "runpy", "loads"}
    forbidden |= {"pickle", "dill", "cloudpickle", "joblib", "marshal", "Unpickler", "trust_remote_code"}
    methods = {"eval", "compile"}  # of modules: model.eval()
    for path in PACKAGE.rglob("*.py"):
        room, found = path.relative_to(PACKAGE).as_posix(), set()
        for node in ast.walk(ast.parse(path.read_text())):
            names = [getattr(node, "module", None) or "", getattr(node, "arg", None) or ""]
            names += [one.name for one in getattr(node, "names", []) if isinstance(one, ast.alias)]
            call = getattr(node, "func", None)
            name = getattr(call, "attr", getattr(call, "id", ""))
            owner = getattr(getattr(call, "value", None), "id", "")
            if (owner, name) != ("json", "loads") and not (name in methods and isinstance(call, ast.Attribute)):
                names += [name, owner]
            found |= forbidden & set(names)
            if (owner, name) == ("torch", "load"):
                assert any(k.arg == "weights_only" and k.value.value is True for k in node.keywords), room
        assert found <= allowed.get(room, set()), room


@posix
@pytest.mark.parametrize("what", ["a pipe", "a device", "a folder", "a link in a circle", "a socket"])
@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, "a.ckpt"])
def test_s7_what_is_no_regular_file_is_not_waited_for(what: str, name: str, folder: Path, trainer: Any) -> None:
    by_peft(folder)
    path = folder / name
    path.unlink(missing_ok=True)
    if what == "a pipe":
        os.mkfifo(path)
    elif what == "a device":
        path.symlink_to("/dev/zero")
    elif what == "a folder":
        path.mkdir()
    elif what == "a socket":
        import socket

        place = os.getcwd()
        os.chdir(folder)  # the path of a socket is short
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(name)
        os.chdir(place)
    else:
        path.symlink_to(path)
    if name == "a.ckpt":
        with pytest.raises((AdapterError, FileNotFoundError, IsADirectoryError)):
            trainer(callbacks=[LoRACallback()]).fit(Lit(), loader(), ckpt_path=path)
    else:
        refused(folder)


@posix
@pytest.mark.parametrize("what", ["a pipe", "a device", "a folder"])
def test_s7_nor_is_it_in_the_place_of_what_was_trained_in_full(what: str, tmp_path: Path) -> None:
    save_whole(tmp_path / "a", 1)
    path = tmp_path / "a" / "trained_in_full.safetensors"
    path.unlink()
    {"a pipe": os.mkfifo, "a folder": os.mkdir, "a device": lambda path: path.symlink_to("/dev/zero")}[what](path)
    with pytest.raises(AdapterError):
        load_adapter(Whole(), tmp_path / "a")


@posix
def test_s7_a_link_to_a_file_is_followed(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "elsewhere")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere")
    assert load_adapter(base(), folder)


@posix
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_s8_everything_that_is_saved_has_the_mode_of_the_umask(umask: int, trainer: Any, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        run = trainer(callbacks=[LoRACallback(modules_to_save=["second"], target_modules=["first"])])
        run.fit(Lit(), loader())
        for _ in range(2):
            run.save_checkpoint(tmp_path / "c" / "a.ckpt")
    finally:
        os.umask(before)
    for path in (tmp_path / "c").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


# ---- F1 to F7: a file that is not what it should be


def test_f1_each_missing_renamed_or_extra_key_is_named(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    tensors, description = read_tensors(folder / WEIGHTS)
    assert description is not None
    assert len(tensors) == 4
    for name in tensors:
        others = {key: value for key, value in tensors.items() if key != name}
        for changed in (
            others,
            {**others, name.replace("lora", "lore"): tensors[name]},
            {**others, "x." + name: tensors[name]},
        ):
            (folder / WEIGHTS).write_bytes(to_bytes(changed, description))
            assert f"{name} is missing" in refused(folder)
        (folder / WEIGHTS).write_bytes(to_bytes({**tensors, f"{name}2": tensors[name]}, description))
        assert f"{name}2" in refused(folder)
    (folder / WEIGHTS).write_bytes(whole)
    assert load_adapter(base(), folder)


class Whole(nn.Module):
    """A network and a head outside of it, as in a LightningModule."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net, self.head = nn.Sequential(nn.Sequential(Net())), nn.Linear(3, 2)

    def training_step(self, batch: Any) -> None: ...

    def configure_optimizers(self) -> None: ...


def save_whole(path: Path, seed: int) -> None:
    model = Whole()
    inject(model, LoRA(r=2), ["first", "second"], modules_to_save=["head"], seed=0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    save_adapter(model, path)


def test_f1_a_head_that_was_not_copied_along_is_missed_unless_only_the_network_is_there(tmp_path: Path) -> None:
    save_whole(tmp_path / "a", 1)
    (tmp_path / "a" / "trained_in_full.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"trained_in_full.safetensors is missing: copy it too"):
        load_adapter(Whole(), tmp_path / "a")
    assert load_adapter(Whole().net, tmp_path / "a")


class Sparse(nn.Module):
    """A base of which most is not adapted, and the adapted weight is larger than the samples of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.words, self.norm = nn.Embedding(5, 96), nn.BatchNorm1d(96)
        self.body, self.out = nn.Linear(96, 96), nn.Linear(96, 5, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.body(self.norm(self.words(x))))


def with_one_bit_flipped(name: str) -> Sparse:
    """A base with another last bit in one value, which lies between the blocks that are sampled."""
    model = Sparse()
    value = model.state_dict()[name].view(-1)[100 if name == "body.weight" else -1 :][:1]
    value.copy_(value + 1 if value.dtype == torch.int64 else (value.view(torch.int32) ^ 1).view(torch.float32))
    return model


def saved_with_a_fingerprint_of(kind: Any, path: Path) -> Path:
    model = Sparse()
    inject(model, LoRA(r=1), ["body"], seed=0)
    save_adapter(model, path, fingerprint=kind)
    return path


@pytest.mark.parametrize("name", Sparse().state_dict())
def test_f3_one_flipped_bit_anywhere_in_the_base_is_seen_by_the_full_fingerprint(name: str, tmp_path: Path) -> None:
    saved_with_a_fingerprint_of("full", tmp_path / "full")
    load_adapter(Sparse(), tmp_path / "full")
    other = with_one_bit_flipped(name)
    both = 2 if name in ("words.weight", "out.weight") else 1  # they are tied
    with pytest.raises(AdapterError, match=f"trained on another base: {both} of all its 9 weights differ .*{name}"):
        load_adapter(other, tmp_path / "full")
    assert not sites(other)
    load_adapter(other, tmp_path / "full", allow_base_mismatch=True)
    load_adapter(with_one_bit_flipped(name), saved_with_a_fingerprint_of("sampled", tmp_path / "sampled"))


def test_f3_the_same_values_in_a_wider_type_are_the_same_base_and_rounded_ones_are_not(tmp_path: Path) -> None:
    model = Sparse().bfloat16()
    inject(model, LoRA(r=1), ["body"], seed=0)
    save_adapter(model, tmp_path / "narrow", fingerprint="full")
    load_adapter(Sparse().bfloat16().float(), tmp_path / "narrow")
    saved_with_a_fingerprint_of("full", tmp_path / "wide")
    with pytest.raises(AdapterError, match="in that precision"):
        load_adapter(Sparse().bfloat16(), tmp_path / "wide")


def test_f3_the_full_fingerprint_is_in_checkpoints_and_their_folders_and_is_taken_once_in_a_run(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    digest = full_fingerprint.full_digest
    monkeypatch.setattr(full_fingerprint, "full_digest", lambda weight: read.append(weight.numel()) or digest(weight))
    options = {"target_modules": ["first"], "fingerprint": "full"}
    run = trainer(callbacks=[LoRACallback(**options)])
    run.fit(Lit(), loader())
    for _ in range(3):
        run.save_checkpoint(path := tmp_path / "a.ckpt")
    assert sum(read) == sum(p.numel() for p in Lit().parameters())

    class Other(Lit):
        def build(self) -> nn.Module:
            net = super().build()
            with torch.no_grad():
                net.second.bias[0] += 1e-6
            return net

    for chosen in (options, options | {"fingerprint": "sampled", "resume_mismatch": "resize"}):
        trainer(callbacks=[LoRACallback(**chosen)], max_epochs=2).fit(Lit(), loader(), ckpt_path=path)
        with pytest.raises(AdapterError, match=r"1 of all its 4 weights differ \(net.second.bias\)"):
            trainer(callbacks=[LoRACallback(**chosen)], max_epochs=2).fit(Other(), loader(), ckpt_path=path)
    load_from_checkpoint(Lit, path)
    with pytest.raises(AdapterError, match=r"net.second.bias"):
        load_from_checkpoint(Other, path)
    load_from_checkpoint(Other, path, allow_base_mismatch=True)
    for cls in (Other, lambda: Other().net):
        with pytest.raises(AdapterError, match=r"second.bias"):
            load_adapter(cls(), tmp_path / "a.adapter")
    torch.save(Other().net.state_dict(), tmp_path / "base.pt")
    with pytest.raises(AdapterError, match=r"second.bias is not what .*a.adapter was trained on"):
        offline.merge(tmp_path / "a.adapter", tmp_path / "base.pt", tmp_path / "merged.pt")


def test_f4_files_of_different_saves_are_told_apart(tmp_path: Path) -> None:
    save_whole(tmp_path / "a", 1)
    save_whole(tmp_path / "b", 2)
    shutil.copy(tmp_path / "b" / "trained_in_full.safetensors", tmp_path / "a")
    with pytest.raises(AdapterError, match="its files are of different saves"):
        load_adapter(Whole(), tmp_path / "a")


def test_f5_every_changed_byte_of_a_checkpoint_is_noticed_or_changes_nothing(trainer: Any, tmp_path: Path) -> None:
    """The checksums are of the parts of the archive; of its own tables a reader uses what it needs."""
    run = trainer(callbacks=[LoRACallback(LoRA(r=1), target_modules=["first"])])
    run.fit(Lit(), loader())
    run.save_checkpoint(path := tmp_path / "a.ckpt")
    content = path.read_bytes()
    expected = load_from_checkpoint(Lit, path).state_dict()
    noticed = 0
    for place in range(11, len(content), len(content) // 60):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            found = load_from_checkpoint(Lit, path).state_dict()
        except AdapterError:
            noticed += 1
        else:
            assert all(torch.equal(found[name], value) for name, value in expected.items()), place
    assert noticed > 20


GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("folder", sorted(GOLDEN.iterdir()), ids=lambda folder: folder.name)
def test_f6_what_earlier_versions_wrote_is_read_as_it_was(folder: Path) -> None:
    model = base()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter) * (i + 1))
    load_adapter(model, folder)
    expected = json.loads((folder / "expected.json").read_text())
    torch.testing.assert_close(model(torch.linspace(-1, 1, 8).view(2, 4)), torch.tensor(expected))


@pytest.mark.parametrize("schema", [2, 10**6, "1", True, None, 1.5])
def test_f6_a_schema_that_is_not_known_is_refused_by_its_number(schema: Any, folder: Path) -> None:
    described(folder, lambda d: d.update(schema=schema))
    assert f"written by a newer lightning_lora (schema {schema}, this version reads up to 1)" in refused(folder)


class Diverges(Lit):
    """Its loss is no number from the third epoch on."""

    def loss(self, batch: Any) -> Any:
        return super().loss(batch) * (math.nan if self.current_epoch == 2 else 1)


def test_f7_a_diverged_run_stops_at_its_next_save_and_keeps_the_last_good_one(trainer: Any, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "c", "best", save_last=True, enable_version_counter=False)
    run = trainer(callbacks=[LoRACallback(), saver], max_epochs=5, enable_checkpointing=True)
    with pytest.raises(
        AdapterError, match=r"not written, because 4 trained parameters are not finite: net.first.*lora_A"
    ):
        run.fit(Diverges(), loader())
    assert sorted(os.listdir(tmp_path / "c")) == ["best.adapter", "best.ckpt", "last.adapter", "last.ckpt"]
    for name in ("best", "last"):
        model = load_from_checkpoint(Lit, tmp_path / "c" / f"{name}.ckpt")
        assert all(torch.isfinite(value).all() for value in model.state_dict().values())
        assert load_adapter(Lit(), tmp_path / "c" / f"{name}.adapter")


def test_f7_a_buffer_may_hold_what_it_likes(trainer: Any, tmp_path: Path) -> None:
    class Minimum(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("lowest", torch.tensor(math.inf))

    run = trainer(callbacks=[LoRACallback()])
    run.fit(Minimum(), loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert load_from_checkpoint(Minimum, tmp_path / "a.ckpt").lowest == math.inf


# ---- F8 to F11: a save that is stopped, has no room, or is not alone


def save_for_ever(where: Path, started: Callable[[], object]) -> None:
    models = [adapted(seed) for seed in range(4)]
    for i in itertools.count():
        started() if i == 2 else None
        save_adapter(models[i % 4], where / "adapter")
        number = i % 4
        write_file(where / "a.ckpt", lambda file: torch.save({"x": torch.full((2**16,), number)}, file))  # noqa: B023


def is_whole(where: Path) -> bool:
    """Whether both are there and of one save each; an error if not."""
    model = base()
    load_adapter(model, where / "adapter")
    values = torch.load(where / "a.ckpt", weights_only=True)["x"]
    assert (values == values[0]).all()
    held = [p for p in model.parameters() if p.requires_grad]
    return any(
        all(
            torch.equal(a, b)
            for a, b in zip(held, (p for p in adapted(seed).parameters() if p.requires_grad), strict=True)
        )
        for seed in range(4)
    )


@posix
def test_f8_a_killed_save_leaves_a_whole_file_and_folder_and_the_next_one_sweeps(tmp_path: Path) -> None:
    """More of these, and others' writers beside ours, are in `campaigns/kills.py`."""
    for delay in (0.0, 0.001, 0.002, 0.004, 0.008):
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            child = os.fork()
        if child == 0:
            save_for_ever(tmp_path, lambda: os.write(writer, b"."))  # noqa: B023
        os.read(reader, 1)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)
        assert is_whole(tmp_path)
    save_adapter(adapted(), tmp_path / "adapter")
    assert sorted(os.listdir(tmp_path)) == ["a.ckpt", "adapter"]


def unfinished(pid: int, here: str | None = None, kind: str = "unfinished") -> str:
    return f".{kind}-{here or _here()}-{pid}-{'0' * 16}"


def dead() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@posix
def test_f8_only_what_nobody_writes_any_more_is_swept(tmp_path: Path) -> None:
    kept = [unfinished(os.getppid()), unfinished(dead(), "0" * 8), "a.ckpt", ".unfinished-notes"]
    swept = [unfinished(dead()), unfinished(os.getpid()), unfinished(dead(), "1" * 8)]
    for name in kept + swept:
        (tmp_path / name).write_text("part")
    two_days_ago = time.time() - 2 * 86400
    os.utime(tmp_path / swept[2], (two_days_ago, two_days_ago))
    (tmp_path / unfinished(dead(), kind="unfinished").replace("0000", "1111")).mkdir()
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(kept)


@posix
def test_f8_what_was_moved_aside_comes_back_if_nothing_took_its_place(tmp_path: Path) -> None:
    for name, number in {"lost": "1111", "replaced": "2222"}.items():
        aside = tmp_path / unfinished(dead(), kind="replaced").replace("0000", number)
        (aside / name).mkdir(parents=True)
        (aside / name / "old").touch()
    (tmp_path / "replaced").mkdir()
    (tmp_path / "replaced" / "new").touch()
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["lost", "replaced"]
    assert os.listdir(tmp_path / "lost") == ["old"]
    assert os.listdir(tmp_path / "replaced") == ["new"]


def test_f8_what_is_being_written_is_not_swept_and_is_no_checkpoint_to_lightning(tmp_path: Path) -> None:
    seen: list[str] = []

    def write(file: Any) -> None:
        sweep(tmp_path)
        seen.extend(os.listdir(tmp_path))
        file.write(b"whole")

    write_file(tmp_path / "hpc_ckpt_1.ckpt", write)
    assert len(seen) == 1
    assert _UNFINISHED.fullmatch(seen[0])
    assert "ckpt" not in seen[0]  # Lightning takes the number at the end of such names for the newest checkpoint's
    assert (tmp_path / "hpc_ckpt_1.ckpt").read_bytes() == b"whole"


def test_f8_a_resumed_run_sweeps_the_folder_of_its_checkpoint(trainer: Any, tmp_path: Path) -> None:
    run = trainer(callbacks=[LoRACallback()])
    run.fit(Lit(), loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    (tmp_path / unfinished(os.getpid())).touch()
    trainer(callbacks=[LoRACallback()], max_epochs=2).fit(Lit(), loader(), ckpt_path=tmp_path / "a.ckpt")
    assert sorted(os.listdir(tmp_path)) == ["a.adapter", "a.ckpt"]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, check=False
    ).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", place], check=True)


@as_root
def test_f9_a_full_disk_is_said_in_words_and_keeps_what_was_there(small: Path, trainer: Any) -> None:
    run = trainer(callbacks=[LoRACallback(modules_to_save=["second"], target_modules=["first"])])
    module = Lit(width=64)
    run.fit(module, loader())
    run.save_checkpoint(path := small / "a.ckpt")
    held = {file: (small / file).read_bytes() for file in ["a.ckpt", f"a.adapter/{WEIGHTS}"]}
    (small / "others").write_bytes(bytes(os.statvfs(small).f_bavail * os.statvfs(small).f_frsize - 4096))
    with pytest.raises(
        OSError, match=r"a.ckpt was not written, .*No space left on device \(0.0 MiB are free in .*make room"
    ) as raised:
        run.save_checkpoint(path)
    assert raised.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match=r"a.adapter was not written, .*No space left on device .*make room there"):
        save_adapter(module, small / "a.adapter")
    assert {file: (small / file).read_bytes() for file in held} == held
    assert sorted(os.listdir(small)) == ["a.adapter", "a.ckpt", "others"]


@posix
def test_f9_a_limit_on_the_size_of_files_is_said_too(tmp_path: Path) -> None:
    write_file(tmp_path / "a.ckpt", lambda file: torch.save({"x": torch.zeros(10)}, file))

    def write() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
        write_file(tmp_path / "a.ckpt", lambda file: torch.save({"x": torch.zeros(2**20)}, file))

    said = forked(write)
    assert "a.ckpt was not written, and what was there before is as it was: File too large" in said
    assert "raise the limit on the size of files" in said
    assert len(torch.load(tmp_path / "a.ckpt", weights_only=True)["x"]) == 10
    assert os.listdir(tmp_path) == ["a.ckpt"]


@pytest.mark.parametrize("code", [errno.EIO, errno.EDQUOT, errno.EROFS, errno.ESTALE])
@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_f9_whatever_fails_while_a_file_is_written_is_said_and_leaves_the_old_one(
    call: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_file(tmp_path / "a.ckpt", lambda file: file.write(b"old"))

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as broken:
        broken.setattr("lightning_lora.whole_files._Raw" if call == "open" else f"os.{call}", fail)
        with pytest.raises(OSError, match=f"a.ckpt was not written.*{os.strerror(code)} .* MiB are free in") as raised:
            write_file(tmp_path / "a.ckpt", lambda file: file.write(b"new"))
    assert raised.value.errno == code
    assert (tmp_path / "a.ckpt").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.ckpt"]


@as_root
def test_f9_a_folder_that_may_not_be_written_to_is_named() -> None:
    with tempfile.TemporaryDirectory() as name:  # others may look into this one, but not into pytest's
        place, folder = Path(name), Path(name, "adapter")
        save_adapter(adapted(), folder)
        held = (folder / WEIGHTS).read_bytes()
        place.chmod(0o555)

        def act() -> None:
            os.setuid(65534)
            print(len(load_adapter(base(), folder)))
            try:
                write_folder(folder, {"a": b"new"})
            except PermissionError as error:
                print(error)
            try:
                load_adapter(base(), "/root/adapter")
            except AdapterError as error:
                print(error)

        first, second, third = forked(act).splitlines()
        assert (folder / WEIGHTS).read_bytes() == held
    assert first == "2"
    assert "adapter was not written, and what was there before is as it was: Permission denied" in second
    assert "give a folder that can be written to" in second
    assert third == "/root/adapter: cannot be read: Permission denied"


@posix
def test_f9_training_goes_on_without_a_save_if_asked_to_and_removes_none(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = ModelCheckpoint(tmp_path / "c", "{epoch}", save_top_k=1)
    run = trainer(callbacks=[LoRACallback(on_save_error="warn"), saver], max_epochs=4, enable_checkpointing=True)
    replace, count = os.replace, 0

    def fail_twice(source: Any, target: Any) -> None:
        nonlocal count
        count += 1
        if count in (2, 3):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_twice)
    with pytest.warns(UserWarning, match="training goes on, and no checkpoint is removed until one is written"):
        run.fit(Lit(), loader())
    assert run.current_epoch == 4
    assert sorted(os.listdir(tmp_path / "c")) == ["epoch=0.adapter", "epoch=0.ckpt", "epoch=3.adapter", "epoch=3.ckpt"]


@posix
def test_f10_a_reader_meets_only_whole_folders_of_two_writers(tmp_path: Path) -> None:
    values = []
    for seed in range(4):
        save_whole(tmp_path / "each" / str(seed), seed)
        load_adapter(model := Whole(), tmp_path / "each" / str(seed))
        values.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
    save_whole(tmp_path / "adapter", 0)

    def write() -> None:
        for i in range(60):
            save_whole(tmp_path / "adapter", i % 4)
            write_file(tmp_path / "a.ckpt", lambda file: torch.save({"x": torch.zeros(2**16)}, file))

    reads = 0
    writers = [started(write) for _ in range(2)]
    while any(writer.is_alive() for writer in writers):
        load_adapter(model := Whole(), tmp_path / "adapter")
        held = [p for p in model.parameters() if p.requires_grad]
        assert any(all(map(torch.equal, held, value)) for value in values)
        reads += 1
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert reads > 20
    assert sorted(os.listdir(tmp_path)) == ["a.ckpt", "adapter", "each"]


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_f11_the_system_is_told_to_sync_before_and_after_the_rename(tmp_path: Path) -> None:
    go = os.pipe()

    def write() -> None:
        os.read(go[0], 1)
        write_file(tmp_path / "file", lambda file: file.write(b"new"))
        for content in (b"old", b"new"):
            write_folder(tmp_path / "folder", {"a": content})

    writer = started(write)
    calls = "trace=fsync,rename,renameat,renameat2"
    command = ["strace", "-y", "-e", calls, "-o", tmp_path / "trace", "-p", str(writer.pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as trace:
        attached = trace.stderr is not None and b"attached" in trace.stderr.readline()
        os.write(go[1], b".")
        writer.join(60)
    assert writer.exitcode == 0
    if not attached:
        pytest.skip("strace may not trace here")
    found = []
    for line in (tmp_path / "trace").read_text().splitlines():
        done = re.match(r"(fsync|rename)\w*\(.*= 0$", line)
        if done is not None:
            parent = f"<{tmp_path}>" in line
            found.append(done[1] if done[1] == "rename" else "parent" if parent else "new")
    one = ["new", "new", "rename", "parent"]
    assert found == ["new", "rename", "parent", *one, *one]


# ---- F17, F19, F21, F23


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_f17_merging_twice_is_an_error_and_a_while_of_it_leaves_every_bit(dtype: torch.dtype) -> None:
    model = adapted().to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(3):
        with (
            merged(model),
            pytest.raises(RuntimeError, match="cannot merge again while the adapters are merged"),
            merged(model),
        ):
            pass
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_f19_threads_and_processes_that_load_together_get_the_same(folder: Path, tmp_path: Path) -> None:
    x = torch.linspace(-1, 1, 8).view(2, 4)
    expected = adapted()(x)

    def load(_: int) -> torch.Tensor:
        load_adapter(model := bases.pop(), folder)
        return model(x)

    bases = [base() for _ in range(32)]
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(load, range(32)):
            assert torch.equal(found, expected)

    def read(file: Path) -> None:
        load_adapter(model := base(), folder)
        file.write_text(json.dumps(model(x).flatten().tolist()))

    found_by = [tmp_path / f"{i}.json" for i in range(8)]
    for reader in [started(read, file) for file in found_by]:
        reader.join(60)
    assert [json.loads(file.read_text()) for file in found_by] == [expected.flatten().tolist()] * 8


class Moves(Lit):
    """Writes to a frozen weight in its second epoch."""

    thaws = False

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            if self.thaws:
                self.net.second.weight.requires_grad_(True)
            with torch.no_grad():
                self.net.second.weight.add_(0.1)


def test_f21_a_frozen_weight_that_moves_stops_the_run_at_the_end_of_the_epoch(trainer: Any) -> None:
    with pytest.raises(
        RuntimeError, match=r"1 weights of the frozen base were changed during epoch 1: net.second.weight"
    ):
        trainer(callbacks=[LoRACallback()]).fit(Moves(), loader())
    trainer(callbacks=[LoRACallback(audit=False)]).fit(Moves(), loader())
    thawed = Moves()
    thawed.thaws = True  # then it is in checkpoints
    trainer(callbacks=[LoRACallback()]).fit(thawed, loader())


def test_f23_a_store_that_fails_is_said_or_warned_of_as_a_disk_is(trainer: Any, monkeypatch: Any) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "the store is gone")

    kept, strict = (LoRACallback(on_save_error=how) for how in ("warn", "raise"))
    for callback in (kept, strict):
        run = trainer(callbacks=[callback])
        run.fit(Lit(), loader())
        with monkeypatch.context() as broken:
            broken.setattr("fsspec.implementations.memory.MemoryFile.write", fail)
            if callback is kept:
                with pytest.warns(UserWarning, match="the store is gone; training goes on, and no checkpoint"):
                    run.save_checkpoint("memory://faults/c.ckpt")
            else:
                with pytest.raises(OSError, match="the store is gone"):
                    run.save_checkpoint("memory://faults/c.ckpt")


def test_f23_a_checkpoint_elsewhere_is_read_as_strictly(trainer: Any, tmp_path: Path) -> None:
    run = trainer(callbacks=[LoRACallback()])
    run.fit(Lit(), loader())
    with pytest.warns(UserWarning, match="is not a local file: its adapter folder is not written"):
        run.save_checkpoint("memory://faults/a.ckpt")
    resumed = trainer(callbacks=[LoRACallback()], max_epochs=2)
    resumed.fit(Lit(), loader(), ckpt_path="memory://faults/a.ckpt")
    import fsspec

    store = fsspec.filesystem("memory")
    store.pipe("/faults/b.ckpt", store.cat("/faults/a.ckpt")[:1000])
    with pytest.raises(AdapterError, match="damaged, or no checkpoint of plain values"):
        resumed.fit(Lit(), loader(), ckpt_path="memory://faults/b.ckpt")
