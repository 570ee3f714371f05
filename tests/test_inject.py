"""Which matrices are adapted, by what the user writes; what is refused, and that a refusal changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRA, inject, merge_, merged, remove, sites, use, using
from lightning_lora.state import own_entries, trained_in_full


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 4, bias=False)
        self.v_proj, self.o_proj = nn.Linear(8, 4), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(torch.tanh(self.q_proj(x)[..., :4] + self.k_proj(x)) * self.v_proj(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm(x + self.attn(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 8)
        self.cls_token = nn.Parameter(torch.randn(1, 8))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.cls_token
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def adapted(model: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
    return [site.name.removesuffix(".weight") for site in inject(model, LoRA(r=2), *args, **kwargs)]


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad and ".adapters." not in name}


def change(model: nn.Module, task: str = "default") -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for site in sites(model, task):
            for parameter in site.adapter(task).parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


IDS = torch.arange(6) % 5


ATTENTION = [f"blocks.{i}.attn.{name}_proj" for i in (0, 1) for name in "qkvo"]
MLP = [f"blocks.{i}.mlp.{j}" for i in (0, 1) for j in (0, 2)]


def test_all_linear_means_every_linear_layer() -> None:
    assert sorted(adapted(Model())) == sorted([*ATTENTION, *MLP, "head.1"])


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], ["blocks.0.attn.q_proj", "blocks.1.attn.q_proj"]),
        (["blocks.1.attn.q_proj"], ["blocks.1.attn.q_proj"]),
        (
            ["attn.q_proj", "mlp.2"],
            ["blocks.0.attn.q_proj", "blocks.0.mlp.2", "blocks.1.attn.q_proj", "blocks.1.mlp.2"],
        ),
        (["[qk]_proj", "v_pro?"], [name for name in ATTENTION if "o_proj" not in name]),
        (["blocks.0.*"], [*ATTENTION[:4], *MLP[:2]]),
        (["attn.*"], ATTENTION),
        (["blocks.1.attn.q_proj.weight"], ["blocks.1.attn.q_proj"]),
        (("q_proj", "q_*"), ["blocks.0.attn.q_proj", "blocks.1.attn.q_proj"]),
        (r".*\.(q|v)_proj", [name for name in ATTENTION if name[-6] in "qv"]),
        (r"blocks\.0\.mlp\.\d", MLP[:2]),
    ],
)
def test_targets_are_names_ends_of_names_globs_or_one_regular_expression(targets: Any, expected: list[str]) -> None:
    assert adapted(Model(), targets) == expected


def test_a_name_is_matched_from_a_dot_on_never_in_the_middle_of_a_word() -> None:
    model = nn.ModuleDict({"proj": nn.Linear(2, 2), "out_proj": nn.Linear(2, 2)})
    assert adapted(model, ["proj"]) == ["proj"]


def test_exclude_modules_leaves_out_layers_and_everything_inside_a_container() -> None:
    assert adapted(Model(), exclude_modules=["blocks.0", "k_proj", "mlp.[0-2]", "head"]) == [
        f"blocks.1.attn.{name}_proj" for name in "qvo"
    ]
    assert adapted(Model(), ["q_proj"], exclude_modules=["blocks.1.attn.q_proj.weight"]) == ["blocks.0.attn.q_proj"]


def test_multihead_attention_is_linear_and_its_name_means_all_of_its_matrices() -> None:
    def model() -> nn.Module:
        return nn.ModuleDict(
            {"a": nn.MultiheadAttention(8, 2), "b": nn.MultiheadAttention(8, 2, kdim=4), "c": nn.Linear(8, 8)}
        )

    everything = ["a.in_proj_weight", "a.out_proj", "b.q_proj", "b.k_proj", "b.v_proj", "b.out_proj"]
    everything = [name + "_weight" if name[2:] in ("q_proj", "k_proj", "v_proj") else name for name in everything]
    assert adapted(model()) == [*everything, "c"]
    assert adapted(model(), ["a"]) == everything[:2]
    assert adapted(model(), "a|b") == everything
    assert adapted(model(), ["out_proj"]) == ["a.out_proj", "b.out_proj"]
    assert adapted(model(), ["b.q_proj_weight"]) == ["b.q_proj_weight"]
    assert adapted(model(), exclude_modules=["a", "b.out_proj"]) == [*everything[2:5], "c"]


def test_all_linear_leaves_out_the_output_head_that_a_transformers_model_declares() -> None:
    transformers = pytest.importorskip("transformers")
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
            tie_word_embeddings=True,
        )
    )  # fmt: skip
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    names += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    wrapped = nn.ModuleDict({"net": llama})
    assert adapted(wrapped) == [f"net.model.layers.0.{name}" for name in names]
    remove(wrapped)
    assert adapted(llama, ["lm_head"]) == ["lm_head"]


def test_a_classifiers_head_is_no_output_head() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12
    )
    assert "classifier" in adapted(transformers.BertForSequenceClassification(config))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a misspelt name": (
        {"target_modules": ["q_proj", "v_porj"]},
        "target_modules entry 'v_porj' matches nothing. Did you mean 'v_proj'",
    ),
    "a name far from all": (
        {"target_modules": ["zzzzzz"]},
        "target_modules entry 'zzzzzz' matches nothing. Names that exist: q_proj, k_proj",
    ),
    "a list without entries": (
        {"target_modules": []},
        "target_modules=[] adapts nothing: write target_modules='all-linear'",
    ),
    "all-linear in a list": ({"target_modules": ["all-linear"]}, "write target_modules='all-linear'"),
    "a container": (
        {"target_modules": ["blocks.0.attn"]},
        "matches blocks.0.attn, a Attention: for all layers inside it write 'blocks.0.attn.*'",
    ),
    "a layer without a matrix": (
        {"target_modules": ["norm"]},
        "matches blocks.0.norm, a LayerNorm, which has no matrix to adapt: layers that can be adapted are Linear, "
        "Embedding, Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d, MultiheadAttention, "
        "RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell, transformers' Conv1D, and any matrix named in "
        "full; to train it in full list it in modules_to_save",
    ),
    "a bare name as regular expression": (
        {"target_modules": "q_proj"},
        "is a regular expression for whole names and matches none; a name goes in a list: target_modules=['q_proj']",
    ),
    "a broken regular expression": ({"target_modules": "(q"}, "target_modules='(q' is not a regular expression"),
    "an exclusion that matches nothing": (
        {"exclude_modules": ["heda"]},
        "exclude_modules entry 'heda' matches nothing. Did you mean 'head'",
    ),
    "an exclusion of everything": (
        {"target_modules": ["q_proj"], "exclude_modules": ["attn"]},
        "nothing is left to adapt: target_modules=['q_proj'] chose 2 matrices, and exclude_modules=['attn']",
    ),
    "a module to save that does not exist": (
        {"modules_to_save": ["classifier"]},
        "modules_to_save entry 'classifier' matches nothing",
    ),
    "a rank for nothing": (
        {"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 4}},
        "rank_pattern entry 'v_proj' fits none of the adapted modules. Did you mean 'q_proj'",
    ),
    "an alpha for nothing": (
        {"target_modules": ["q_proj"], "alpha_pattern": {"blocks.2.*": 4.0}},
        "alpha_pattern entry 'blocks.2.*' fits none of the adapted modules",
    ),
    "a rank out of range": ({"rank_pattern": {"q_proj": 0}}, "r=0: the rank must be a whole number of at least 1"),
    "an alpha out of range": ({"alpha_pattern": {"q_proj": 0.0}}, "alpha=0.0: must be a finite number above 0"),
    "an unknown bias policy": ({"bias": "some"}, "bias='some': must be 'none', 'lora_only' or 'all'"),
    "an empty task name": ({"task": ""}, "task='': use 1 to 64 letters"),
    "a task name with a dot": ({"task": "a.b"}, "task='a.b'"),
    "a task name that is a path": ({"task": "../up"}, "task='../up'"),
    "a task name that is too long": ({"task": "a" * 65}, "use 1 to 64 letters"),
    "a task name that a module uses": ({"task": "forward"}, "task='forward'"),
    "a task name that a slot uses": ({"task": "active"}, "task='active'"),
    "a task name that every module has": ({"task": "training"}, "task='training'"),
}


def snapshot(model: nn.Module) -> list[Any]:
    """Everything about a model that an injection could change."""
    parts: list[Any] = [model.training]
    for name, module in model.named_modules():
        parts.append((name, type(module), sorted(module.__dict__), list(module._modules), module.training))
        parts += [(key, id(p), p._version, p.requires_grad) for key, p in module._parameters.items() if p is not None]
        parts += [(key, id(buffer), buffer._version) for key, buffer in module._buffers.items() if buffer is not None]
    return parts


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_meant_is_refused_by_name_and_changes_nothing(options: dict[str, Any], message: str) -> None:
    model = Model()
    before = snapshot(model)
    with pytest.raises(ValueError) as raised:
        inject(model, LoRA(r=2), **options)
    assert message in str(raised.value)
    assert snapshot(model) == before


def test_a_model_without_any_known_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"found no linear layer in Sequential: layers that can be adapted are Linear"):
        inject(nn.Sequential(nn.ReLU()), LoRA())


def test_a_layer_whose_name_adapters_is_taken_is_refused() -> None:
    class Taken(nn.Linear):
        adapters = "mine"

    model = nn.Sequential(nn.Linear(2, 2), Taken(2, 2))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"1\.weight: its module already has an attribute called 'adapters'"):
        inject(model, LoRA())
    assert snapshot(model) == before


def test_a_layer_without_a_shape_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2))
    with pytest.raises(ValueError, match="has no shape yet"):
        inject(model, LoRA())
    assert type(model[0]) is nn.Linear


def method_of(model: nn.Module, name: str) -> LoRA:
    return next(site.adapter("default").method for site in sites(model) if site.name == f"{name}.weight")


def test_the_first_pattern_that_fits_gives_rank_and_alpha() -> None:
    model = Model()
    inject(
        model,
        LoRA(r=2, alpha=4),
        ["q_proj", "k_proj", "v_proj"],
        rank_pattern={"blocks.0.attn.q_proj": 5, "q_proj": 3, "blocks.0.*": 7},
        alpha_pattern={"k_proj": 9.0},
    )
    chosen = {name: (method_of(model, name).r, method_of(model, name).alpha) for name in ATTENTION if "o_" not in name}
    assert chosen == {
        "blocks.0.attn.q_proj": (5, 4),
        "blocks.0.attn.k_proj": (7, 9.0),
        "blocks.0.attn.v_proj": (7, 4),
        "blocks.1.attn.q_proj": (3, 4),
        "blocks.1.attn.k_proj": (2, 9.0),
        "blocks.1.attn.v_proj": (2, 4),
    }
    adapter = sites(model)[0].adapter("default")
    assert [tuple(factor.shape) for factor in adapter.factors()] == [(8, 5), (5, 8)]
    assert adapter.scaling == 4 / 5


def test_a_rank_for_an_attention_goes_to_all_of_its_matrices() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8)})
    inject(model, LoRA(r=2), rank_pattern={"attn": 3})
    assert {site.name: site.adapter("default").method.r for site in sites(model)} == {
        "attn.in_proj_weight": 3,
        "attn.out_proj.weight": 3,
        "fc.weight": 2,
    }


def test_the_base_is_frozen_and_only_adapters_train() -> None:
    model = Model()
    inject(model, LoRA(r=2), ["q_proj"])
    assert trainable(model) == set()
    assert all(p.requires_grad for site in sites(model) for p in site.slot.parameters())
    assert trained_in_full(model) == set()


def test_modules_to_save_are_trained_in_full_with_their_buffers_and_not_adapted() -> None:
    model = Model()
    names = adapted(model, modules_to_save=["head", "blocks.1.mlp"])
    assert sorted(names) == sorted([*ATTENTION, *MLP[:2]])
    full = {f"head.0.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    full |= {f"{name}.{kind}" for name in ("head.1", *MLP[2:]) for kind in ("weight", "bias")}
    assert trained_in_full(model) == full
    assert trainable(model) == {name for name in full if name.endswith(("weight", "bias"))}


def test_a_single_parameter_can_be_trained_in_full() -> None:
    model = Model()
    names = adapted(model, modules_to_save=["cls_token", "blocks.0.attn.q_proj.weight"])
    assert "blocks.0.attn.q_proj" not in names
    assert "blocks.1.attn.q_proj" in names
    assert trained_in_full(model) == trainable(model) == {"cls_token", "blocks.0.attn.q_proj.weight"}


def test_what_is_trained_in_full_is_still_known_after_it_was_frozen_and_copied() -> None:
    model = Model()
    inject(model, LoRA(r=2), ["q_proj"], modules_to_save=["head.1"])
    model.requires_grad_(False)
    assert trained_in_full(copy.deepcopy(model)) == {"head.1.weight", "head.1.bias"}
    remove(model)
    assert trained_in_full(model) == set()


def test_users_modules_called_adapters_are_theirs() -> None:
    model = nn.ModuleDict({"adapters": nn.ModuleList([nn.Linear(2, 2)]), "fc": nn.Linear(2, 2)})
    inject(model, LoRA(r=1), ["fc"], modules_to_save=["adapters.0"])
    assert trained_in_full(model) == {"adapters.0.weight", "adapters.0.bias"}
    assert own_entries(model) == {
        "adapters.0.weight",
        "adapters.0.bias",
        "fc.adapters.weight.default.lora_A",
        "fc.adapters.weight.default.lora_B",
    }


@pytest.mark.parametrize(
    ("bias", "expected"),
    [
        ("none", set()),
        ("lora_only", {"blocks.0.attn.q_proj.bias", "blocks.1.attn.q_proj.bias"}),
        ("all", {name for name, _ in Model().named_parameters() if name.endswith("bias")}),
    ],
)
def test_the_bias_policy_says_which_biases_train(bias: Any, expected: set[str]) -> None:
    model = Model()
    inject(model, LoRA(r=2), ["q_proj", "k_proj"], bias=bias)
    assert trainable(model) == trained_in_full(model) == expected


def test_lora_only_means_all_biases_of_an_adapted_attention() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, add_bias_kv=True), "fc": nn.Linear(8, 8)})
    inject(model, LoRA(r=2), ["attn"], bias="lora_only")
    assert trainable(model) == {"attn.in_proj_bias", "attn.out_proj.bias", "attn.bias_k", "attn.bias_v"}


def test_injecting_the_same_again_changes_nothing() -> None:
    model = Model()
    options = {"target_modules": ["q_proj"], "rank_pattern": {"blocks.0.*": 3}, "modules_to_save": ["head"], "seed": 1}
    first = inject(model, LoRA(r=2), **options)
    change(model)
    before = snapshot(model)
    assert inject(model, LoRA(r=2), **(options | {"seed": 2})) == first
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (LoRA(r=3), {}),
        (LoRA(r=2, alpha=3), {}),
        (LoRA(r=2, dropout=0.1), {"target_modules": ["v_proj"]}),
        (LoRA(r=2, scaling="rsqrt"), {"target_modules": ["v_proj"]}),
    ],
)
def test_another_configuration_under_the_same_task_is_refused(method: LoRA, options: Mapping[str, Any]) -> None:
    model = Model()
    inject(model, LoRA(r=2), ["q_proj"])
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"already .* with LoRA.*call remove.*or give another task name"):
        inject(model, method, **({"target_modules": ["q_proj"]} | options))
    assert snapshot(model) == before


def test_a_task_may_grow_with_more_layers_and_other_ranks() -> None:
    model = Model()
    inject(model, LoRA(r=2), ["q_proj"])
    assert len(inject(model, LoRA(r=4), ["v_proj"])) == 4
    assert method_of(model, "blocks.0.attn.v_proj").r == 4


def test_tasks_live_side_by_side_and_the_last_is_in_use() -> None:
    model = Model()
    x = IDS
    model.eval()
    base = model(x)
    inject(model, LoRA(r=2), ["q_proj"], task="one", modules_to_save=["head"])
    change(model, "one")
    one = model(x)
    inject(model, LoRA(r=3, dropout=0.5), ["q_proj", "v_proj"], task="two")
    assert torch.allclose(model(x), base, atol=1e-6)
    change(model, "two")
    two = model(x)
    assert [site.name for site in sites(model, "one")] == ["blocks.0.attn.q_proj.weight", "blocks.1.attn.q_proj.weight"]
    assert len(sites(model, "two")) == len(sites(model)) == 4
    assert "head.1.weight" in trainable(model)
    use(model, "one")
    assert torch.equal(model(x), one)
    with using(model, "two"):
        assert torch.equal(model(x), two)
        with using(model):
            assert torch.allclose(model(x), base, atol=1e-6)
    assert torch.equal(model(x), one)
    remove(model, "one")
    use(model, "two")
    assert torch.equal(model(x), two)
    assert {site.name for site in sites(model)} == {site.name for site in sites(model, "two")}
    with pytest.raises(ValueError, match="task='one': the model has no adapter of that name"):
        remove(model, "one")
    remove(model, "two")
    assert [type(m) for m in model.modules()] == [type(m) for m in Model().modules()]


def test_using_an_unknown_task_is_refused_and_changes_nothing() -> None:
    model = Model()
    inject(model, LoRA(r=2), ["q_proj"])
    with pytest.raises(ValueError, match=r"task='other': the model has no adapter of that name; it has \['default'\]"):
        use(model, "other")
    assert sites(model)[0].slot.active == ("default",)


def test_a_task_named_twice_is_used_once() -> None:
    model = Model().eval()
    inject(model, LoRA(r=2), ["q_proj"])
    change(model)
    once = model(IDS)
    use(model, "default", "default")
    assert torch.equal(model(IDS), once)


def test_using_is_undone_by_an_exception() -> None:
    model = Model()
    inject(model, LoRA(r=2), ["q_proj"])
    with pytest.raises(KeyError), using(model):
        raise KeyError
    assert sites(model)[0].slot.active == ("default",)


def shared() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.ModuleDict({"left": nn.Sequential(layer), "right": nn.Sequential(layer)})


@pytest.mark.parametrize("target", ["left.0", "right.0", "right.*"])
def test_a_module_under_two_names_is_adapted_once_and_known_by_both(target: str) -> None:
    model = shared()
    assert adapted(model, [target], rank_pattern={"right.0": 3}) == ["left.0"]
    change(model)
    x = torch.randn(2, 4)
    assert torch.equal(model["left"](x), model["right"](x))
    expected = model["right"](x)
    merge_(model)
    assert torch.allclose(model["right"](x), expected, atol=1e-6)


def tied() -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(4, 4), "head": nn.Linear(4, 4, bias=False), "fc": nn.Linear(4, 4)})
    model["head"].weight = model["embed"].weight
    return model


def test_merging_into_a_tied_weight_is_refused_with_both_names() -> None:
    model = tied()
    inject(model, LoRA(r=2), ["fc", "head"])
    change(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"cannot merge into head.weight: it is tied to embed.weight, which would"):
        merge_(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model["head"].weight is model["embed"].weight


def test_a_tie_within_one_module_counts_too() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 1, kdim=4, vdim=3)})
    model["attn"].k_proj_weight = model["attn"].q_proj_weight
    inject(model, LoRA(r=2), ["attn.q_proj_weight"])
    with pytest.raises(ValueError, match="it is tied"):
        merge_(model)


def test_tied_weights_stay_tied_and_other_layers_merge() -> None:
    model = tied()
    inject(model, LoRA(r=2), ["fc"])
    merge_(model)
    assert model["head"].weight is model["embed"].weight


def test_merging_twice_or_without_adapters_is_refused() -> None:
    model = Model()
    with pytest.raises(ValueError, match="nothing to merge: Model has no adapters"):
        merge_(model)
    inject(model, LoRA(r=2), ["q_proj"])
    with merged(model):
        with pytest.raises(RuntimeError, match="cannot merge again while the adapters are merged"):
            merge_(model)
        with pytest.raises(RuntimeError, match="leave `merged\\(model\\)` first"), merged(model):
            pass
        assert sites(model)[0].slot.merged
    assert not sites(model)[0].slot.merged


def test_removing_adapters_while_merged_still_restores_the_base() -> None:
    model = Model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inject(model, LoRA(r=2))
    change(model)
    with merged(model):
        remove(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_only_the_adapters_in_use_are_merged() -> None:
    model = Model().eval()
    inject(model, LoRA(r=2), ["q_proj"], task="one")
    change(model, "one")
    expected = model(IDS)
    inject(model, LoRA(r=2), ["v_proj"], task="two")
    change(model, "two")
    use(model, "one")
    merge_(model)
    assert torch.allclose(model(IDS), expected, atol=1e-6)


def factor_values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if ".adapters." in name}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_factors_are_drawn_from_seed_and_name_alone() -> None:
    model, in_pieces = Model(), Model()
    inject(model, LoRA(r=2), ["q_proj", "v_proj"], seed=1)
    torch.manual_seed(99)
    inject(in_pieces, LoRA(r=2), ["v_proj"], seed=1)
    torch.rand(3)
    inject(in_pieces, LoRA(r=2), ["q_proj"], seed=1)
    expected = factor_values(model)
    assert same(factor_values(in_pieces), expected)
    other_seed = Model()
    inject(other_seed, LoRA(r=2), ["q_proj", "v_proj"], seed=2)
    assert not any(torch.equal(a, expected[n]) for n, a in factor_values(other_seed).items() if n.endswith("lora_A"))
    drawn = [tensor for name, tensor in expected.items() if name.endswith("q_proj.adapters.weight.default.lora_A")]
    assert not torch.equal(*drawn)


def test_without_a_seed_pytorchs_own_decides_and_is_not_used_up() -> None:
    torch.manual_seed(5)
    first, second = Model(), Model()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    inject(first, LoRA(r=2))
    assert torch.equal(torch.get_rng_state(), state)
    inject(second, LoRA(r=2), seed=5)
    assert same(factor_values(first), factor_values(second))


def test_factors_do_not_depend_on_the_device_or_dtype_that_they_are_made_in() -> None:
    expected, wide, narrow = Model(), Model().double(), Model()
    inject(expected, LoRA(r=2), seed=1)
    inject(wide, LoRA(r=2), seed=1)
    inject(narrow, LoRA(r=2), seed=1, dtype=torch.bfloat16)
    with torch.device("meta"):
        elsewhere = Model()
    inject(elsewhere, LoRA(r=2), seed=1)
    elsewhere.to_empty(device="cpu")
    values = factor_values(expected)
    assert same(factor_values(elsewhere), values)
    assert same(factor_values(wide), {name: tensor.double() for name, tensor in values.items()})
    assert same(factor_values(narrow), {name: tensor.bfloat16() for name, tensor in values.items()})


def test_a_drawn_factor_is_uniform_as_a_linear_layers_weight() -> None:
    model = nn.Sequential(nn.Linear(400, 50))
    inject(model, LoRA(r=50), seed=1)
    drawn = model[0].adapters["weight"]["default"].lora_A
    bound = 1 / 400**0.5
    assert drawn.abs().max() <= bound
    assert abs(drawn.var().item() / (bound**2 / 3) - 1) < 0.05
    assert not model[0].adapters["weight"]["default"].lora_B.any()


def test_adapters_are_in_the_mode_of_their_layer() -> None:
    model = Model()
    model.blocks[0].eval()
    inject(model, LoRA(r=2, dropout=0.5), ["q_proj"])
    assert [site.slot["default"].training for site in sites(model)] == [False, True]


def test_dropout_touches_the_adapters_path_only_and_only_in_training() -> None:
    model = nn.Sequential(nn.Linear(64, 3))
    x = torch.ones(1, 64)
    base = model(x)
    inject(model, LoRA(r=2, dropout=0.5))
    assert torch.equal(model(x), base)
    change(model)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r=0"),
        ({"r": 1.5}, "r=1.5"),
        ({"r": True}, "r=True"),
        ({"alpha": 0}, "alpha=0"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"scaling": "sqrt"}, "scaling='sqrt'"),
    ],
)
def test_hyperparameters_out_of_range_are_refused_where_they_are_written(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRA(**options)


def test_a_compiled_model_is_adapted_under_its_own_names() -> None:
    model = Model()
    compiled = torch.compile(model, backend="eager")
    assert adapted(compiled, ["blocks.0.attn.q_proj"]) == ["blocks.0.attn.q_proj"]
    assert [site.name for site in sites(compiled)] == [site.name for site in sites(model)]


def stack(layers: int, shapes: Mapping[str, tuple[int, int]]) -> nn.Module:
    """Layers of (in, out) matrices by name, without any memory."""
    make = {name: (lambda shape=shape: nn.Linear(*shape, device="meta")) for name, shape in shapes.items()}
    return nn.ModuleList([nn.ModuleDict({name: build() for name, build in make.items()}) for _ in range(layers)])


def square(width: int, names: str) -> dict[str, tuple[int, int]]:
    return dict.fromkeys(names, (width, width))


def llama(width: int, keys: int, inner: int, mlp: tuple[str, ...] = ("gate", "up", "down"), o: bool = True) -> Any:
    shapes = {"q": (width, width), "k": (width, keys), "v": (width, keys)} | ({"o": (width, width)} if o else {})
    return shapes | {name: (inner, width) if name == "down" else (width, inner) for name in mlp}


COUNTS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "RoBERTa-base": (lambda: stack(12, square(768, "qv")), 8, 294_912),
    "RoBERTa-large": (lambda: stack(24, square(1024, "qv")), 8, 786_432),
    "DeBERTa-XXL": (lambda: stack(48, square(1536, "qv")), 16, 4_718_592),
    "GPT-2 medium": (lambda: stack(24, square(1024, "qv")), 4, 393_216),
    "GPT-2 large": (lambda: stack(36, square(1280, "qv")), 4, 737_280),
    "GPT-3, rank 1": (lambda: stack(96, square(12288, "qv")), 1, 4_718_592),
    "GPT-3, rank 2": (lambda: stack(96, square(12288, "qv")), 2, 9_437_184),
    "GPT-3, rank 4": (lambda: stack(96, square(12288, "qv")), 4, 18_874_368),
    "GPT-3, rank 8": (lambda: stack(96, square(12288, "qv")), 8, 37_748_736),
    "GPT-3, rank 64": (lambda: stack(96, square(12288, "qv")), 64, 301_989_888),
    "GPT-3, one matrix": (lambda: stack(96, square(12288, "q")), 8, 18_874_368),
    "GPT-3, four matrices": (lambda: stack(96, square(12288, "qkvo")), 2, 18_874_368),
    "ViT-B": (lambda: stack(12, square(768, "qv")), 8, 294_912),
    "ViT-L": (lambda: stack(24, square(1024, "qv")), 8, 786_432),
    "LLaMA-7B, all seven": (lambda: stack(32, llama(4096, 4096, 11008)), 64, 159_907_840),
    "LLaMA-13B, all seven": (lambda: stack(40, llama(5120, 5120, 13824)), 64, 250_347_520),
    "LLaMA-7B, five": (lambda: stack(32, llama(4096, 4096, 11008, ("up", "down"), o=False)), 32, 56_098_816),
    "LLaMA-13B, five": (lambda: stack(40, llama(5120, 5120, 13824, ("up", "down"), o=False)), 32, 87_818_240),
    "LLaMA3-8B, five": (lambda: stack(32, llama(4096, 1024, 14336, ("up", "down"), o=False)), 32, 56_623_104),
    "Llama-3.2-3B, rank 32": (lambda: stack(28, {"q": (3072, 3072), "v": (3072, 1024)}), 32, 9_175_040),
    "Llama-3.2-3B, rank 64": (lambda: stack(28, {"q": (3072, 3072), "v": (3072, 1024)}), 64, 18_350_080),
}


@pytest.mark.parametrize(("build", "r", "count"), COUNTS.values(), ids=COUNTS)
def test_parameter_counts_are_those_of_the_papers(build: Callable[[], nn.Module], r: int, count: int) -> None:
    model = build()
    inject(model, LoRA(r=r))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_a_7b_llama_of_transformers_has_the_papers_count_and_needs_no_memory() -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig())
    base = sum(p.numel() for p in model.parameters())
    found = inject(model, LoRA(r=64))
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (len(found), base, count) == (7 * 32, 6_738_415_616, 159_907_840)
    assert round(100 * count / (base + count), 3) == 2.318
    assert all(p.is_meta for p in model.parameters())


def test_a_roberta_of_transformers_has_the_papers_count() -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.RobertaForSequenceClassification(
            transformers.RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=3)
        )
    assert sum(p.numel() for p in model.parameters()) == 124_647_939
    inject(model, LoRA(r=8), ["query", "value"], bias="lora_only")
    ours = sum(p.numel() for site in sites(model) for p in site.slot.parameters())
    assert ours == 294_912
    assert sum(p.numel() for name, p in model.named_parameters() if name in trained_in_full(model)) == 18_432
