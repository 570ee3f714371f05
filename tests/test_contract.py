"""What every method promises on every kind of layer.

A new method is tested here as soon as its file exists, a new kind of layer once it has a line in ``KINDS``.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import (
    LoRA,
    Method,
    VeRA,
    inject,
    known_methods,
    load_adapter,
    merge_,
    merged,
    offline,
    remove,
    save_adapter,
    sites,
    use,
    using,
)
from lightning_lora.adapter import Adapter
from lightning_lora.files import read_tensors
from lightning_lora.layers import kind_in_use
from lightning_lora.layers.linear import AdaptedLinear

NESTED_TENSORS_ARE_A_PROTOTYPE = "ignore:The PyTorch API of nested tensors:UserWarning"
pytestmark = pytest.mark.filterwarnings(NESTED_TENSORS_ARE_A_PROTOTYPE)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)


PADDED = torch.tensor([[False, False, False, False], [False, False, True, True]])


def indices(*shape: int) -> Tensor:
    return torch.randint(0, 7, shape, generator=torch.Generator().manual_seed(5))


class Scaled(nn.Linear):
    """A forward of its own, far from that of its class."""

    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input).square()


class Experts(nn.Module):
    """Three experts in stacked parameters, as mixtures of experts have them."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn((3, 6, 5) if is_transposed else (3, 5, 6)))
        self.down = nn.Parameter(torch.randn((3, 5, 6) if is_transposed else (3, 6, 5)))

    def forward(self, input: Tensor) -> Tensor:
        up, down = (self.up, self.down) if self.is_transposed else (self.up.mT, self.down.mT)
        return torch.tanh(input @ up) @ down


class Kind(NamedTuple):
    layer: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    targets: str | list[str] = "all-linear"
    fused: dict[str, list[str] | dict[str, int]] | None = None
    uncompiled: str = ""  # why torch.compile makes no whole graph of it
    beyond_peft: str = ""  # why PEFT cannot express adapters on it


ITSELF = ["layer"]
HADAMARD_IN_PEFT = (  # beside linear layers
    "embedding",
    "embedding with padding, scaled by frequency",
    "convolution 1d, dilated, causal context",
    "convolution 2d with stride",
    "convolution 3d",
)
RECURRENT = "PyTorch does not trace recurrent layers"
ATTENTION = "PEFT adds the change of an nn.MultiheadAttention's out_proj twice (up to 0.21.2)"
SEPARATE = "PEFT has no adapter for MultiheadAttention.q_proj_weight"
PARTS = "PEFT has no adapter for a part of a matrix"


