"""Every kind of layer against PEFT: the same factors compute the same where PEFT has them, and where it does not or
computes something else, no folder of ours looks like one of its own.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from lightning_lora import AdapterError, LoRA, inject, load_adapter, merge_, offline, save_adapter, sites
from lightning_lora.files import read_tensors
from lightning_lora.state import trained_in_full

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from transformers.pytorch_utils import Conv1D  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # PEFT asks it
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),  # PEFT corrects it for each layer
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),  # said of parameters
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]
METHOD = LoRA(r=2, alpha=6)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def indices(*shape: int) -> Tensor:
    return torch.randint(0, 7, shape, generator=torch.Generator().manual_seed(5))


class Net(nn.Module):
    """Names that PEFT matches by their ends, with a layer of the kind at hand between two others."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"layer": layer})

    def forward(self, *inputs: Tensor) -> Tensor:
        output = self.inner["layer"](*inputs)
        return output[0] if isinstance(output, tuple) else output


class Experts(nn.Module):
    """Stacked parameters, as transformers' mixtures of experts have them, and a table beside them."""

    def __init__(self, is_transposed: bool = False, experts: int = 3) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn((experts, 6, 10) if is_transposed else (experts, 10, 6)))
        self.down = nn.Parameter(torch.randn((experts, 5, 6) if is_transposed else (experts, 6, 5)))
        self.table = nn.Parameter(torch.randn(4, 6))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        up, down = (self.up, self.down) if self.is_transposed else (self.up.mT, self.down.mT)
        gate, x = (x @ up).chunk(2, -1)
        return (torch.tanh(gate) * x) @ down @ self.table.mT @ self.table + self.bias


class Squared(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).square()


class ScaledEmbedding(nn.Embedding):
    """As that of Gemma 3."""

    embed_scale = 3.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


class ShiftedEmbedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input + 1)


class Case(NamedTuple):
    layer: Callable[[], nn.Module]
    inputs: tuple[Tensor, ...]
    parameters: tuple[str, ...] = ()  # PEFT's target_parameters; none: its target_modules
    ours: Mapping[str, Any] = MappingProxyType({})
    theirs: Mapping[str, Any] = MappingProxyType({})
    method: LoRA = METHOD
    tolerance: float = 1e-12
    written: bool = True  # whether it is also what we write: the layer's own way is taken where there are two
    merges: bool = True  # whether shapes tell which factors of PEFT's files belong to which weight

    @property
    def targets(self) -> list[str]:
        return [f"inner.layer.{name}" for name in self.parameters] or ["inner.layer"]


