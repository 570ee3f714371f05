"""What is particular to single kinds of layers, beyond what every kind promises in test_contract.py."""

from __future__ import annotations

import copy
import itertools
import sys
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence
from transformers.pytorch_utils import Conv1D

from lightning_lora import LoRA, LoRACallback, inject, load_adapter, merge_, merged, remove, save_adapter, sites, use
from lightning_lora.layout import Layout


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def change(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for site in sites(model):
            for parameter in site.slot.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(layer: nn.Module, targets: Any = ("0",), **options: Any) -> nn.Sequential:
    """A layer in a model, with adapters that change it."""
    model = nn.Sequential(layer).double()
    inject(model, LoRA(r=2, alpha=3.0), list(targets), seed=1, **options)
    change(model)
    return model


def factors(model: nn.Module) -> tuple[Tensor, Tensor, float]:
    adapter = sites(model)[0].adapter("default")
    return (*adapter.factors(), adapter.scaling)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=1e-12)


def merges_to_the_same(model: nn.Module, *inputs: Any) -> bool:
    """Forward, inside ``merged`` and after ``merge_`` agree, and ``merged`` leaves every bit as it was."""
    model.eval()
    before, outputs = state(model), model(*inputs)
    with merged(model):
        inside = model(*inputs)
    restored = same(state(model), before)
    merge_(model)
    return restored and close(inside, outputs) and close(model(*inputs), outputs)


# Layouts


def test_a_grouped_convolution_is_a_stack_with_one_matrix_per_group() -> None:
    model = adapted(nn.Conv2d(6, 4, (3, 2), groups=2, bias=False))
    up, down, scaling = factors(model)
    assert (up.shape, down.shape) == ((2, 2, 2), (2, 2, 3 * 3 * 2))
    delta = torch.cat([scaling * up[g] @ down[g] for g in range(2)]).view(4, 3, 3, 2)
    weight = model[0].weight + delta
    x = draw(2, 6, 5, 6)
    assert close(model(x), F.conv2d(x, weight, groups=2))
    assert close(merge_(model)[0].weight, weight)


def test_a_transposed_convolution_has_its_kernel_in_b() -> None:
    model = adapted(nn.ConvTranspose1d(6, 4, 3, groups=2, stride=2, bias=False))
    up, down, scaling = factors(model)
    assert (up.shape, down.shape) == ((2, 2 * 3, 2), (2, 2, 3))
    delta = torch.stack([scaling * (up[g] @ down[g]).T.reshape(3, 2, 3) for g in range(2)]).view(6, 2, 3)
    x = draw(2, 6, 5)
    assert close(model(x), F.conv_transpose1d(x, model[0].weight + delta, groups=2, stride=2))


def test_an_embedding_looks_up_the_factor_that_starts_at_zero() -> None:
    model = nn.Sequential(nn.Embedding(9, 5))
    inject(model, LoRA(r=400), ["0"], seed=1)
    adapter = sites(model)[0].adapter("default")
    assert (adapter.lora_B.shape, adapter.lora_A.shape) == ((9, 400), (400, 5))
    assert not adapter.lora_B.any()
    assert abs(adapter.lora_A.std().item() - 1) < 0.05
    assert abs(adapter.lora_A.mean().item()) < 0.05


def test_stacked_parameters_have_one_pair_of_factors_for_each_matrix() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 5, 6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("ni,eoi->eno", x, self.w)

    model = adapted(Experts(), ["0.w"])
    up, down, scaling = factors(model)
    assert (up.shape, down.shape) == ((3, 5, 2), (3, 2, 6))
    weight = torch.stack([model[0].w[e] + scaling * up[e] @ down[e] for e in range(3)])
    x = draw(4, 6)
    assert close(model(x), torch.einsum("ni,eoi->eno", x, weight))