KINDS: dict[str, Kind] = {
    "linear": Kind(lambda: nn.Linear(6, 5), lambda: {"input": draw(2, 4, 6)}),
    "linear without bias": Kind(lambda: nn.Linear(6, 5, bias=False), lambda: {"input": draw(4, 6)}),
    "attention": Kind(
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        lambda: {"query": draw(2, 4, 8), "key": draw(2, 4, 8), "value": draw(2, 4, 8)},
        beyond_peft=ATTENTION,
    ),
    "attention without bias, sequence first": Kind(
        lambda: nn.MultiheadAttention(8, 2, bias=False),
        lambda: {"query": draw(3, 2, 8), "key": draw(4, 2, 8), "value": draw(4, 2, 8)},
        beyond_peft=ATTENTION,
    ),
    "attention with other key and value sizes": Kind(
        lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True),
        lambda: {"query": draw(2, 3, 8), "key": draw(2, 4, 6), "value": draw(2, 4, 4)},
        beyond_peft=SEPARATE,
    ),
    "attention with other sizes, without bias, sequence first": Kind(
        lambda: nn.MultiheadAttention(8, 2, bias=False, kdim=6, vdim=4),
        lambda: {"query": draw(3, 2, 8), "key": draw(4, 2, 6), "value": draw(4, 2, 4)},
        beyond_peft=SEPARATE,
    ),
    "encoder layer": Kind(encoder_layer, lambda: {"src": draw(2, 4, 8)}, beyond_peft=ATTENTION),
    "encoder layer with padding": Kind(
        encoder_layer,
        lambda: {"src": draw(2, 4, 8), "src_key_padding_mask": PADDED.clone()},
        beyond_peft=ATTENTION,
    ),
    "encoder layer, normalized first, without bias": Kind(
        lambda: nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, norm_first=True, bias=False),
        lambda: {"src": draw(4, 2, 8)},
        beyond_peft=ATTENTION,
    ),
    "encoder": Kind(
        lambda: nn.TransformerEncoder(encoder_layer(), 2), lambda: {"src": draw(2, 4, 8)}, beyond_peft=ATTENTION
    ),
    "encoder with nested tensors": Kind(
        lambda: nn.TransformerEncoder(encoder_layer(), 2),
        lambda: {"src": draw(2, 4, 8), "src_key_padding_mask": PADDED.clone()},
        beyond_peft=ATTENTION,
    ),
    "decoder layer": Kind(
        lambda: nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True),
        lambda: {"tgt": draw(2, 3, 8), "memory": draw(2, 4, 8)},
        beyond_peft=ATTENTION,
    ),
    "decoder": Kind(
        lambda: nn.TransformerDecoder(
            nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, norm_first=True, batch_first=True), 2, nn.LayerNorm(8)
        ),
        lambda: {"tgt": draw(2, 3, 8), "memory": draw(2, 4, 8)},
        beyond_peft=ATTENTION,
    ),
    "linear with another forward": Kind(lambda: Scaled(6, 5), lambda: {"input": draw(4, 6)}),
    "fused linear, two of its parts": Kind(
        lambda: nn.Linear(6, 8),
        lambda: {"input": draw(2, 4, 6)},
        ["layer.q", "layer.v"],
        {"layer": {"q": 4, "k": 2, "v": 2}},
        beyond_peft=PARTS,
    ),
    "attention, two parts of its input projection": Kind(
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        lambda: {"query": draw(2, 4, 8), "key": draw(2, 4, 8), "value": draw(2, 4, 8)},
        ["layer.q", "layer.v"],
        {"in_proj_weight": ["q", "k", "v"]},
        beyond_peft=ATTENTION,
    ),
    "transformers' Conv1D": Kind(lambda: Conv1D(5, 6), lambda: {"x": draw(2, 4, 6)}),
    "fused Conv1D, two of its parts": Kind(
        lambda: Conv1D(9, 6),
        lambda: {"x": draw(2, 4, 6)},
        ["layer.q", "layer.v"],
        {"layer": ["q", "k", "v"]},
        beyond_peft=PARTS,
    ),
    "embedding": Kind(lambda: nn.Embedding(7, 5), lambda: {"input": indices(2, 4)}, ITSELF),
    "embedding with padding, scaled by frequency": Kind(
        lambda: nn.Embedding(7, 5, padding_idx=2, scale_grad_by_freq=True), lambda: {"input": indices(2, 4)}, ITSELF
    ),
    "embedding with limited norm": Kind(
        lambda: nn.Embedding(7, 5, max_norm=1.5, norm_type=1.0), lambda: {"input": indices(2, 4)}, ITSELF
    ),
    "convolution 1d, dilated, causal context": Kind(
        lambda: nn.Conv1d(6, 5, 3, padding=4, dilation=2),
        lambda: {"input": draw(2, 6, 7)},
        ITSELF,
        beyond_peft="PEFT's factors leave the dilation=(2,) of a convolution out",
    ),
    "convolution 2d with stride": Kind(
        lambda: nn.Conv2d(6, 5, (3, 2), stride=(2, 1), padding=1), lambda: {"input": draw(2, 6, 5, 6)}, ITSELF
    ),
    "convolution 2d in groups, circular": Kind(
        lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular", groups=2, bias=False),
        lambda: {"input": draw(2, 6, 5, 6)},
        ITSELF,
        beyond_peft="PEFT's factors do not keep to the groups=2 of a convolution",
    ),
    "convolution 3d": Kind(
        lambda: nn.Conv3d(4, 3, (1, 1, 3), padding="same"), lambda: {"input": draw(2, 4, 2, 3, 5)}, ITSELF
    ),
    "transposed convolution 1d": Kind(
        lambda: nn.ConvTranspose1d(6, 5, 3, stride=2, output_padding=1),
        lambda: {"input": draw(2, 6, 4)},
        ITSELF,
        beyond_peft="PEFT has no adapter for ConvTranspose1d.weight",
    ),
    "transposed convolution 2d in groups": Kind(
        lambda: nn.ConvTranspose2d(6, 4, (3, 2), stride=2, padding=1, groups=2, dilation=(1, 2)),
        lambda: {"input": draw(2, 6, 3, 4)},
        ITSELF,
        beyond_peft="PEFT has no adapter for ConvTranspose2d.weight",
    ),
    "LSTM": Kind(
        lambda: nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True),
        lambda: {"input": draw(2, 4, 6)},
        ITSELF,
        uncompiled=RECURRENT,
    ),
    "GRU": Kind(lambda: nn.GRU(6, 5, bias=False), lambda: {"input": draw(4, 2, 6)}, ITSELF, uncompiled=RECURRENT),
    "GRU cell": Kind(
        lambda: nn.GRUCell(6, 5), lambda: {"input": draw(2, 6), "hx": draw(2, 5)}, ITSELF, uncompiled=RECURRENT
    ),
    "stacked experts": Kind(lambda: Experts(False), lambda: {"input": draw(3, 4, 6)}, ["layer.up", "layer.down"]),
    "stacked experts, transposed": Kind(lambda: Experts(True), lambda: {"input": draw(3, 4, 6)}, ["up", "down"]),
    "parameter of a layer of no known kind": Kind(
        lambda: nn.EmbeddingBag(7, 5), lambda: {"input": indices(2, 4)}, ["layer.weight"]
    ),
}
ALPHAS = {  # 3 makes changes much larger than LoRA's, there is no alpha, or PEFT has that of r alone
    "DeltaLoRA": 1.0,
    "HiRA": 2.0,
    "ReLoRA": 1.0,
    "VeRA": 1.0,
}
METHODS: dict[str, Method] = {
    name: cls().at(2, ALPHAS.get(name, 3.0))
    for name, cls in known_methods().items()
    if cls.__module__.startswith("lightning_lora.methods.")
} | {"LoRA that keeps its start": LoRA(r=2, alpha=3.0, init="pissa"), "DVoRA": VeRA(r=2, magnitude=True)}
NOTHING_OF_THEIR_OWN = ("DyLoRA", "LoRADrop", "LoRAFA", "DVoRA")  # outside of a run, on a layer
ONE_OF_EACH_WAY = (  # to add adapters to a layer
    "linear",
    "attention",
    "encoder layer with padding",
    "fused linear, two of its parts",
    "embedding with padding, scaled by frequency",
    "convolution 2d in groups, circular",
    "transposed convolution 2d in groups",
    "GRU cell",
    "stacked experts, transposed",
)
EVERY_PAIR = [
    pytest.param(kind, method, id=f"{kind}-{name}")
    for name, method in METHODS.items()
    for kind in (ONE_OF_EACH_WAY if name in NOTHING_OF_THEIR_OWN else KINDS)
]
EVERY_WAY = [  # for promises that a layer's layout and a method's factors cannot break together
    pytest.param(kind, method, id=f"{kind}-{name}")
    for name, method in METHODS.items()
    for kind in (KINDS if name == "LoRA" else ONE_OF_EACH_WAY)
]
MODES = ["training", "evaluation with gradients", "inference"]