OTHERWISE = {
    "ours": {"rank_pattern": {"layer.up": 3}, "alpha_pattern": {"layer.down": 9.0}},
    "theirs": {"rank_pattern": {"layer.up": 3}, "alpha_pattern": {"layer.down": 9.0}},
}
WEIGHTS_OF_LSTM = tuple(name for name, _ in nn.LSTM(6, 5, 2, bidirectional=True).named_parameters() if "weight" in name)
CASES: dict[str, Case] = {
    "linear": Case(lambda: nn.Linear(6, 5), (draw(2, 6),)),
    "linear as a parameter": Case(lambda: nn.Linear(6, 5), (draw(2, 6),), ("weight",), written=False),
    "linear with another forward": Case(lambda: Squared(6, 5), (draw(2, 6),), ("weight",)),
    "Conv1D": Case(lambda: Conv1D(5, 6), (draw(2, 6),)),
    "square Conv1D, with its bias": Case(
        lambda: Conv1D(6, 6), (draw(2, 6),), ours={"bias": "lora_only"}, theirs={"bias": "lora_only"}
    ),
    "embedding": Case(lambda: nn.Embedding(7, 5), (indices(2, 4),)),
    "embedding, scaled by the root of r": Case(
        lambda: nn.Embedding(7, 5, padding_idx=2, scale_grad_by_freq=True),
        (indices(2, 4),),
        method=LoRA(r=3, alpha=5, scaling="rsqrt"),
    ),
    "embedding as a parameter": Case(lambda: nn.Embedding(7, 5), (indices(2, 4),), ("weight",), written=False),
    "embedding with limited norm": Case(lambda: nn.Embedding(7, 5, max_norm=1.5), (indices(2, 4),), ("weight",)),
    "embedding with another forward": Case(lambda: ShiftedEmbedding(9, 5), (indices(2, 4),), ("weight",)),
    "scaled embedding": Case(lambda: ScaledEmbedding(7, 5), (indices(2, 4),)),
    "convolution 1d": Case(lambda: nn.Conv1d(6, 5, 3, padding=2), (draw(2, 6, 7),)),
    "convolution 1d, same size, even kernel": Case(lambda: nn.Conv1d(6, 5, 4, padding="same"), (draw(2, 6, 7),)),
    "convolution 1d, kernel of one, dilated": Case(lambda: nn.Conv1d(6, 5, 1, dilation=2), (draw(2, 6, 7),)),
    "convolution 1d, circular without padding": Case(
        lambda: nn.Conv1d(6, 5, 3, padding_mode="circular"), (draw(2, 6, 7),)
    ),
    "convolution 2d with stride": Case(
        lambda: nn.Conv2d(6, 5, (3, 2), stride=(2, 1), padding=1), (draw(2, 6, 5, 6),),
        ours={"bias": "lora_only"}, theirs={"bias": "lora_only"},
    ),
    "convolution 2d, kernel of one": Case(lambda: nn.Conv2d(6, 5, 1, padding="valid"), (draw(2, 6, 5, 6),)),
    "convolution 3d": Case(lambda: nn.Conv3d(4, 3, (1, 2, 3), padding="same"), (draw(2, 4, 2, 3, 5),)),
    "LSTM": Case(
        lambda: nn.LSTM(6, 5, 2, bidirectional=True), (draw(3, 2, 6),), WEIGHTS_OF_LSTM, merges=False, tolerance=1e-11
    ),
    "GRU cell": Case(lambda: nn.GRUCell(6, 5), (draw(2, 6), draw(2, 5)), ("weight_hh", "weight_ih")),
    "square GRU cell": Case(
        lambda: nn.GRUCell(5, 5), (draw(2, 5), draw(2, 5)), ("weight_hh", "weight_ih"), merges=False
    ),
    "sums of embeddings": Case(lambda: nn.EmbeddingBag(7, 5), (indices(2, 4),), ("weight",)),
    "one stack of experts": Case(Experts, (draw(3, 4, 6),), ("down",)),
    "stacks of experts and a table": Case(Experts, (draw(3, 4, 6),), ("up", "down", "table"), tolerance=1e-11),
    "transposed stacks, other ranks and alphas": Case(
        lambda: Experts(True), (draw(3, 4, 6),), ("down", "up"), **OTHERWISE, tolerance=1e-11
    ),
    "stacks of experts with a bias": Case(
        Experts, (draw(3, 4, 6),), ("up", "down"), {"bias": "lora_only"}, {"bias": "lora_only"}, tolerance=1e-11
    ),
    "a stack of one": Case(lambda: Experts(experts=1), (draw(1, 4, 6),), ("up", "down"), tolerance=1e-11),
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def base(layer: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return Net(layer()).double().eval()


def with_ours(case: Case) -> nn.Module:
    model = base(case.layer)
    inject(model, case.method, case.targets, **case.ours)
    return model


def with_theirs(case: Case) -> nn.Module:
    """PEFT on the same base, by its own names for what is adapted."""
    config = peft.LoraConfig(
        r=case.method.r,
        lora_alpha=case.method.alpha,
        use_rslora=case.method.scaling == "rsqrt",
        target_modules=[] if case.parameters else case.targets,
        target_parameters=case.targets if case.parameters else None,
        **case.theirs,
    )
    return peft.get_peft_model(base(case.layer), config, autocast_adapter_dtype=False).double().eval()


@torch.no_grad()
def change(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


@torch.no_grad()
def take_over(theirs: nn.Module, ours: nn.Module) -> None:
    """Give PEFT's model the values of ours, by what they are: neither library's names or files have a part in it."""
    values = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if "lora_" not in name:
            continue
        wrapper = theirs.get_submodule(name[: name.index(".lora_")])
        entry = getattr(wrapper, "parameter_name", "weight")
        live = {f: values[f"inner.layer.adapters.{entry}.default.{f}"] for f in ("lora_A", "lora_B")}
        if "lora_embedding_" in name:
            parameter.copy_(live["lora_B" if "lora_embedding_A" in name else "lora_A"].T)
        elif "lora_A" in name:
            parameter.copy_(live["lora_A"].reshape(parameter.shape))
        else:
            up = live["lora_B"]
            parameter.copy_((up.permute(1, 2, 0) if up.dim() == 3 else up).reshape(parameter.shape))
    for name, parameter in values.items():
        if name.endswith(".bias"):
            owner, _, entry = name.rpartition(".")
            plain = theirs.base_model.model.get_submodule(owner)
            while hasattr(plain, "base_layer"):
                plain = plain.base_layer
            getattr(plain, entry).copy_(parameter)


def both(case: Case) -> tuple[nn.Module, nn.Module]:
    ours, theirs = with_ours(case), with_theirs(case)
    change(ours)
    take_over(theirs, ours)
    return ours, theirs


def close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return torch.allclose(one, other, rtol=0, atol=tolerance)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@every_case
def test_the_same_factors_give_the_same_outputs_and_gradients(case: Case) -> None:
    ours, theirs = both(case)
    outputs = ours(*case.inputs)
    assert close(outputs, theirs(*case.inputs), case.tolerance)
    assert not close(outputs, base(case.layer)(*case.inputs), 1e-3)
    for model in (ours, theirs):
        model.train()
        model(*case.inputs).square().sum().backward()
    expected = copy.deepcopy(ours)
    for parameter, twin in zip(ours.parameters(), expected.parameters(), strict=True):
        if parameter.requires_grad:
            twin.data.copy_(parameter.grad)
    gradients = with_theirs(case)
    take_over(gradients, expected)
    twins = dict(gradients.named_parameters())
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            assert close(parameter.grad, twins[name], 1e-9 * max(1, float(parameter.grad.abs().max()))), name


@every_case
def test_merged_weights_are_the_same(case: Case) -> None:
    ours, theirs = both(case)
    merged, expected = weights(merge_(ours)), weights(theirs.merge_and_unload())
    assert merged.keys() == expected.keys()
    assert all(close(merged[name], expected[name], case.tolerance) for name in merged)


@every_case
def test_peft_loads_what_is_saved(case: Case, tmp_path: Path) -> None:
    ours = with_ours(case)
    change(ours)
    save_adapter(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base(case.layer), tmp_path / "adapter", autocast_adapter_dtype=False)
    assert close(theirs.double().eval()(*case.inputs), ours(*case.inputs), case.tolerance)


@every_case
def test_what_peft_saved_is_loaded(case: Case, tmp_path: Path) -> None:
    ours, theirs = both(case)
    theirs.save_pretrained(tmp_path / "adapter")
    fresh = base(case.layer)
    load_adapter(fresh, tmp_path / "adapter")
    assert close(fresh(*case.inputs), theirs(*case.inputs), case.tolerance)
    expected = weights(ours)
    assert all(close(value, expected[name], 0) for name, value in weights(fresh).items())
    assert {site.name: site.adapter("default").method for site in sites(fresh)} == {
        site.name: site.adapter("default").method for site in sites(ours)
    }


@every_case
def test_tensors_and_targets_are_those_that_peft_writes(case: Case, tmp_path: Path) -> None:
    save_adapter(with_ours(case), tmp_path / "ours")
    with_theirs(case).save_pretrained(tmp_path / "theirs")
    shapes, configs = [], []
    for name in ("ours", "theirs"):
        tensors = safetensors.torch.load_file(tmp_path / name / "adapter_model.safetensors")
        shapes.append({key: tensor.shape for key, tensor in tensors.items()})
        fields = json.loads((tmp_path / name / "adapter_config.json").read_text())
        kept = ("peft_type", "target_modules", "use_rslora", "bias")
        configs.append(
            {key: fields[key] for key in kept} | {"target_parameters": fields.get("target_parameters") or []}
        )
        configs[-1]["target_parameters"].sort()
        configs[-1]["fan_in_fan_out"] = fields.get("fan_in_fan_out", False)
    assert (shapes[0] == shapes[1] and configs[0] == configs[1]) is case.written


def merged_files(adapter: Path, model: nn.Module, name: str = "base.pt") -> dict[str, Tensor]:
    """What merging files alone makes of a model's weights."""
    write = torch.save if name.endswith(".pt") else safetensors.torch.save_file
    write(model.state_dict(), adapter.parent / name)
    (written,) = offline.merge(adapter, adapter.parent / name, adapter.parent / f"merged-{name}")
    return torch.load(written) if name.endswith(".pt") else safetensors.torch.load_file(written)


MERGEABLE = {name: case for name, case in CASES.items() if case.merges}


@pytest.mark.parametrize("case", MERGEABLE.values(), ids=MERGEABLE)
def test_files_that_peft_wrote_merge_without_the_model(case: Case, tmp_path: Path) -> None:
    _, theirs = both(case)
    theirs.save_pretrained(tmp_path / "adapter")
    merged = merged_files(tmp_path / "adapter", base(case.layer), "base.safetensors")
    expected = weights(theirs.merge_and_unload())
    assert all(close(merged[key], expected[key], case.tolerance) for key in expected)


@pytest.mark.parametrize("case", [CASES["LSTM"], CASES["square GRU cell"]], ids=["LSTM", "square GRU cell"])
def test_factors_that_fit_several_weights_are_not_guessed_between(case: Case, tmp_path: Path) -> None:
    _, theirs = both(case)
    theirs.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"its factors fit inner\.layer\.weight_.* in several ways: load it into"):
        merged_files(tmp_path / "adapter", base(case.layer))


@every_case
def test_inspect_shows_the_change_of_what_peft_wrote(case: Case, tmp_path: Path) -> None:
    ours, theirs = both(case)
    theirs.save_pretrained(tmp_path / "adapter")
    if case.ours == OTHERWISE["ours"]:
        with pytest.raises(AdapterError, match=r"whose factors are whose of .*down or .*up is not in the files"):
            list(offline.inspect(tmp_path / "adapter"))
        return
    ((_, rows),) = offline.inspect(tmp_path / "adapter")
    names = sorted(site.name for site in sites(ours))
    assert [row.site for row in rows] == [" or ".join(names)] * len(names)
    norms = [site.adapter("default").delta().norm().item() for site in sites(ours)]
    assert sorted(row.norm for row in rows) == pytest.approx(sorted(norms), rel=1e-5)


class Wide(nn.Conv1d):
    """A constructor of its own."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3)


class Standardized(nn.Conv1d):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.conv1d(input, self.weight - self.weight.mean(), self.bias)


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


class Other(NamedTuple):
    layer: Callable[[], nn.Module]
    inputs: tuple[Tensor, ...]
    reason: str
    targets: tuple[str, ...] = ("layer",)


OTHERWISE_IN_PEFT: dict[str, Other] = {
    "dilated convolution": Other(
        lambda: nn.Conv1d(6, 5, 3, padding=4, dilation=2), (draw(2, 6, 7),), "leave the dilation=(2,) of a convolution"
    ),
    "dilated convolution of the same size": Other(
        lambda: nn.Conv2d(6, 5, 3, padding="same", dilation=(1, 2)), (draw(2, 6, 7, 8),), "leave the dilation=(1, 2)"
    ),
    "circular convolution": Other(
        lambda: nn.Conv1d(6, 5, 3, padding=1, padding_mode="circular"), (draw(2, 6, 7),), "padding_mode='circular'"
    ),
    "reflecting convolution": Other(
        lambda: nn.Conv2d(6, 5, 3, padding=1, padding_mode="reflect"), (draw(2, 6, 7, 8),), "padding_mode='reflect'"
    ),
    "convolution in groups": Other(lambda: nn.Conv1d(6, 4, 3, groups=2), (draw(2, 6, 7),), "to the groups=2 of"),
    "convolution with its own forward": Other(
        lambda: Standardized(6, 5, 3), (draw(2, 6, 7),), "to the output of Standardized, whose forward is its own"
    ),
    "convolution with its own constructor": Other(lambda: Wide(6), (draw(2, 6, 7),), "call the constructor of Wide"),
    "transposed convolution": Other(
        lambda: nn.ConvTranspose1d(6, 5, 3), (draw(2, 6, 7),), "no adapter for ConvTranspose1d.weight"
    ),
    "linear with another forward": Other(lambda: Squared(6, 5), (draw(2, 6),), "output of Squared, whose forward is"),
    "embedding with another forward": Other(
        lambda: ShiftedEmbedding(9, 5), (indices(2, 4),), "output of ShiftedEmbedding, whose forward is its own"
    ),
    "embedding with limited norm": Other(
        lambda: nn.Embedding(7, 5, max_norm=0.5), (indices(2, 4),), "limits the norm of an embedding's factor"
    ),
    "fused encoder layer": Other(Fused, (draw(2, 4, 8),), "layer passes PEFT's adapters by", ("linear1",)),
}  # fmt: skip
every_other = pytest.mark.parametrize("other", OTHERWISE_IN_PEFT.values(), ids=OTHERWISE_IN_PEFT)


def peft_on(other: Other) -> nn.Module:
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=list(other.targets))
    theirs = peft.get_peft_model(base(other.layer), config, autocast_adapter_dtype=False).double().eval()
    change(theirs)
    return theirs


@every_other
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
@torch.no_grad()
def test_where_peft_contradicts_itself_ours_does_not(other: Other) -> None:
    """PEFT fails there, or gives other outputs with the adapter than after merging it."""
    try:
        theirs = peft_on(other)
        outputs = theirs(*other.inputs)
        right = close(outputs, theirs.merge_and_unload()(*other.inputs), 1e-9)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        right = False
    if right and peft.__version__ != "0.21.2":
        pytest.skip("this version of PEFT computes it rightly")
    assert not right
    ours = base(other.layer)
    inject(ours, METHOD, list(other.targets))
    change(ours)
    outputs = ours(*other.inputs)
    assert not close(outputs, base(other.layer)(*other.inputs), 1e-3)
    assert close(merge_(ours)(*other.inputs), outputs, 1e-12)


@every_other
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_what_peft_trained_otherwise_is_refused_with_the_reason(other: Other, tmp_path: Path) -> None:
    if other.layer is Fused or "no adapter" in other.reason or "constructor" in other.reason:
        pytest.skip("PEFT trains it rightly, or not at all")
    peft_on(other).save_pretrained(tmp_path / "adapter")
    model = base(other.layer)
    with pytest.raises(AdapterError, match=rf"inner\.layer\.weight was trained .*{re.escape(other.reason)}"):
        load_adapter(model, tmp_path / "adapter")
    assert not sites(model)


def test_what_peft_trains_rightly_and_evaluates_wrongly_is_loaded(tmp_path: Path) -> None:
    other = OTHERWISE_IN_PEFT["fused encoder layer"]
    theirs = peft_on(other)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = base(other.layer)
    load_adapter(ours, tmp_path / "adapter")
    assert close(ours(*other.inputs), theirs.train()(*other.inputs), 1e-12)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)))


class Block(nn.Module):
    """A parameter of its own beside a module, and one whose name ends like it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 6))
        self.inner = nn.ModuleDict({"a": nn.Linear(6, 6), "b": Conv1D(6, 6)})
        self.outer = Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner["b"](self.inner["a"](x @ self.table)))


