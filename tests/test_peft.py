"""PEFT is the independent reference: the same factors compute the same in both, and both read what either wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from lightning_lora import AdapterError, LoRA, inject, load_adapter, merge_, save_adapter, sites
from lightning_lora.state import trained_in_full

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
import transformers  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # PEFT asks it


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8, bias=False))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.encoder(x)))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attn(x, x, x, need_weights=False)[0])


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=13, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=13, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Case(NamedTuple):
    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    targets: list[str]
    ours: Mapping[str, Any] = MappingProxyType({})
    theirs: Mapping[str, Any] = MappingProxyType({})
    method: LoRA = LoRA(r=2, alpha=6)


IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
CASES: dict[str, Case] = {
    "mlp": Case(Mlp, lambda: draw(4, 6), ["encoder.0", "encoder.2", "head"]),
    "mlp, scaled by the root of r": Case(
        Mlp, lambda: draw(4, 6), ["encoder.0", "head"], method=LoRA(r=3, alpha=5, scaling="rsqrt")
    ),
    "mlp, other ranks and alphas": Case(
        Mlp,
        lambda: draw(4, 6),
        ["encoder.0", "encoder.2", "head"],
        {"rank_pattern": {"encoder.0": 3, "head": 1}, "alpha_pattern": {"encoder.2": 9.0, "head": 1.5}},
        {"rank_pattern": {"encoder.0": 3, "head": 1}, "alpha_pattern": {"encoder.2": 9.0, "head": 1.5}},
    ),
    "mlp with the biases of adapted layers": Case(
        Mlp, lambda: draw(4, 6), ["encoder.0", "encoder.2"], {"bias": "lora_only"}, {"bias": "lora_only"}
    ),
    "mlp with all biases": Case(Mlp, lambda: draw(4, 6), ["encoder.0"], {"bias": "all"}, {"bias": "all"}),
    "mlp with a head trained in full": Case(
        Mlp, lambda: draw(4, 6), ["encoder.0"], {"modules_to_save": ["head"]}, {"modules_to_save": ["head"]}
    ),
    "bert": Case(
        bert, lambda: IDS, ["query", "value", "dense"],
        {"exclude_modules": ["pooler"]}, {"exclude_modules": "bert.pooler.dense"},
    ),
    "bert with a classifier trained in full": Case(
        bert, lambda: IDS, ["query", "value"], {"modules_to_save": ["classifier"]}, {"modules_to_save": ["classifier"]}
    ),
    "bert with all biases": Case(bert, lambda: IDS, ["query"], {"bias": "all"}, {"bias": "all"}),
    "llama": Case(llama, lambda: IDS, ["q_proj", "v_proj", "gate_proj", "down_proj"]),
    "llama, other ranks and alphas": Case(
        llama,
        lambda: IDS,
        ["q_proj", "v_proj", "o_proj"],
        {"rank_pattern": {"layers.0.*": 3, "v_proj": 1}, "alpha_pattern": {"layers.1.self_attn.q_proj": 9.0}},
        {"rank_pattern": {r".*layers\.0\..*": 3, "v_proj": 1}, "alpha_pattern": {"layers.1.self_attn.q_proj": 9.0}},
    ),
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def base(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.build().double().eval()


def with_ours(case: Case) -> nn.Module:
    model = base(case)
    inject(model, case.method, case.targets, **case.ours)
    return model


def with_theirs(case: Case) -> nn.Module:
    config = peft.LoraConfig(
        r=case.method.r,
        lora_alpha=case.method.alpha,
        use_rslora=case.method.scaling == "rsqrt",
        target_modules=case.targets,
        **case.theirs,
    )
    model = peft.get_peft_model(base(case), config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.double()
    return model.eval()


@torch.no_grad()
def change(model: nn.Module) -> None:
    """Move everything that is trained, alike in both libraries: they have the same order of modules."""
    generator = torch.Generator().manual_seed(2)
    trained = sorted(
        (neutral(name), parameter) for name, parameter in model.named_parameters() if parameter.requires_grad
    )
    for _, parameter in trained:
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def neutral(name: str) -> str:
    """The name of a trained parameter without what either library puts into it."""
    name = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "").replace(".base_layer", "")
    for factor in ("lora_A", "lora_B"):
        name = name.replace(f".{factor}.default.weight", f".{factor}")
        for parameter in ("weight", "in_proj_weight"):
            name = name.replace(f".adapters.{parameter}.default.{factor}", f".{factor}")
    return name


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {neutral(name): p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {neutral(name): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def take_over(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(values[neutral(name)])


def logits(model: nn.Module, case: Case) -> Tensor:
    outputs = model(case.inputs())
    return outputs if isinstance(outputs, Tensor) else outputs.logits


def close(one: Any, other: Any, tolerance: float = 1e-12) -> bool:
    if isinstance(one, Tensor):
        return torch.allclose(one, other, rtol=0, atol=tolerance)
    return one.keys() == other.keys() and all(close(one[name], other[name], tolerance) for name in one)


def both(case: Case) -> tuple[nn.Module, nn.Module]:
    """Ours and theirs on the same base with the same values in everything that is trained."""
    ours, theirs = with_ours(case), with_theirs(case)
    change(ours)
    take_over(theirs, trained(ours))
    return ours, theirs


@every_case
def test_the_same_factors_give_the_same_outputs_gradients_and_steps(case: Case) -> None:
    ours, theirs = both(case)
    assert not close(logits(ours, case), logits(base(case), case))
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            logits(model, case).square().sum().backward()
            optimizer.step()
    assert close(gradients(ours), gradients(theirs), 1e-9)
    assert close(trained(ours), trained(theirs), 1e-9)
    assert close(logits(ours, case), logits(theirs, case), 1e-9)
    ours, theirs = both(case)
    assert close(logits(ours, case), logits(theirs, case))
    for model in (ours, theirs):
        logits(model, case).square().sum().backward()
    assert close(gradients(ours), gradients(theirs), 1e-10)


@every_case
def test_merged_weights_are_the_same(case: Case) -> None:
    ours, theirs = both(case)
    assert close(merge_(ours).state_dict(), theirs.merge_and_unload().state_dict())


@every_case
def test_peft_loads_what_is_saved(case: Case, tmp_path: Path) -> None:
    ours = with_ours(case)
    change(ours)
    save_adapter(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base(case), tmp_path / "adapter", autocast_adapter_dtype=False)
    assert close(logits(theirs.eval(), case), logits(ours, case), 1e-6)
    assert close(logits(theirs.double(), case), logits(ours, case))


@every_case
def test_what_peft_saved_is_loaded(case: Case, tmp_path: Path) -> None:
    theirs = with_theirs(case)
    change(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = base(case)
    load_adapter(ours, tmp_path / "adapter")
    assert close(logits(ours, case), logits(theirs, case))
    ours = with_ours(case)
    load_adapter(ours, tmp_path / "adapter")
    assert close(trained(ours), trained(theirs))


ATTENDING = Case(Attending, lambda: draw(2, 4, 8), ["attn", "head"])
ATTENDING_OTHERWISE = ATTENDING._replace(
    ours={"rank_pattern": {"attn": 3}, "alpha_pattern": {"attn": 7.0}},
    theirs={"rank_pattern": {"attn": 3}, "alpha_pattern": {"attn": 7.0}},
)
every_attention = pytest.mark.parametrize(
    "case", [ATTENDING, ATTENDING_OTHERWISE], ids=["attention", "attention, other rank and alpha"]
)


@pytest.fixture
def adding_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT up to 0.21.2 adds the change of out_proj twice (huggingface/peft#3774); take one of the two off."""
    layer = peft.tuners.lora.layer.MultiheadAttention
    merge, unmerge = layer.merge, layer.unmerge
    theirs = with_theirs(ATTENDING)
    change(theirs)
    out = theirs.base_model.model.attn.base_layer.out_proj
    expected = out.get_base_layer().weight + out.get_delta_weight("default")
    if close(theirs.merge_and_unload().attn.out_proj.weight, expected):
        return

    def add(module: Any, sign: int, names: list[str]) -> None:
        out = module.base_layer.out_proj
        for name in names:
            out.get_base_layer().weight.data.add_(out.get_delta_weight(name).detach(), alpha=sign)

    def merge_once(module: Any, *args: Any, **kwargs: Any) -> None:
        merge(module, *args, **kwargs)
        add(module, -1, module.base_layer.out_proj.merged_adapters)

    def unmerge_once(module: Any) -> None:
        names = list(module.base_layer.out_proj.merged_adapters)
        unmerge(module)
        add(module, 1, names)

    monkeypatch.setattr(layer, "merge", merge_once)
    monkeypatch.setattr(layer, "unmerge", unmerge_once)