every_pair = pytest.mark.parametrize(("kind", "method"), EVERY_PAIR)
every_way = pytest.mark.parametrize(("kind", "method"), EVERY_WAY)
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
every_mode = pytest.mark.parametrize("mode", MODES)


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, **inputs: Tensor) -> Tensor:
        output = self.layer(**inputs)
        return output[0] if isinstance(output, tuple) else output


def base(kind: str, dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net(KINDS[kind].layer()).to(dtype)


def frozen(kind: str, dtype: torch.dtype = torch.float64) -> Net:
    """The base, frozen: PyTorch rounds some matrix products otherwise where a weight requires a gradient."""
    return base(kind, dtype).requires_grad_(False)


def adapted(kind: str, method: Method, dtype: torch.dtype = torch.float64, start: bool = False) -> Net:
    """The base with adapters that change it, or at their start."""
    model = base(kind, dtype)
    inject_into(model, kind, method)
    if not start:
        change(model)
    return model


def inject_into(model: nn.Module, kind: str, method: Method) -> None:
    inject(model, method, KINDS[kind].targets, fused=KINDS[kind].fused, seed=1)


def change(model: nn.Module, seed: int = 2) -> None:
    generator = torch.Generator().manual_seed(seed)
    for adapter in (module for module in model.modules() if isinstance(module, Adapter)):
        shapes = {name: parameter.shape for name, parameter in adapter.named_parameters(recurse=False)}
        values = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        adapter.load_state_dict(values, strict=False)  # loaded, because some read off the values what they compute


@torch.no_grad()
def set_adapted_weights(plain: nn.Module, model: nn.Module, *tasks: str) -> None:
    """Give a plain copy of the base the weights that the adapters stand for."""
    for site in sites(model):
        layout, name = site.slot.layout, site.name.partition("[")[0]
        weight = plain.get_parameter(name)
        for task in tasks or ("default",):
            weight.copy_(layout.put(weight, site.adapter(task).adapted(layout.matrix(weight))))


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{prefix}.{name}": parameter
        for prefix, module in model.named_modules()
        if isinstance(module, Adapter)
        for name, parameter in module.named_parameters(recurse=False)
    }