@pytest.mark.parametrize(
    ("layout", "size", "shape"),
    [
        (Layout(), (5, 6), (5, 6)),
        (Layout(transposed=True), (6, 5), (5, 6)),
        (Layout(), (5, 6, 3), (5, 18)),
        (Layout(groups=3), (6, 2, 3, 4), (3, 2, 24)),
        (Layout(groups=2, transposed=True), (6, 4, 3), (2, 12, 3)),
        (Layout(stacked=True), (7, 5, 6), (7, 5, 6)),
        (Layout(stacked=True, transposed=True), (7, 6, 5), (7, 5, 6)),
        (Layout(rows=(2, 4)), (5, 6), (2, 6)),
        (Layout(transposed=True, rows=(1, 5)), (6, 5), (4, 6)),
    ],
)
def test_what_a_layout_takes_out_it_puts_back(layout: Layout, size: tuple[int, ...], shape: tuple[int, ...]) -> None:
    weight = draw(*size)
    assert layout.shape(size) == shape == tuple(layout.matrix(weight).shape)
    assert torch.equal(layout.put(weight, layout.matrix(weight)), weight)
    changed = layout.put(weight, layout.matrix(weight) + 1)
    assert torch.equal(layout.matrix(changed), layout.matrix(weight) + 1)
    assert (changed != weight).sum() == layout.matrix(weight).numel()
    assert Layout.from_description(layout.described()) == layout


@pytest.mark.parametrize(
    "fields", [{"groups": 0}, {"groups": True}, {"rows": [3, 1]}, {"rows": [0]}, {"stacked": 1}, {"x": 1}]
)
def test_a_layout_from_a_file_is_checked(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="layout"):
        Layout.from_description(fields)


# Convolutions: every geometry

PADDINGS = [0, 1, "same", "valid"]
MODES = ["zeros", "circular", "reflect", "replicate"]


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", PADDINGS)
def test_a_convolution_of_any_geometry_computes_what_its_merged_weight_computes(
    dims: int, mode: str, padding: Any
) -> None:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    kernels = [(3,) * dims, (1,) * (dims - 1) + (3,)]
    for kernel, stride, dilation, groups in itertools.product(kernels, (1, 2), (1, 2), (1, 2, 4)):
        if padding == "same" and stride > 1:
            continue
        layer = conv(4, 8, kernel, stride, padding, dilation, groups, bias=groups == 1, padding_mode=mode)
        assert merges_to_the_same(adapted(layer), draw(2, 4, *[6] * dims)), (kernel, stride, dilation, groups)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_transposed_convolution_of_any_geometry_computes_what_its_merged_weight_computes(dims: int) -> None:
    conv = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    kernels = [(3,) * dims, (1,) * (dims - 1) + (2,)]
    for kernel, stride, padding, dilation, groups in itertools.product(kernels, (1, 2), (0, 1), (1, 2), (1, 2, 4)):
        extra = 1 if max(stride, dilation) > 1 else 0
        layer = conv(4, 8, kernel, stride, padding, extra, groups, dilation=dilation)
        assert merges_to_the_same(adapted(layer), draw(2, 4, *[5] * dims)), (kernel, stride, padding, dilation, groups)


def test_the_output_size_of_a_call_reaches_a_transposed_convolutions_adapter() -> None:
    model = adapted(nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1))
    layer, x = model[0], draw(2, 4, 5, 5)
    outputs = layer(x, output_size=[10, 9])
    assert outputs.shape == (2, 3, 10, 9)
    assert close(merge_(model)[0](x, output_size=[10, 9]), outputs)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 8, 3, groups=2), nn.ConvTranspose2d(4, 8, 3, stride=2, groups=2)])
def test_an_image_without_a_batch_is_taken(layer: nn.Module) -> None:
    assert merges_to_the_same(adapted(layer), draw(4, 6, 6))


def test_a_convolution_in_another_memory_format_merges_to_the_same() -> None:
    model = adapted(nn.Conv2d(4, 8, 3)).to(memory_format=torch.channels_last)
    assert merges_to_the_same(model, draw(2, 4, 6, 6).to(memory_format=torch.channels_last))


# Embeddings


def test_an_embedding_with_limited_norm_limits_the_adapted_rows_and_leaves_the_frozen_weight_alone() -> None:
    model = adapted(nn.Embedding(9, 5, max_norm=1.0))
    before, index = state(model), torch.arange(9)
    outputs = model(index)
    assert same(state(model), before)
    assert (outputs.norm(dim=-1) < 1 + 1e-6).all()
    up, down, scaling = factors(model)
    plain = nn.Embedding(9, 5, max_norm=1.0, _weight=model[0].weight + scaling * up @ down)
    assert close(outputs, plain(index))