@every_attention
@pytest.mark.usefixtures("adding_once")
def test_attention_gives_the_same_outputs_gradients_and_merged_weights(case: Case) -> None:
    ours, theirs = both(case)
    assert close(logits(ours, case), logits(theirs, case))
    for model in (ours, theirs):
        logits(model, case).square().sum().backward()
    assert close(gradients(ours), gradients(theirs), 1e-10)
    assert close(merge_(ours).state_dict(), theirs.merge_and_unload().state_dict())


@every_attention
def test_attention_that_peft_trained_computes_here_as_it_did_there(case: Case, tmp_path: Path) -> None:
    theirs = with_theirs(case)
    change(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = base(case)
    load_adapter(ours, tmp_path / "adapter")
    assert close(logits(ours, case), logits(theirs, case))


def test_attention_from_a_peft_that_adds_once_is_added_once(tmp_path: Path) -> None:
    theirs = with_theirs(ATTENDING)
    change(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    alphas = {}
    for version in ("0.21.2", "0.21.3.dev0", "0.22.0", None):
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"peft_version": version}))
        found = load_adapter(base(ATTENDING), tmp_path / "adapter")
        alphas[version] = {site.name: site.adapter("default").method.alpha for site in found}
    once = {"attn.in_proj_weight": 6, "attn.out_proj.weight": 6, "head.weight": 6}
    twice = once | {"attn.out_proj.weight": 12}
    assert alphas == {"0.21.2": twice, "0.21.3.dev0": once, "0.22.0": once, None: twice}