class Twice(Experts):
    """The same last names again further in."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.ModuleDict({"inner": nn.ModuleDict({"layer": Experts()})})


BEYOND: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], dict[str, Any], str]] = {
    "an embedding and a head that are tied": (
        Tied, (indices(2, 3),), {"target_modules": ["embed", "head"]},
        "PEFT gives each of several tied layers an adapter of its own: inner.layer.embed.weight",
    ),
    "parts of a fused matrix": (
        lambda: Conv1D(9, 6), (draw(2, 6),), {"target_modules": ["layer.q"], "fused": {"layer": ["q", "k", "v"]}},
        "PEFT has no adapter for a part of a matrix: inner.layer.weight[q]",
    ),
    "parts of a linear layer with another forward": (
        lambda: Squared(6, 9), (draw(2, 6),), {"target_modules": ["layer.q"], "fused": {"layer": ["q", "k", "v"]}},
        "PEFT adds its change to the output of Squared, whose forward is its own: inner.layer.weight[q]",
    ),
    "dropout beside a parameter": (
        lambda: Squared(6, 9), (draw(2, 6),), {"method": LoRA(r=2, dropout=0.5)},
        "PEFT's target_parameters takes no dropout: inner.layer.weight",
    ),
    "a transposed stack of one": (
        lambda: Experts(True, experts=1), (draw(1, 4, 6),), {"target_modules": ["layer.up"]},
        "PEFT has no adapter for Experts.up: inner.layer.up",
    ),
    "a parameter and what is inside its module": (
        Block, (draw(3, 4, 6),), {"target_modules": ["table", "a"]},
        "PEFT's target_parameters hides what is inside the module: inner.layer.table and inner.layer.inner.a.weight",
    ),
    "a parameter whose name ends another's": (
        Twice, (draw(3, 4, 6),), {"target_modules": ["inner.layer.up"], "exclude_modules": ["again"]},
        "PEFT would adapt inner.layer.again.inner.layer.up as well, because it ends like inner.layer.up",
    ),
    "a parameter and a Conv1D": (
        Block, (draw(3, 4, 6),), {"target_modules": ["outer.up", "b"]},
        "PEFT's target_parameters goes with no Conv1D: inner.layer.outer.up and inner.layer.inner.b.weight",
    ),
}  # fmt: skip
BY_PARAMETER = ("linear with another forward", "embedding with another forward", "embedding with limited norm")
for name, other in OTHERWISE_IN_PEFT.items():
    if name not in BY_PARAMETER:
        BEYOND[name] = (other.layer, other.inputs, {"target_modules": list(other.targets)}, other.reason)


@pytest.mark.parametrize(("layer", "inputs", "options", "reason"), BEYOND.values(), ids=BEYOND)
def test_what_peft_cannot_express_is_no_peft_file_and_still_loads_and_merges_here(
    layer: Callable[[], nn.Module], inputs: tuple[Tensor, ...], options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    ours = base(layer)
    inject(ours, **{"method": METHOD, **options})
    change(ours)
    save_adapter(ours, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LIGHTNING_LORA"
    assert reason in read_tensors(tmp_path / "adapter" / "adapter_model.safetensors")[1]["not_for_peft"]
    with pytest.raises((KeyError, ValueError, TypeError)):
        peft.PeftModel.from_pretrained(base(layer), tmp_path / "adapter")
    fresh = base(layer)
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(*inputs), ours(*inputs))
    merged, expected = merged_files(tmp_path / "adapter", base(layer)), weights(merge_(ours))
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_parts_of_one_matrix_are_exported_as_one_adapter_that_peft_loads(tmp_path: Path) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = Conv1D(9, 6)
            self.out = nn.Linear(9, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.qkv(x)))

    ours = base(Both)
    fused = {"qkv": {"q": 4, "k": 2, "v": 3}}
    options = {"rank_pattern": {"qkv.q": 3}, "alpha_pattern": {"qkv.k": 1.0}, "bias": "lora_only"}
    inject(ours, LoRA(r=2, alpha=6, dropout=0.1), ["qkv.q", "qkv.k", "out"], fused=fused, **options)
    change(ours)
    save_adapter(ours, tmp_path / "adapter")
    assert offline.export(tmp_path / "adapter", tmp_path / "portable") == [
        "inner.layer.out.bias, inner.layer.qkv.bias: trained in full, which vLLM and llama.cpp refuse"
    ]
    config = json.loads((tmp_path / "portable" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["inner.layer.out", "inner.layer.qkv"]
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (5, 5, 0)
    theirs = peft.PeftModel.from_pretrained(base(Both), tmp_path / "portable", autocast_adapter_dtype=False)
    x = draw(2, 6)
    assert close(theirs.double().eval()(x), ours(x), 1e-6)
    fresh = base(Both)
    load_adapter(fresh, tmp_path / "portable")
    assert [site.name for site in sites(fresh)] == ["inner.layer.qkv.weight", "inner.layer.out.weight"]
    assert close(fresh(x), ours(x), 1e-6)
    up = safetensors.torch.load_file(tmp_path / "portable" / "adapter_model.safetensors")
    assert not up["base_model.model.inner.layer.qkv.lora_B.weight"][6:].any()


@pytest.mark.parametrize("name", ["embedding", "convolution 1d", "one stack of experts", "linear with another forward"])
@pytest.mark.parametrize("by_peft", [False, True], ids=["in our file", "in PEFT's file"])
def test_what_no_other_reader_knows_is_not_exported(name: str, by_peft: bool, tmp_path: Path) -> None:
    ours, theirs = both(CASES[name])
    if by_peft:
        theirs.save_pretrained(tmp_path / "adapter")
    else:
        save_adapter(ours, tmp_path / "adapter")
    with pytest.raises(AdapterError, match=rf"{sites(ours)[0].name} is not the weight of a linear layer"):
        offline.export(tmp_path / "adapter", tmp_path / "portable")


def test_a_merged_embedding_and_its_tied_head_stay_one_weight(tmp_path: Path) -> None:
    ours = base(Tied)
    inject(ours, METHOD, ["embed", "head"])
    change(ours)
    save_adapter(ours, tmp_path / "adapter")
    torch.save(base(Tied).state_dict(), tmp_path / "base.pt")
    head = {"inner.layer.embed.weight": base(Tied).state_dict()["inner.layer.embed.weight"]}  # as transformers saves it
    safetensors.torch.save_file(head, tmp_path / "base.safetensors")
    expected = weights(merge_(ours))["inner.layer.embed.weight"]
    for name in ("base.pt", "base.safetensors"):
        (written,) = offline.merge(tmp_path / "adapter", tmp_path / name, tmp_path / f"merged-{name}")
        merged = torch.load(written) if name == "base.pt" else safetensors.torch.load_file(written)
        assert all(torch.equal(value, expected) for value in merged.values())
        assert len(merged) == (2 if name == "base.pt" else 1)


@pytest.mark.parametrize("by_peft", [False, True], ids=["in our file", "in PEFT's file"])
def test_an_embedding_is_not_merged_into_files_where_a_head_without_adapter_is_tied_to_it(
    by_peft: bool, tmp_path: Path
) -> None:
    if by_peft:
        config = peft.LoraConfig(r=2, target_modules=["embed"])
        peft.get_peft_model(base(Tied), config).save_pretrained(tmp_path / "adapter")
    else:
        ours = base(Tied)
        inject(ours, METHOD, ["embed"])
        save_adapter(ours, tmp_path / "adapter")
    torch.save(base(Tied).state_dict(), tmp_path / "base.pt")
    with pytest.raises(AdapterError, match=r"embed\.weight is tied to inner\.layer\.head\.weight, which would change"):
        offline.merge(tmp_path / "adapter", tmp_path / "base.pt", tmp_path / "merged.pt")
    assert not (tmp_path / "merged.pt").exists()


class Squares(nn.Module):
    """A square weight that lies as (in, out), between one that shows it and one that may not."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.first = Conv1D(6, 4)
        self.square = Conv1D(6, 6)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.square(self.first(x)))