def test_gradients_pass_a_limited_norm_as_they_pass_it_in_the_merged_layer() -> None:
    model, index = adapted(nn.Embedding(9, 5, max_norm=1.0)), torch.tensor([1, 4, 4])
    up, down, scaling = factors(model)
    plain = nn.Embedding(9, 5, max_norm=1.0, _weight=(model[0].weight + scaling * up @ down).detach())
    (plain(index) * draw(3, 5)).sum().backward()
    (model(index) * draw(3, 5)).sum().backward()
    gradient = plain.weight.grad
    assert close(up.grad, scaling * gradient @ down.T)
    assert close(down.grad, scaling * up.T @ gradient)


def test_the_padding_row_of_an_embedding_learns_nothing() -> None:
    model = adapted(nn.Embedding(9, 5, padding_idx=3))
    model(torch.tensor([3, 3, 4])).sum().backward()
    up, _, _ = factors(model)
    assert not up.grad[3].any()
    assert up.grad[4].all()


def test_gradients_of_a_sparse_embeddings_adapter_are_dense() -> None:
    model = adapted(nn.Embedding(9, 5, sparse=True))
    model(torch.tensor([3, 4])).sum().backward()
    assert {p.grad.layout for p in model.parameters() if p.requires_grad} == {torch.strided}


# Recurrent layers


@pytest.mark.parametrize("cls", [nn.RNN, nn.LSTM, nn.GRU])
def test_a_recurrent_layer_takes_packed_sequences_and_states(cls: Any) -> None:
    model = adapted(cls(6, 5, num_layers=2, dropout=0.0, batch_first=True))
    layer, x = model[0].eval(), pack_padded_sequence(draw(3, 4, 6), [4, 2, 1], batch_first=True)
    start = draw(2, 3, 5)
    start = (start, 2 * start) if cls is nn.LSTM else start
    outputs = layer(x, start)[0].data
    assert not close(outputs, copy.deepcopy(remove_all(model))[0](x, start)[0].data)
    with merged(model):
        assert close(layer(x, start)[0].data, outputs)


def remove_all(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    remove(twin)
    return twin


def test_an_lstm_with_projections_merges_to_the_same() -> None:
    model = adapted(nn.LSTM(6, 5, proj_size=3))
    assert [site.parameter for site in sites(model)] == ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"]
    before, x = state(model), draw(4, 2, 6)
    outputs = model(x)[0]
    assert same(state(model), before)
    assert close(merge_(model)(x)[0], outputs)


def test_a_recurrent_layer_holds_its_own_weights_again_after_a_forward() -> None:
    model = adapted(nn.LSTM(6, 5))
    model(draw(4, 2, 6))
    layer = model[0]
    assert all(
        weight is getattr(layer, name)
        for weight, name in zip(layer._flat_weights, layer._flat_weights_names, strict=True)
    )
    assert all(weight.grad_fn is None for weight in layer._flat_weights)


# Parts of a fused matrix


def test_two_parts_of_a_fused_matrix_change_their_own_rows_only() -> None:
    model = adapted(nn.Linear(6, 8), ["0.q", "0.v"], fused={"0": {"q": 4, "k": 2, "v": 2}})
    assert [site.name for site in sites(model)] == ["0.weight[q]", "0.weight[v]"]
    x = draw(3, 6)
    change_of = model(x) - F.linear(x, model[0].weight, model[0].bias)
    assert not change_of[:, 4:6].any()
    assert change_of[:, :4].any()
    assert change_of[:, 6:].any()
    before = model[0].weight.clone()
    merge_(model)
    assert torch.equal(model[0].weight[4:6], before[4:6])


def test_parts_have_the_parameters_of_matrices_of_their_size() -> None:
    model = nn.Sequential(nn.Linear(6, 9))
    inject(model, LoRA(r=2), ["0.q", "0.v"], fused={"0": ["q", "k", "v"]}, rank_pattern={"0.v": 1})
    assert [site.slot.parameters().__next__().shape[0] for site in sites(model)] == [2, 1]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * (6 + 3) + 1 * (6 + 3)


def test_the_name_of_a_fused_matrix_means_all_of_its_parts() -> None:
    model = nn.Sequential(nn.Linear(6, 9))
    found = inject(model, LoRA(r=2), ["0"], fused={"0": ["q", "k", "v"]})
    assert [site.name for site in found] == ["0.weight[q]", "0.weight[k]", "0.weight[v]"]


def test_a_part_and_the_whole_can_be_tasks_side_by_side() -> None:
    model = nn.Sequential(nn.Linear(6, 9)).double()
    inject(model, LoRA(r=2), ["0.q"], fused={"0": ["q", "k", "v"]}, task="part")
    inject(model, LoRA(r=2), ["0"], task="whole")
    change(model)
    x = draw(3, 6)
    use(model, "part", "whole")
    assert merges_to_the_same(model, x)


@pytest.mark.parametrize(
    ("fused", "message"),
    [
        ({"0": ["q", "k"]}, r"fused\['0'\]=\{'q': 4, 'k': 4\} has 8 rows, but 0.weight has 9"),
        ({"0": {"q": 4, "k": 4}}, "has 8 rows, but 0.weight has 9"),
        ({"0": {"q": 9, "k": 0}}, "has 9 rows, but"),
        ({"0": ["q", "k", "v.x"]}, "'v.x' is no name for a part"),
        ({"nothing": ["q"]}, "fused entry 'nothing' matches nothing"),
        ({"1": ["q", "k"]}, "fused entry '1' fits 1.weight, which is no linear layer's matrix as a whole"),
    ],
)
def test_parts_that_do_not_make_up_the_whole_are_refused(fused: Any, message: str) -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.Conv1d(2, 4, 1))
    with pytest.raises(ValueError, match=message):
        inject(model, LoRA(r=2), ["0"], fused=fused)
    assert not sites(model)