def adapter_entries(model: nn.Module) -> set[str]:
    """The names of all that adapters have, what they share among it."""
    return {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, Adapter)
        for name in module.state_dict()
    }


def run(model: nn.Module, kind: str, mode: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """The outputs; what lies behind the end of a sequence means nothing, and PyTorch's paths differ in it."""
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in KINDS[kind].inputs().items()}
    model.train(mode == "training")
    with torch.inference_mode() if mode == "inference" else nullcontext():
        outputs: Tensor = model(**inputs)
    padded = inputs.get("src_key_padding_mask")
    return outputs if padded is None else outputs.masked_fill(padded[..., None], 0.0)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=1e-12)


@every_pair
@every_mode
def test_adapted_model_starts_as_its_base_bit_for_bit(kind: str, method: Method, mode: str) -> None:
    model = adapted(kind, method, torch.float32, start=True)
    plain = frozen(kind, torch.float32) if mode == "inference" else base(kind, torch.float32)
    assert torch.equal(run(model, kind, mode, torch.float32), run(plain, kind, mode, torch.float32))


@every_pair
@pytest.mark.parametrize("mode", ["training", "evaluation with gradients"])
def test_every_trainable_adapter_parameter_gets_a_gradient_and_nothing_else_does(
    kind: str, method: Method, mode: str
) -> None:
    model = adapted(kind, method)
    run(model, kind, mode).square().sum().backward()
    ours = adapter_parameters(model)
    reached = {name for name, p in model.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
    assert reached == {name for name, parameter in ours.items() if parameter.requires_grad}
    assert all(p.grad is None for name, p in model.named_parameters() if name not in reached)
    assert {name.rpartition(".")[0] for name in reached} == {name.rpartition(".")[0] for name in ours}


@every_pair
@every_mode
def test_forward_is_that_of_a_plain_model_with_the_adapted_weights(kind: str, method: Method, mode: str) -> None:
    model, plain = adapted(kind, method), base(kind)
    set_adapted_weights(plain, model)
    outputs = run(model, kind, mode)
    assert close(outputs, run(plain, kind, mode))
    assert not close(outputs, run(base(kind), kind, mode))


@every_pair
@pytest.mark.parametrize("mode", ["evaluation with gradients", "inference"])
def test_merged_computes_the_same_and_restores_every_weight_bit_for_bit(kind: str, method: Method, mode: str) -> None:
    model = adapted(kind, method)
    before, outputs = state(model), run(model, kind, mode)
    with merged(model):
        assert close(run(model, kind, mode), outputs)
        assert not same(state(model), before)
    assert same(state(model), before)
    assert torch.equal(run(model, kind, mode), outputs)


@every_way
def test_merged_restores_every_weight_after_an_exception(kind: str, method: Method) -> None:
    model = adapted(kind, method, torch.float32)
    before, outputs = state(model), run(model, kind, "inference", torch.float32)
    with pytest.raises(KeyboardInterrupt), merged(model):
        raise KeyboardInterrupt
    assert same(state(model), before)
    assert torch.equal(run(model, kind, "inference", torch.float32), outputs)


@every_way
def test_training_while_merged_is_refused(kind: str, method: Method) -> None:
    model = adapted(kind, method)
    with merged(model), pytest.raises(RuntimeError, match="training while the adapters are merged"):
        run(model, kind, "training")
    run(model, kind, "training")


@every_pair
@every_mode
def test_merge_leaves_a_plain_model_that_computes_the_same(kind: str, method: Method, mode: str) -> None:
    model, plain = adapted(kind, method), base(kind)
    outputs = run(model, kind, mode)
    assert merge_(model) is model
    assert shape_of(model) == shape_of(plain)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert close(run(model, kind, mode), outputs)


def shape_of(model: nn.Module) -> dict[str, tuple[type, list[str], list[str]]]:
    return {
        name: (type(module), sorted(module.__dict__), list(module._modules)) for name, module in model.named_modules()
    }


@every_pair
def test_remove_leaves_no_trace(kind: str, method: Method) -> None:
    model, plain = adapted(kind, method), base(kind)
    run(model, kind, "training")
    run(model, kind, "inference")
    remove(model)
    assert shape_of(model) == shape_of(plain)
    assert same(state(model), state(plain))
    assert torch.equal(run(model, kind, "inference"), run(frozen(kind), kind, "inference"))


@every_pair
@pytest.mark.parametrize("bare", [False, True], ids=["inside a model", "as the model"])
def test_a_saved_adapter_gives_a_fresh_base_the_same_outputs(
    kind: str, method: Method, bare: bool, tmp_path: object
) -> None:
    model, fresh = adapted(kind, method, torch.float32), base(kind, torch.float32)
    save_adapter(model.layer if bare else model, f"{tmp_path}/adapter")
    load_adapter(fresh.layer if bare else fresh, f"{tmp_path}/adapter")
    for mode in MODES:
        assert torch.equal(run(fresh, kind, mode, torch.float32), run(model, kind, mode, torch.float32))
    assert same(state(fresh), state(model))


@every_pair
def test_the_folder_is_pefts_where_peft_can_express_it_and_says_why_where_not(
    kind: str, method: Method, tmp_path: Path
) -> None:
    model = adapted(kind, method)
    save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    described = read_tensors(tmp_path / "adapter" / "adapter_model.safetensors")[1]
    why, in_peft = described.get("not_for_peft", ""), method.peft_config()
    expected = KINDS[kind].beyond_peft if in_peft else "PEFT does not have"
    if (in_peft or {}).get("use_dora") and any(site.get("form") == "parameter" for site in described["sites"].values()):
        expected = expected or "PEFT's target_parameters takes no DoRA"
    on_linear_layers = all(issubclass(kind_in_use(site.module), AdaptedLinear) for site in sites(model))
    if in_peft and in_peft["peft_type"] != "LORA" and not on_linear_layers:
        expected = f"PEFT has {type(method).__name__} on linear layers"
    if in_peft and in_peft["peft_type"] == "HIRA" and kind in HADAMARD_IN_PEFT:
        expected = ""
    expected = next(filter(None, (site.adapter("default").why_not_peft() for site in sites(model))), expected)
    assert why.startswith(expected) if expected else not why
    assert config["peft_type"] == ("LIGHTNING_LORA" if why else in_peft["peft_type"])


@every_pair
@pytest.mark.parametrize("file", ["base.pt", "base.safetensors"])
def test_merging_files_alone_writes_what_merging_the_model_does(
    kind: str, method: Method, file: str, tmp_path: Path
) -> None:
    model, plain = adapted(kind, method, torch.float32), base(kind, torch.float32)
    save_adapter(model, tmp_path / "adapter")
    safetensors.torch.save_file(plain.state_dict(), tmp_path / "base.safetensors")
    torch.save(plain.state_dict(), tmp_path / "base.pt")
    (written,) = offline.merge(tmp_path / "adapter", tmp_path / file, tmp_path / f"out-{file}")
    values = torch.load(written) if file == "base.pt" else safetensors.torch.load_file(written)
    assert same(values, merge_(model).state_dict())
    assert not same(values, plain.state_dict())


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved_by_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_way
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved_by_torch])
def test_copies_work_and_are_independent(
    kind: str, method: Method, duplicate: Callable[[nn.Module], nn.Module]
) -> None:
    model = adapted(kind, method)
    twin = duplicate(model)
    outputs = run(model, kind, "training")
    assert {name: type(module) for name, module in twin.named_modules()} == {
        name: type(module) for name, module in model.named_modules()
    }
    for mode in MODES:
        assert torch.equal(run(twin, kind, mode), run(model, kind, mode))
    change(twin, seed=3)
    assert not torch.equal(run(twin, kind, "training"), outputs)
    assert torch.equal(run(model, kind, "training"), outputs)
    remove(twin)
    assert torch.equal(run(twin, kind, "inference"), run(frozen(kind), kind, "inference"))
    assert torch.equal(run(model, kind, "training"), outputs)