@pytest.mark.parametrize(
    "last", [Conv1D(5, 6), nn.Linear(6, 5), nn.Linear(6, 6)], ids=["Conv1D", "linear", "square linear"]
)
def test_which_way_a_square_weight_lies_is_taken_from_pefts_config_unless_others_contradict_it(
    last: nn.Module, tmp_path: Path
) -> None:
    model = base(lambda: Squares(last))
    plain = copy.deepcopy(model)
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["square", "last"])).double()
    change(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    expected = weights(theirs.merge_and_unload())
    if isinstance(last, Conv1D):
        merged = merged_files(tmp_path / "adapter", plain)
        assert all(close(merged[name], expected[name], 1e-12) for name in expected)
    else:
        with pytest.raises(AdapterError, match=r"(square|last)\.weight may lie as \(out, in\) or as \(in, out\)"):
            merged_files(tmp_path / "adapter", plain)
    load_adapter(plain, tmp_path / "adapter")
    assert all(close(value, expected[name], 1e-12) for name, value in weights(merge_(plain)).items())


def test_a_layer_inside_of_a_module_whose_parameter_peft_adapted_is_found(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["inner.a"], target_parameters=["layer.table"], bias="all")
    theirs = peft.get_peft_model(base(Block), config, autocast_adapter_dtype=False).double().eval()
    change(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    fresh, x = base(Block), draw(3, 4, 6)
    found = load_adapter(fresh, tmp_path / "adapter")
    assert {site.name for site in found} == {"inner.layer.table", "inner.layer.inner.a.weight"}
    assert close(fresh(x), theirs(x), 1e-12)
    merged = merged_files(tmp_path / "adapter", base(Block))
    assert all(close(merged[name], value, 1e-12) for name, value in weights(merge_(fresh)).items())


def test_parameters_that_pefts_config_does_not_tell_apart_are_not_guessed(tmp_path: Path) -> None:
    case = CASES["one stack of experts"]
    with_theirs(case).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_parameters": ["up", "down"]}))
    with pytest.raises(AdapterError, match="which 1 of its parameters are adapted cannot be told from"):
        load_adapter(base(case.layer), tmp_path / "adapter")


def model_of(name: str) -> nn.Module:
    """A tiny transformers model."""
    torch.manual_seed(0)
    small = {
        "vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if name == "mixtral":
        config = transformers.MixtralConfig(**small, intermediate_size=12, num_local_experts=3)
        return transformers.MixtralForCausalLM(config).eval()
    if name == "gpt-oss":
        config = transformers.GptOssConfig(**small, intermediate_size=16, num_local_experts=4, num_experts_per_tok=2)
        return transformers.GptOssForCausalLM(config).eval()
    if name == "gemma":
        return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**small, intermediate_size=12)).eval()
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, intermediate_size=12)).eval()
    config = transformers.GPT2Config(
        vocab_size=16, n_embd=8, n_layer=2, n_head=2, n_positions=8, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


MODELS: dict[str, dict[str, list[str]]] = {
    "gpt2": {"target_modules": ["c_attn", "c_proj", "wpe", "lm_head"]},
    "llama": {"target_modules": ["embed_tokens", "q_proj", "lm_head"]},
    "gemma": {"target_modules": ["embed_tokens", "v_proj"]},
    "mixtral": {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "gpt-oss": {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
}
IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter")
@torch.no_grad()
def test_models_of_transformers_go_both_ways(name: str, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(model_of(name), peft.LoraConfig(r=2, lora_alpha=6, **MODELS[name])).eval()
    change(theirs)
    outputs = theirs(IDS).logits
    theirs.save_pretrained(tmp_path / "theirs")
    ours = model_of(name)
    load_adapter(ours, tmp_path / "theirs")
    assert close(ours(IDS).logits, outputs, 1e-6)
    assert trained_in_full(ours) == set()  # PEFT also writes the unchanged weights of embeddings
    save_adapter(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(model_of(name), tmp_path / "ours").eval()
    assert close(back(IDS).logits, outputs, 1e-6)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@torch.no_grad()
def test_an_embedding_that_peft_wrote_with_new_rows_is_taken_over(tmp_path: Path) -> None:
    theirs = model_of("llama")
    theirs.get_input_embeddings().weight[-1] += 1
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules=["embed_tokens"])).eval()
    change(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = model_of("llama")
    load_adapter(ours, tmp_path / "theirs")
    assert trained_in_full(ours) == {"model.embed_tokens.weight"}
    ids = torch.tensor([[3, 15]])
    assert close(ours(ids).logits, theirs(ids).logits, 1e-6)
    merged = merged_files(tmp_path / "theirs", model_of("llama"))
    expected = weights(merge_(ours))
    assert all(close(merged[name], expected[name], 1e-6) for name in expected)


@pytest.mark.parametrize("name", ["embedding", "convolution 2d with stride", "stacks of experts and a table", "Conv1D"])
def test_tensors_of_any_other_shape_end_in_our_own_error(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    folder = tmp_path / "adapter"
    with_theirs(case).save_pretrained(folder)
    torch.save(base(case.layer).state_dict(), tmp_path / "base.pt")
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    odd = [torch.tensor(1.0), torch.ones(3), torch.ones(0, 4), torch.ones(7, 2), torch.ones(2, 2, 2, 2, 2)]
    for key in tensors:
        for value in odd:
            broken = tensors | {key: value}
            safetensors.torch.save_file(broken, folder / "adapter_model.safetensors", {"format": "pt"})
            with pytest.raises(AdapterError):
                load_adapter(base(case.layer), folder)
            with pytest.raises(AdapterError):
                offline.merge(folder, tmp_path / "base.pt", tmp_path / "merged.pt")
            with suppress(AdapterError):
                list(offline.inspect(folder))


def test_a_parametrized_weight_is_no_peft_file_because_peft_loses_what_it_merges(tmp_path: Path) -> None:
    def layer() -> nn.Module:
        return nn.utils.parametrizations.weight_norm(nn.Linear(6, 5, bias=False))

    theirs, x = peft_on(Other(layer, (), "")), draw(2, 6)
    theirs.save_pretrained(tmp_path / "theirs")
    outputs = theirs(x)
    assert not close(theirs.merge_and_unload()(x), outputs, 1e-3)
    ours = base(layer)
    load_adapter(ours, tmp_path / "theirs")  # unmerged it computes as ours
    assert close(ours(x), outputs, 1e-12)
    save_adapter(ours, tmp_path / "adapter")
    described = read_tensors(tmp_path / "adapter" / "adapter_model.safetensors")[1]
    assert described["not_for_peft"].startswith("PEFT loses what it merges into a weight that is computed")
    assert described["sites"]["inner.layer.weight"].keys() == {"r", "alpha", "base", "size", "form"}
    fresh = base(layer)
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(x), ours(x))
    torch.save(base(layer).state_dict(), tmp_path / "base.pt")
    with pytest.raises(AdapterError, match=r"inner\.layer\.weight, which the model does not have"):
        offline.merge(tmp_path / "adapter", tmp_path / "base.pt", tmp_path / "merged.pt")


@pytest.mark.parametrize("version", [None, "0.17.1", "0.19.1"])
def test_stacks_from_versions_of_peft_that_stored_them_otherwise_are_refused(
    version: str | None, tmp_path: Path
) -> None:
    for name in ("one stack of experts", "sums of embeddings"):
        with_theirs(CASES[name]).save_pretrained(tmp_path / name)
        path = tmp_path / name / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_version": version}))
    load_adapter(base(CASES["sums of embeddings"].layer), tmp_path / "sums of embeddings")
    with pytest.raises(AdapterError, match=r"before 0\.20\.0 stored stacks of matrices in another way"):
        load_adapter(base(Experts), tmp_path / "one stack of experts")