def test_parts_are_loaded_where_they_were_trained(tmp_path: Any) -> None:
    fused = {"0": {"q": 4, "k": 2, "v": 2}}
    model = adapted(nn.Linear(6, 8), ["0.q", "0.v"], fused=fused)
    save_adapter(model, tmp_path / "a")
    fresh = remove_all(model)
    found = load_adapter(fresh, tmp_path / "a")
    assert [(site.name, site.slot.layout.rows) for site in found] == [("0.weight[q]", (0, 4)), ("0.weight[v]", (6, 8))]
    assert torch.equal(fresh(draw(3, 6)), model(draw(3, 6)))


# Tied weights


class Tied(nn.Module):
    """An embedding and an output layer with one weight, as language models have."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 5)
        self.body = nn.Linear(5, 5)
        self.head = nn.Linear(5, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, index: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(index))))


def tied(*targets: str) -> Tied:
    model = Tied().double()
    inject(model, LoRA(r=2, alpha=3.0), list(targets), seed=1)
    change(model)
    return model


def test_tied_layers_that_are_both_adapted_share_one_adapter() -> None:
    model = tied("embed", "head")
    assert [site.name for site in sites(model)] == ["embed.weight"]
    assert model.head.adapters["weight"] is model.embed.adapters["weight"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * (9 + 5)
    up, down, scaling = factors(model)
    weight, index = model.embed.weight + scaling * up @ down, torch.arange(9)
    expected = F.linear(torch.tanh(model.body(F.embedding(index, weight))), weight)
    assert close(model(index), expected)


def test_their_adapter_is_merged_once_and_they_stay_tied() -> None:
    model, index = tied("embed", "head"), torch.arange(9)
    outputs, before = model(index), state(model)
    model.eval()
    with merged(model):
        assert model.head.weight is model.embed.weight
        assert close(model(index), outputs)
    assert same(state(model), before)
    merge_(model)
    assert model.head.weight is model.embed.weight
    assert close(model(index), outputs)


def test_their_adapter_is_removed_from_both() -> None:
    model = tied("embed", "head")
    remove(model)
    assert (type(model.embed), type(model.head)) == (nn.Embedding, nn.Linear)
    assert "adapters" not in model.head._modules


def test_their_adapter_is_saved_once_and_loaded_into_both(tmp_path: Any) -> None:
    model = tied("embed", "head")
    save_adapter(model, tmp_path / "a")
    fresh = Tied().double()
    load_adapter(fresh, tmp_path / "a")
    assert fresh.head.adapters["weight"] is fresh.embed.adapters["weight"]
    assert torch.equal(fresh(torch.arange(9)), model(torch.arange(9)))


def test_a_base_that_is_not_tied_any_more_does_not_take_their_adapter(tmp_path: Any) -> None:
    save_adapter(tied("embed", "head"), tmp_path / "a")
    fresh = Tied().double()
    fresh.head.weight = nn.Parameter(fresh.embed.weight.detach().clone())
    with pytest.raises(ValueError, match=r"embed\.weight was tied to head\.weight, and in this model it is not"):
        load_adapter(fresh, tmp_path / "a")
    assert not sites(fresh)


def test_a_copy_of_a_model_with_a_shared_adapter_shares_its_own() -> None:
    model = tied("embed", "head")
    twin = copy.deepcopy(model)
    assert twin.head.adapters["weight"] is twin.embed.adapters["weight"]
    assert twin.head.adapters["weight"] is not model.head.adapters["weight"]


def test_one_adapted_user_of_a_tied_weight_is_merged_for_a_while_without_touching_the_other() -> None:
    model, index = tied("head"), torch.arange(9)
    outputs, embedded = model(index), model.embed(index)
    model.eval()
    with merged(model):
        assert torch.equal(model.embed(index), embedded)
        assert close(model(index), outputs)
    assert model.head.weight is model.embed.weight
    with pytest.raises(
        ValueError, match=r"cannot merge into head.weight: it is tied to embed.weight, which would change"
    ):
        merge_(model)


# Layers with a forward of their own


class Standardized(nn.Conv2d):
    """A convolution whose weight is standardized before use."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(input, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