@every_case
def test_tensors_have_the_names_that_peft_gives_them(case: Case, tmp_path: Path) -> None:
    save_adapter(with_ours(case), tmp_path / "ours")
    with_theirs(case).save_pretrained(tmp_path / "theirs")
    ours, theirs = (
        safetensors.torch.load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")
    )
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in theirs.items()}


class Nested(nn.Module):
    """The same last names at three depths."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.sq = nn.Linear(4, 4), nn.Linear(4, 4)
        self.x = nn.ModuleDict({"q": nn.Linear(4, 4)})
        self.y = nn.ModuleDict({"x": nn.ModuleDict({"q": nn.Linear(4, 4)})})
        self.heads = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.token = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.q, self.sq, self.x["q"], self.y["x"]["q"], *self.heads):
            x = torch.tanh(layer(x)) + self.token
        return x


NESTED = Case(Nested, lambda: draw(3, 4), [])


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("q", ["q"]),
        (r"x\.q", ["x.q"]),
        (r"q|y\.x\.q", ["q", "y.x.q"]),
        (["q"], ["q", "x.q", "y.x.q"]),
        (["y.x.q", "sq"], ["sq", "y.x.q"]),
    ],
)
def test_peft_finds_exactly_the_modules_that_were_adapted(targets: Any, expected: list[str], tmp_path: Path) -> None:
    ours = base(NESTED)
    inject(ours, LoRA(r=2), targets, rank_pattern={expected[0]: 3})
    assert [site.name for site in sites(ours)] == [f"{name}.weight" for name in expected]
    change(ours)
    save_adapter(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base(NESTED), tmp_path / "adapter", autocast_adapter_dtype=False).double()
    assert close(logits(theirs, NESTED), logits(ours, NESTED))
    adapted = {name for name, module in theirs.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {f"base_model.model.{name}" for name in expected}


def test_peft_loads_the_trained_members_of_a_list(tmp_path: Path) -> None:
    ours = base(NESTED)
    inject(ours, LoRA(r=2), ["sq"], modules_to_save=["heads"])
    change(ours)
    save_adapter(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base(NESTED), tmp_path / "adapter", autocast_adapter_dtype=False).double()
    assert close(logits(theirs, NESTED), logits(ours, NESTED))


class SeparateAttending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x[..., :6], x[..., :4], need_weights=False)[0]


BEYOND_PEFT: dict[str, tuple[Case, dict[str, Any], str]] = {
    "attention": (ATTENDING, {"target_modules": ["attn", "head"]}, "out_proj twice"),
    "an attention's out_proj alone": (ATTENDING, {"target_modules": ["out_proj"]}, "out_proj twice"),
    "an attention's in_proj alone": (ATTENDING, {"target_modules": ["in_proj_weight"]}, "attn.in_proj_weight"),
    "an attention's biases": (ATTENDING, {"target_modules": ["attn"], "bias": "lora_only"}, "out_proj twice"),
    "separate projections": (
        ATTENDING._replace(build=SeparateAttending),
        {"target_modules": ["q_proj_weight", "v_proj_weight"]},
        "PEFT has no adapter for MultiheadAttention.q_proj_weight: attn.q_proj_weight",
    ),
    "an attention's own biases in full": (
        ATTENDING,
        {"target_modules": ["head"], "modules_to_save": ["attn.in_proj_bias"]},
        "PEFT cannot train attn.in_proj_bias in full without the rest of its module",
    ),
    "a parameter in full": (
        NESTED,
        {"target_modules": ["sq"], "modules_to_save": ["token"]},
        "PEFT cannot train token in full without the rest of its module",
    ),
    "a module in full whose name ends another's": (
        NESTED,
        {"target_modules": ["heads.0"], "modules_to_save": ["q"]},
        "PEFT would train sq in full as well, because it ends like q",
    ),
    "a network that is one layer": (
        Case(lambda: nn.Linear(4, 3), lambda: draw(2, 4), []),
        {"bias": "all"},
        "not a network that is one layer",
    ),
}


@pytest.mark.parametrize(("case", "options", "reason"), BEYOND_PEFT.values(), ids=BEYOND_PEFT)
def test_what_peft_cannot_express_is_no_peft_file_and_still_loads_here(
    case: Case, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    ours = base(case)
    inject(ours, LoRA(r=2, alpha=6), **options)
    change(ours)
    save_adapter(ours, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LIGHTNING_LORA"
    with safetensors.safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert reason in json.loads(file.metadata()["lightning_lora"])["not_for_peft"]
    with pytest.raises((KeyError, ValueError, TypeError)):
        peft.PeftModel.from_pretrained(base(case), tmp_path / "adapter")
    fresh = base(case)
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh, case), logits(ours, case))
    assert trained_in_full(fresh) == trained_in_full(ours)
    assert close(trained(fresh), trained(ours), 0)


def test_peft_bias_and_full_modules_together_are_loaded(tmp_path: Path) -> None:
    case = CASES["mlp with a head trained in full"]
    case = case._replace(theirs={"bias": "all", "modules_to_save": ["head"]})
    theirs = with_theirs(case)
    change(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = base(case)
    load_adapter(ours, tmp_path / "adapter")
    assert close(logits(ours, case), logits(theirs, case))
    assert trained_in_full(ours) == {"encoder.0.bias", "norm.bias", "head.weight", "head.bias"}


def test_peft_adapters_of_other_names_lie_in_sub_folders(tmp_path: Path) -> None:
    case = CASES["mlp"]
    theirs = with_theirs(case)
    theirs.add_adapter("second", peft.LoraConfig(r=3, target_modules=["head"]))
    theirs.set_adapter("second")
    theirs.double()
    change(theirs)
    theirs.save_pretrained(tmp_path / "adapter", selected_adapters=["second"])
    ours = base(case)
    assert [site.name for site in load_adapter(ours, tmp_path / "adapter", task="second")] == ["head.weight"]
    assert close(logits(ours, case), logits(theirs, case))
    (tmp_path / "adapter" / "second").rename(tmp_path / "adapter" / "first")
    theirs.save_pretrained(tmp_path / "adapter", selected_adapters=["second"])
    with pytest.raises(AdapterError, match=r"two of its folders adapt head\.weight: load one of them"):
        load_adapter(base(case), tmp_path / "adapter")


@pytest.mark.parametrize(
    "options",
    [
        {"lora_bias": True},
        {"trainable_token_indices": [1]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
    ],
)
def test_variants_that_compute_something_else_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    case = CASES["mlp"]
    with_theirs(case).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
    ((option, value),) = options.items()
    with pytest.raises(AdapterError, match=f"{option}={re.escape(repr(value))}"):
        load_adapter(base(case), tmp_path / "adapter")


def test_other_kinds_of_peft_adapters_are_refused(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(base(CASES["mlp"]), peft.IA3Config(target_modules=["head"], feedforward_modules=[]))
    theirs.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="peft_type='IA3' is not supported; known: "):
        load_adapter(base(CASES["mlp"]), tmp_path / "adapter")


def test_half_precision_factors_become_full_precision_adapters(tmp_path: Path) -> None:
    case = CASES["mlp"]
    theirs = with_theirs(case)
    change(theirs)
    theirs.bfloat16().save_pretrained(tmp_path / "adapter")
    ours = base(case).float()
    load_adapter(ours, tmp_path / "adapter")
    assert {p.dtype for site in sites(ours) for p in site.slot.parameters()} == {torch.float32}
    assert close(trained(ours), {name: value.float() for name, value in trained(theirs).items()}, 0)


def test_an_adapter_of_ours_survives_a_trip_through_peft(tmp_path: Path) -> None:
    case = CASES["llama, other ranks and alphas"]
    ours = with_ours(case)
    change(ours)
    save_adapter(ours, tmp_path / "one")
    theirs = peft.PeftModel.from_pretrained(base(case), tmp_path / "one", autocast_adapter_dtype=False)
    theirs.save_pretrained(tmp_path / "two")
    back = base(case)
    load_adapter(back, tmp_path / "two")
    assert close(logits(back, case), logits(ours, case))
    assert {site.name: site.adapter("default").method for site in sites(back)} == {
        site.name: site.adapter("default").method for site in sites(ours)
    }