def compile_cases() -> list[tuple[str, str]]:
    """Every kind with LoRA, every other method on one layer of each way to add adapters: both halves are covered."""
    whole = [kind for kind in KINDS if not KINDS[kind].uncompiled]
    return [
        (kind, method) for method in METHODS for kind in whole if method == "LoRA" or kind in ("linear", "attention")
    ]


@pytest.mark.parametrize(("kind", "method"), compile_cases())
@pytest.mark.parametrize("mode", ["training", "inference"])
def test_compiles_into_one_graph_that_computes_the_same(kind: str, method: str, mode: str) -> None:
    model = adapted(kind, METHODS[method])
    expected = run(model, kind, mode)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = run(compiled, kind, mode)
    assert close(outputs, expected)
    if mode == "training":
        expected.square().sum().backward()
        gradients = {name: p.grad for name, p in adapter_parameters(model).items()}
        model.zero_grad()
        outputs.square().sum().backward()
        assert all(close(p.grad, gradients[name]) for name, p in adapter_parameters(model).items() if p.requires_grad)


@every_way
def test_trains_under_autocast_with_full_precision_gradients(kind: str, method: Method) -> None:
    model = adapted(kind, method, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = run(model, kind, "training", torch.float32)
    outputs.float().square().sum().backward()
    expected = run(base(kind, torch.float32), kind, "training", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert outputs.dtype == run(base(kind, torch.float32), kind, "training", torch.float32).dtype
    assert outputs.shape == expected.shape
    assert {p.grad.dtype for p in adapter_parameters(model).values() if p.requires_grad} == {torch.float32}
    full = run(adapted(kind, method, torch.float32), kind, "training", torch.float32)
    assert torch.allclose(outputs.float(), full, rtol=0.05, atol=0.05)


@every_way
@pytest.mark.parametrize("mode", MODES)
def test_a_bf16_base_with_fp32_adapters_computes_in_bf16(kind: str, method: Method, mode: str) -> None:
    model = adapted(kind, method, torch.bfloat16)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    outputs = run(model, kind, mode, torch.bfloat16)
    assert outputs.dtype == torch.bfloat16
    assert torch.allclose(outputs.double(), run(adapted(kind, method), kind, mode), rtol=0.1, atol=0.1)
    if mode != "inference":
        outputs.float().square().sum().backward()
        assert {p.grad.dtype for p in adapter_parameters(model).values() if p.requires_grad} == {torch.float32}


@every_way
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_moving_the_model_to_another_dtype_never_narrows_its_adapters(
    kind: str, method: Method, narrow: torch.dtype
) -> None:
    model = adapted(kind, method, torch.float32)
    before = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    model.to(narrow)
    ours = adapter_entries(model)
    assert {p.dtype for name, p in model.named_parameters() if name not in ours} == {narrow}
    assert same({name: p.detach() for name, p in adapter_parameters(model).items()}, before)
    model.double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert same({name: p.detach().float() for name, p in adapter_parameters(model).items()}, before)


@every_way
def test_adapters_made_on_the_meta_device_start_as_those_made_on_the_cpu(kind: str, method: Method) -> None:
    with torch.device("meta"):
        model = Net(KINDS[kind].layer())
    inject_into(model, kind, method)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    expected = adapted(kind, method, torch.float32, start=True)
    model.load_state_dict(base(kind, torch.float32).state_dict(), strict=False)
    assert torch.equal(run(model, kind, "training", torch.float32), run(expected, kind, "training", torch.float32))
    assert same(state(model), state(expected))


@every_way
def test_the_base_stays_what_it_was(kind: str, method: Method) -> None:
    model, plain = base(kind), base(kind)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    calls: list[nn.Module] = []
    for module in modules.values():
        module.register_forward_hook(lambda module, *_: calls.append(module))
    run(model, kind, "training")
    expected, calls[:] = [id(module) for module in calls], []
    before = state(model)  # an embedding that limits norms has written to its weight
    inject_into(model, kind, method)
    change(model)
    run(model, kind, "training")
    assert [id(module) for module in calls] == expected
    assert all(model.get_submodule(name) is module for name, module in modules.items())
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert all(isinstance(model.get_submodule(name), type(module)) for name, module in plain.named_modules())
    keys = [name for name in model.state_dict() if name not in adapter_entries(model)]
    assert keys == list(plain.state_dict())
    assert same({name: model.state_dict()[name] for name in keys}, before)
    loaded = model.load_state_dict({name: tensor + 1 for name, tensor in before.items()}, strict=False)
    assert not loaded.unexpected_keys
    assert set(loaded.missing_keys) == adapter_entries(model)
    assert same({name: model.state_dict()[name] - 1 for name in keys}, {n: t + 1 - 1 for n, t in before.items()})


@every_method
@pytest.mark.parametrize("kind", ["encoder layer", "encoder layer with padding", "encoder with nested tensors"])
def test_inference_still_takes_pytorchs_fused_path(kind: str, method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, calls = torch._transformer_encoder_layer_fwd, []
    monkeypatch.setattr(
        torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(args[0].is_nested) or fused(*args)
    )
    model = adapted(kind, method)
    run(model, kind, "training")
    run(model, kind, "evaluation with gradients")
    assert calls == []
    run(model, kind, "inference")
    assert calls == ([True, True] if kind == "encoder with nested tensors" else [False])


@every_method
@every_mode
@pytest.mark.parametrize("kind", ["encoder", "encoder with nested tensors"])
@pytest.mark.parametrize(
    "target", ["layers.0.linear2", "layers.1.linear1", "layers.0.self_attn", "layers.1.self_attn.out_proj"]
)
def test_an_encoder_with_one_adapted_matrix_computes_with_it(kind: str, method: Method, mode: str, target: str) -> None:
    model, plain = base(kind), frozen(kind)
    inject(model, method, [target])
    change(model)
    set_adapted_weights(plain, model)
    assert close(run(model, kind, mode), run(plain, kind, mode))
    remove(model)
    assert shape_of(model) == shape_of(plain)


def test_an_encoder_layer_in_training_calls_its_linear_layers_with_their_dropout() -> None:
    kind = "encoder layer"
    model = base(kind)
    inject(model, LoRA(r=2, dropout=0.5), ["linear1", "linear2"])
    change(model)
    assert not torch.equal(run(model, kind, "training"), run(model, kind, "training"))
    assert torch.equal(run(model, kind, "inference"), run(model, kind, "inference"))


@every_method
def test_attention_needs_no_out_projection_adapter_to_read_its_own(method: Method) -> None:
    kind = "attention"
    model, plain = base(kind), frozen(kind)
    assert [site.parameter for site in inject(model, method, ["in_proj_weight"])] == ["in_proj_weight"]
    change(model)
    set_adapted_weights(plain, model)
    assert close(run(model, kind, "training"), run(plain, kind, "training"))


def test_a_subclass_with_other_layers_in_a_known_ones_places_is_left_alone() -> None:
    class Own(nn.TransformerEncoderLayer):
        def __init__(self) -> None:
            super().__init__(8, 2, 12)
            self.self_attn = nn.Linear(8, 8)
            self.linear1 = None
            del self.linear2

        def forward(self, src: Tensor) -> Tensor:
            return self.self_attn(src)

    model = Own()
    assert [site.name for site in inject(model, LoRA())] == ["self_attn.weight"]
    assert type(model) is Own
    model(torch.zeros(2, 3, 8))


@every_way
def test_adapters_of_two_tasks_add_up(kind: str, method: Method) -> None:
    model, plain = adapted(kind, method), base(kind)
    inject(model, method, KINDS[kind].targets, fused=KINDS[kind].fused, task="second", seed=5)
    change(model, seed=4)
    use(model, "default", "second")
    set_adapted_weights(plain, model, "default", "second")
    for mode in MODES:
        assert close(run(model, kind, mode), run(plain, kind, mode))
        with using(model):
            assert close(run(model, kind, mode), run(base(kind), kind, mode))