class Inner(nn.Conv2d):
    """Another convolution under the plain forward."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight.abs(), bias)


class ScaledEmbedding(nn.Embedding):
    """An embedding that scales what it looks up, as Gemma's does."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 7


class Masked(nn.Linear):
    """A linear layer that reads half of its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.tril(), self.bias)


class TwoInputs(nn.Linear):
    """A linear layer whose forward takes more than one input."""

    def forward(self, input: Tensor, scale: Tensor) -> Tensor:
        return super().forward(input) * scale


OWN = {
    "standardized": (Standardized(4, 3, 2), (draw(2, 4, 5, 5),)),
    "other inner convolution": (Inner(4, 3, 2), (draw(2, 4, 5, 5),)),
    "scaled embedding": (ScaledEmbedding(9, 5), (torch.arange(4),)),
    "masked": (Masked(6, 5), (draw(3, 6),)),
    "two inputs": (TwoInputs(6, 5), (draw(3, 6), draw(3, 1))),
}


@pytest.mark.parametrize(("layer", "inputs"), OWN.values(), ids=OWN)
def test_a_layer_with_a_forward_of_its_own_computes_what_its_merged_weight_computes(
    layer: nn.Module, inputs: Any
) -> None:
    model = nn.ModuleList([copy.deepcopy(layer)]).double()
    plain = model[0](*inputs)
    inject(model, LoRA(r=2), ["0"])
    assert torch.equal(model[0](*inputs), plain)
    change(model)
    outputs = model[0](*inputs)
    outputs.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    assert not close(outputs, plain)
    merge_(model)
    assert close(model[0](*inputs), outputs)


def test_a_forward_of_its_own_that_computes_the_same_needs_no_adapted_weight() -> None:
    class Cast(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.to(self.weight.dtype))

    model = nn.Sequential(Cast(6, 5))
    inject(model, LoRA(r=2, dropout=0.9))
    change(model)
    x = torch.ones(3, 6)
    assert not torch.equal(model(x), model(x))  # dropout acts on the input, which an adapted weight would not have


# A forward that was replaced on one object


def test_a_forward_replaced_on_one_object_is_refused_because_no_class_reaches_it() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[1].forward = MethodType(lambda self, x: F.linear(x, self.weight), model[1])
    with pytest.raises(ValueError, match=r"1\.weight: the forward of its Linear was replaced on this one object"):
        inject(model, LoRA(r=2))
    assert not sites(model)
    assert [site.name for site in inject(model, LoRA(r=2), exclude_modules=["1"])] == ["0.weight"]


def test_without_that_check_its_adapter_would_do_nothing_until_it_is_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["lightning_lora.injection_checks"], "replaced_forward", lambda module: False)
    model = nn.Sequential(nn.Linear(3, 4))
    model[0].forward = MethodType(lambda self, x: F.linear(x, self.weight, self.bias), model[0])
    plain = model(torch.ones(2, 3))
    inject(model, LoRA(r=2))
    change(model)
    assert torch.equal(model(torch.ones(2, 3)), plain)
    assert not torch.equal(merge_(model)(torch.ones(2, 3)), plain)


def test_a_forward_replaced_on_the_attention_that_reads_the_weight_is_refused_too() -> None:
    model = nn.Sequential(nn.MultiheadAttention(4, 1))
    model[0].forward = MethodType(nn.MultiheadAttention.forward, model[0])
    with pytest.raises(ValueError, match=r"0\.out_proj\.weight: the forward of its MultiheadAttention was replaced"):
        inject(model, LoRA(r=2), ["out_proj"])


def test_layers_under_accelerates_hooks_are_adapted_and_given_back() -> None:
    model = nn.Sequential(nn.Linear(3, 4)).double()
    add_hook_to_module(model[0], AlignDevicesHook(execution_device="cpu"))
    x, plain = draw(2, 3), copy.deepcopy(model)
    inject(model, LoRA(r=2))
    assert torch.equal(model(x), plain(x))
    change(model)
    outputs = model(x)
    assert not close(outputs, plain(x))
    merge_(model)
    assert close(model(x), outputs)
    remove_hook_from_module(model[0])
    assert close(model(x), outputs)
    assert type(model[0]) is nn.Linear


# Computed weights


@pytest.mark.parametrize(
    ("layer", "x"),
    [(nn.Linear(6, 5), draw(3, 6)), (nn.Conv1d(6, 5, 3), draw(2, 6, 7)), (nn.ConvTranspose1d(6, 5, 3), draw(2, 6, 7))],
    ids=lambda value: type(value).__name__,
)
def test_a_layer_under_weight_norm_merges_into_its_direction_and_magnitude(layer: nn.Module, x: Tensor) -> None:
    model = adapted(parametrizations.weight_norm(copy.deepcopy(layer)))
    keys = set(remove_all(model).state_dict())
    assert merges_to_the_same(model, x)
    assert set(model.state_dict()) == keys
    assert type(model[0]).__name__ == f"Parametrized{type(layer).__name__}"


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, parametrizations.orthogonal])
def test_a_weight_that_is_computed_for_good_cannot_be_merged_and_says_what_to_write(norm: Any) -> None:
    model = adapted(norm(nn.Linear(4, 4)))
    model.eval()
    before, outputs = state(model), model(draw(3, 4))
    for attempt in (merge_, lambda model: merged(model).__enter__()):
        with pytest.raises(ValueError, match=r"cannot merge into 0.weight: it is computed by _\w+, which cannot give"):
            attempt(model)
        assert same(state(model), before)
        assert torch.equal(model(draw(3, 4)), outputs)


def test_nothing_is_merged_where_one_weight_cannot_be() -> None:
    model = nn.Sequential(nn.Linear(4, 4), parametrizations.spectral_norm(nn.Linear(4, 4))).double().eval()
    inject(model, LoRA(r=2), ["0", "1"])
    change(model)
    before = state(model)
    with pytest.raises(ValueError, match=r"cannot merge into 1\.weight"):
        merge_(model)
    assert same(state(model), before)


def test_a_pruned_layer_is_refused_until_pruning_is_made_permanent() -> None:
    model = nn.Sequential(prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5))
    with pytest.raises(
        ValueError, match=r"0.weight is no parameter but computed from others .* remove what computes it"
    ):
        inject(model, LoRA(r=2))
    prune.remove(model[0], "weight")
    inject(model, LoRA(r=2))
    assert merges_to_the_same(change(model.double()), draw(2, 4))


def test_the_callback_takes_parts_too(trainer: Any) -> None:
    from conftest import Lit, loader

    module = Lit()
    callback = LoRACallback(LoRA(r=2), ["first.a", "second"], fused={"first": ["a", "b"]})
    trainer(callbacks=[callback], max_epochs=1).fit(module, loader())
    assert [site.name for site in sites(module)] == ["net.first.weight[a]", "net.second.weight"]
    assert all(site.adapter("default").lora_B.any() for site in sites(module))


# Attention


@pytest.mark.parametrize("mode", ["training", "inference"])
@pytest.mark.parametrize(
    "options",
    [
        {"need_weights": True},
        {"need_weights": True, "average_attn_weights": False},
        {"need_weights": False, "attn_mask": torch.ones(4, 4, dtype=torch.bool).triu(1)},
        {"need_weights": False, "is_causal": True, "attn_mask": torch.ones(4, 4, dtype=torch.bool).triu(1)},
        {"need_weights": True, "key_padding_mask": torch.tensor([[False] * 4, [False, False, True, True]])},
    ],
    ids=lambda options: ", ".join(options),
)
def test_attention_with_masks_and_weights_is_that_of_its_merged_weights(mode: str, options: dict[str, Any]) -> None:
    model = adapted(nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=False), ["0"]).train(mode == "training")
    plain, x = merge_(copy.deepcopy(model)), draw(2, 4, 8)
    with torch.set_grad_enabled(mode == "training"):
        outputs, weights = model[0](x, x, x, **options)
        expected, expected_weights = plain[0](x, x, x, **options)
    assert close(outputs, expected)
    assert (weights is None) == (expected_weights is None) == (not options["need_weights"])
    assert weights is None or close(weights, expected_weights)


def test_the_output_projection_of_attention_may_be_adapted_alone() -> None:
    model = adapted(nn.MultiheadAttention(8, 2, batch_first=True), ["out_proj"])
    x = draw(2, 4, 8)
    outputs = model[0](x, x, x)[0]
    assert close(merge_(model)[0](x, x, x)[0], outputs)


def test_rows_of_b_learn_less_the_more_often_they_are_looked_up_where_the_embedding_says_so() -> None:
    model = adapted(nn.Embedding(9, 5, scale_grad_by_freq=True))
    twin = adapted(nn.Embedding(9, 5))
    index = torch.tensor([3, 3, 3, 4])
    for one in (model, twin):
        one(index).sum().backward()
    scaled, plain = factors(model)[0].grad, factors(twin)[0].grad
    assert close(scaled[3] * 3, plain[3])
    assert close(scaled[4], plain[4])


# Parameters that cannot be adapted


class Tables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.tables = nn.ParameterList([torch.ones(4, 4)])
        self.mix = nn.Parameter(torch.ones(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x @ self.mix @ self.tables[0])


@pytest.mark.parametrize(
    ("target", "why"), [("scale", r"its shape is \[.*\]"), ("tables.0", "its ParameterList has no forward")]
)
def test_a_parameter_that_is_no_matrix_or_that_its_module_does_not_read_is_refused(target: str, why: str) -> None:
    with pytest.raises(ValueError, match=rf"matches 0.{target}, which cannot be adapted \({why}; .* modules_to_save"):
        inject(nn.Sequential(Tables()), LoRA(r=2), [target])


def test_a_glob_or_an_expression_never_means_a_parameter_of_an_unknown_kind_of_module() -> None:
    model = nn.Sequential(Tables(), nn.Linear(4, 4))
    assert [site.name for site in inject(model, LoRA(r=2), ["*"])] == ["1.weight"]
    assert [site.name for site in inject(model, LoRA(r=2), ".*", task="b")] == ["1.weight"]
    assert [site.name for site in inject(model, LoRA(r=2), ["0.mix"], task="c")] == ["0.mix"]


DROPS = {
    "Conv1D": (Conv1D(8, 6), draw(3, 6)),
    "convolution": (nn.Conv2d(4, 8, 2), draw(2, 4, 5, 5)),
    "transposed convolution": (nn.ConvTranspose2d(4, 8, 2), draw(2, 4, 5, 5)),
}


@pytest.mark.parametrize(("layer", "x"), DROPS.values(), ids=DROPS)
def test_dropout_acts_on_the_input_of_the_adapter_alone_and_in_training_alone(layer: nn.Module, x: Tensor) -> None:
    model = nn.Sequential(copy.deepcopy(layer)).double()
    plain = model(x)
    inject(model, LoRA(r=2, dropout=0.5), ["0"])
    assert torch.equal(model(x), plain)
    change(model)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_a_file_is_not_loaded_onto_a_layer_whose_weight_lies_otherwise(tmp_path: Any) -> None:
    save_adapter(adapted(Conv1D(6, 6)), tmp_path / "a")
    fresh = nn.Sequential(nn.Linear(6, 6)).double()
    with torch.no_grad():
        fresh[0].weight.copy_(adapted(Conv1D(6, 6))[0].weight)
    with pytest.raises(ValueError, match=r"0\.weight was trained as Layout\(.*transposed=True.*another kind of layer"):
        load_adapter(fresh, tmp_path / "a", allow_base_mismatch=True)
    assert not sites(fresh)
