"""VeRA: vectors trained between one frozen pair of random matrices, which is the same object at every layer."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import safetensors.torch
import torch
from conftest import Lit, loader
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import (
    AdapterError,
    LoRA,
    LoRACallback,
    VeRA,
    inject,
    load_adapter,
    load_from_checkpoint,
    merge_,
    merged,
    offline,
    param_groups,
    remove,
    save_adapter,
    sites,
    use,
)
from lightning_lora.files import read_tensors, to_bytes
from lightning_lora.methods.vera import Projections, VeRAAdapter

peft = pytest.importorskip("peft")

SHAPES = {"first": (9, 6), "second": (4, 9), "third": (7, 4)}  # (out, in): no layer has both of the largest sizes


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 9)
        self.second = nn.Linear(9, 4, bias=False)
        self.third = Conv1D(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(7)
    return Net().to(dtype)


def adapted(method: VeRA | None = None, dtype: torch.dtype = torch.float64, start: bool = False) -> Net:
    model = net(dtype)
    inject(model, method or VeRA(r=5))
    if not start:
        change(model)
    return model


def change(model: nn.Module, task: str = "default", seed: int = 2) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in adapters(model, task):
            for parameter in (one.vera_lambda_d, one.vera_lambda_b):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def adapters(model: nn.Module, task: str = "default") -> list[VeRAAdapter]:
    return [site.adapter(task) for site in sites(model, task)]


def pairs(model: nn.Module) -> set[int]:
    return {id(module) for module in model.modules() if isinstance(module, Projections)}


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# --- the formula


def test_forward_is_the_formula_of_the_paper_in_every_layer() -> None:
    model, plain, x = adapted(), net(), draw(3, 6)
    for name, site in zip(SHAPES, sites(model), strict=True):
        one, (out, into) = site.adapter("default"), SHAPES[name]
        A, B = one.shared.vera_A[:, :into], one.shared.vera_B[:out]
        change = torch.diag(one.vera_lambda_b) @ B @ torch.diag(one.vera_lambda_d) @ A
        weight = getattr(plain, name).weight
        weight.data += change.T if name == "third" else change
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-13)


def test_the_pair_is_uniform_in_kaimings_bounds_drawn_a_then_b_as_large_as_the_largest_layers() -> None:
    pair = adapters(adapted(VeRA(r=5, projection_seed=3), torch.float32))[0].shared
    generator = torch.Generator().manual_seed(3)
    for parameter, shape, fan_in in ((pair.vera_A, (5, 9), 9), (pair.vera_B, (9, 5), 5)):
        bound = (6 / fan_in) ** 0.5
        assert torch.equal(parameter, torch.empty(shape).uniform_(-bound, bound, generator=generator))


def test_trainable_are_out_plus_r_numbers_for_every_layer_and_nothing_else() -> None:
    model = adapted()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(out + 5 for out, _ in SHAPES.values())


def test_a_fresh_adapter_changes_no_bit_of_the_output() -> None:
    x = draw(3, 6).float()
    assert torch.equal(adapted(dtype=torch.float32, start=True)(x), net(torch.float32).requires_grad_(False)(x))


def test_d_starts_at_its_value_and_gets_no_gradient_in_the_first_step_while_b_starts_at_zero_and_does() -> None:
    model = adapted(VeRA(r=5, d_init=0.25), start=True)
    model(draw(3, 6)).square().sum().backward()
    for one in adapters(model):
        assert bool((one.vera_lambda_d == 0.25).all())
        assert not one.vera_lambda_b.any()
        assert not one.vera_lambda_d.grad.any()
        assert one.vera_lambda_b.grad.any()


def test_merged_computes_what_unmerged_does() -> None:
    model, x = adapted(), draw(3, 6)
    outputs = model(x)
    with merged(model):
        torch.testing.assert_close(model.eval()(x), outputs, rtol=0, atol=1e-13)
    torch.testing.assert_close(merge_(model)(x), outputs, rtol=0, atol=1e-13)


def test_it_is_a_lora_of_the_same_rank_with_scale_1() -> None:
    model, lora, x = adapted(), net(), draw(3, 6)
    inject(lora, LoRA(r=5, alpha=5))
    with torch.no_grad():
        for one, other in zip(adapters(model), adapters(lora), strict=True):
            A, B = one.shared.vera_A[:, : one.in_features], one.shared.vera_B[: one.out_features]
            other.lora_A.copy_(one.vera_lambda_d[:, None] * A)
            other.lora_B.copy_(one.vera_lambda_b[:, None] * B)
    torch.testing.assert_close(lora(x), model(x), rtol=0, atol=1e-13)


def test_the_matrices_of_a_stack_have_vectors_of_their_own_and_the_same_pair() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.Parameter(torch.randn(3, 5, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.stack.mT

    model = Experts()
    inject(model, VeRA(r=2), ["stack"])
    change(model)
    (one,) = adapters(model)
    assert (one.vera_lambda_d.shape, one.vera_lambda_b.shape) == ((3, 2), (3, 5))
    for i, delta in enumerate(one.delta()):
        expected = one.vera_lambda_b[i][:, None] * (one.shared.vera_B * one.vera_lambda_d[i]) @ one.shared.vera_A
        torch.testing.assert_close(delta, expected)


# --- one pair


def one_object(model: nn.Module) -> bool:
    found = adapters(model)
    same_memory = {(one.factors()[1].data_ptr(), one.shared.vera_B.data_ptr()) for one in found}
    return len(pairs(model)) == 1 and len(same_memory) == 1


def by_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize(
    "make",
    [
        lambda model: model,
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        by_torch,
        lambda model: model.to(torch.bfloat16),
        lambda model: model.double(),
        lambda model: copy.deepcopy(model).to("meta"),
    ],
    ids=["as injected", "deepcopy", "pickle", "torch.save", "bfloat16", "double", "meta"],
)
def test_all_layers_hold_one_object_in_one_memory_after(make: Callable[[nn.Module], nn.Module]) -> None:
    assert one_object(make(adapted(dtype=torch.float32)))


def test_a_copys_pair_is_not_the_originals() -> None:
    model = adapted()
    twin = copy.deepcopy(model)
    twin_pair = adapters(twin)[0].shared
    with torch.no_grad():
        twin_pair.vera_A.zero_()
    assert pairs(twin) != pairs(model)
    assert adapters(model)[0].shared.vera_A.any()


def test_the_pair_is_never_trained_and_in_no_optimizer() -> None:
    model = adapted(start=True)
    before = {name: p.clone() for name, p in adapters(model)[0].shared.named_parameters()}
    groups = param_groups(model, lr=0.1)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.5)
    frozen = {id(p) for p in adapters(model)[0].shared.parameters()}
    assert not frozen & {id(p) for group in optimizer.param_groups for p in group["params"]}
    for _ in range(3):
        model(draw(3, 6)).square().sum().backward()
        optimizer.step()
    for name, parameter in adapters(model)[0].shared.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert not parameter.requires_grad


def test_the_vectors_are_in_groups_of_their_own() -> None:
    model = adapted()
    groups = {group["name"]: group["params"] for group in param_groups(model, lr=0.1)}
    assert {id(p) for p in groups["core"]} == {id(one.vera_lambda_d) for one in adapters(model)}
    assert {id(p) for p in groups["scale"]} == {id(one.vera_lambda_b) for one in adapters(model)}
    assert groups.keys() == {"core", "scale"}


def test_one_drawn_on_leaving_the_meta_device_is_the_one_drawn_on_the_cpu() -> None:
    with torch.device("meta"):
        model = Net()
    inject(model, VeRA(r=5))
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    assert one_object(model)
    expected = adapters(adapted(dtype=torch.float32))[0].shared.state_dict()
    for one in adapters(model):
        assert all(torch.equal(one.shared.state_dict()[name], expected[name]) for name in expected)
        assert bool((one.vera_lambda_d == 0.1).all())


def test_tasks_of_the_same_seed_rank_and_sizes_hold_one_pair_and_others_do_not() -> None:
    model = adapted()
    inject(model, VeRA(r=5, d_init=0.5), task="alike")
    assert len(pairs(model)) == 1
    inject(model, VeRA(r=5, projection_seed=1), task="another_seed")
    inject(model, VeRA(r=4), task="another_rank")
    inject(model, VeRA(r=5), ["first"], task="other_sizes")
    assert len(pairs(model)) == 4
    remove(model, "default")
    assert len(pairs(model)) == 4
    assert all(isinstance(one.shared, Projections) for one in adapters(model, "alike"))


def test_a_narrower_layer_joins_a_task_and_a_wider_one_is_refused_and_leaves_no_trace() -> None:
    model = net()
    inject(model, VeRA(r=5), ["second"])
    before = adapters(model)[0].shared.vera_A.clone()
    with pytest.raises(ValueError, match=r"third.weight is 7 x 4, .* at most 4 x 9, .* other random numbers"):
        inject(model, VeRA(r=5), ["third"])
    assert [site.name for site in sites(model)] == ["second.weight"]
    assert type(model.third) is Conv1D
    model = net()
    inject(model, VeRA(r=5), ["first"])
    inject(model, VeRA(r=5), ["first"])
    wide = adapters(model)[0].shared
    model.fourth = nn.Linear(6, 3)
    inject(model, VeRA(r=5), ["fourth"])
    assert {id(one.shared) for one in adapters(model)} == {id(wide)}
    assert before.shape == (5, 9)


def test_two_tasks_add_up_over_one_pair() -> None:
    model, plain, x = adapted(), net(), draw(3, 6)
    inject(model, VeRA(r=5), task="second")
    change(model, "second", seed=4)
    use(model, "default", "second")
    for name, one, other in zip(SHAPES, adapters(model), adapters(model, "second"), strict=True):
        delta = one.delta() + other.delta()
        getattr(plain, name).weight.data += delta.T if name == "third" else delta
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-13)


# --- files


BIG = 512  # features, so that the pair outweighs everything else


def big(method: VeRA) -> nn.Sequential:
    model = nn.Sequential(*[nn.Linear(BIG, BIG) for _ in range(4)])
    inject(model, method)
    return model


def test_files_hold_the_pair_once(tmp_path: Path) -> None:
    model = big(VeRA(r=64))
    pair_bytes, vector_bytes = 2 * BIG * 64 * 4, 4 * (BIG + 64) * 4
    save_adapter(model, tmp_path / "adapter")
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert pair_bytes + vector_bytes < size < pair_bytes + vector_bytes + 8_000
    file = io.BytesIO()
    torch.save({name: t for name, t in model.state_dict().items() if ".adapters." in name}, file)
    assert pair_bytes + vector_bytes < file.tell() < pair_bytes + vector_bytes + 16_000


def test_a_folder_has_pefts_names_once() -> None:
    names = set(saved(adapted(), Path("unused"), only_names=True))
    layers = {f"base_model.model.{name}.vera_lambda_{vector}" for name in SHAPES for vector in "bd"}
    assert names == layers | {"base_model.vera_A", "base_model.vera_B"}


def saved(model: nn.Module, path: Path, only_names: bool = False) -> dict[str, Tensor]:
    from lightning_lora.fingerprint import base_weights
    from lightning_lora.saving import folder_contents

    files = folder_contents(model, model.state_dict(), "default", base_weights(sites(model)), {})
    return safetensors.torch.load(files["adapter_model.safetensors"])


@pytest.mark.parametrize("save_projection", [True, False])
def test_a_saved_adapter_gives_a_fresh_base_the_same_outputs(save_projection: bool, tmp_path: Path) -> None:
    model, x = adapted(VeRA(r=5, projection_seed=3, save_projection=save_projection), torch.float32), draw(3, 6).float()
    save_adapter(model, tmp_path / "adapter")
    fresh = net(torch.float32)
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(x), model(x))
    assert one_object(fresh)
    names = set(read_tensors(tmp_path / "adapter" / "adapter_model.safetensors")[0])
    assert ("base_model.vera_A" in names) is save_projection


def test_without_its_projections_a_file_holds_sizes_and_a_digest_and_is_refused_where_others_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(VeRA(r=5, save_projection=False), torch.float32)
    save_adapter(model, tmp_path / "adapter")
    described = read_tensors(tmp_path / "adapter" / "adapter_model.safetensors")[1]
    pair = adapters(model)[0].shared
    numbers = pair.vera_A.detach().numpy().tobytes() + pair.vera_B.detach().numpy().tobytes()
    assert described["shared"] == {
        "out_features": 9,
        "in_features": 9,
        "torch": torch.__version__,
        "sha256": hashlib.sha256(numbers).hexdigest(),
    }
    fresh = net(torch.float32)
    draws = torch.Tensor.uniform_
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, *args, **kwargs: draws(self, *args, **kwargs).mul_(1.01))
    with pytest.raises(AdapterError, match=r"projection_seed=0 draws others with PyTorch .* save_projection=True"):
        load_adapter(fresh, tmp_path / "adapter")
    assert not sites(fresh)


def test_loading_other_projections_leaves_those_of_another_task_alone(tmp_path: Path) -> None:
    model = adapted(dtype=torch.float32)
    with torch.no_grad():
        adapters(model)[0].shared.vera_A.mul_(2)
    save_adapter(model, tmp_path / "doubled")
    other, x = adapted(dtype=torch.float32), draw(3, 6).float()
    outputs = other(x)
    inject(other, VeRA(r=5), task="second")
    assert len(pairs(other)) == 1
    load_adapter(other, tmp_path / "doubled", task="second")
    assert len(pairs(other)) == 2
    assert torch.equal(other(x), model(x))
    use(other, "default")
    assert torch.equal(other(x), outputs)
    load_adapter(other, tmp_path / "doubled", task="third")
    assert len(pairs(other)) == 2


def test_projections_that_were_drawn_for_a_larger_model_serve_a_part_of_it(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.here, self.there = Pretrained(4, 6), Pretrained(9, 3)

    model = Two()
    inject(model, VeRA(r=2))
    change(model)
    save_adapter(model, tmp_path / "both")
    for name in ("here", "there"):
        network = copy.deepcopy(getattr(model, name))
        x = torch.randn(2, network.layer.in_features)
        remove(network)
        load_adapter(network, tmp_path / "both" / name)
        assert torch.equal(network.layer(x), getattr(model, name).layer(x))
    remove(model)
    load_adapter(model, tmp_path / "both")
    assert len(pairs(model)) == 1


class Pretrained(nn.Module):
    """What looks like a network of its own."""

    config: Any = None

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.layer = nn.Linear(into, out)

    def save_pretrained(self) -> None: ...


@pytest.mark.parametrize("save_projection", [True, False])
def test_merging_files_alone_writes_what_merging_the_model_does(save_projection: bool, tmp_path: Path) -> None:
    model = adapted(VeRA(r=5, save_projection=save_projection), torch.float32)
    save_adapter(model, tmp_path / "adapter")
    safetensors.torch.save_file(net(torch.float32).state_dict(), tmp_path / "base.safetensors")
    (written,) = offline.merge(tmp_path / "adapter", tmp_path / "base.safetensors", tmp_path / "out.safetensors")
    values, expected = safetensors.torch.load_file(written), merge_(model).state_dict()
    assert all(torch.equal(values[name], expected[name]) for name in expected)


@pytest.mark.parametrize("save_projection", [True, False])
def test_its_portable_form_is_a_lora_that_peft_computes_alike(save_projection: bool, tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 9), nn.Linear(9, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    base = Plain()
    model = copy.deepcopy(base)
    inject(model, VeRA(r=5, save_projection=save_projection))
    change(model)
    save_adapter(model, tmp_path / "vera")
    offline.export(tmp_path / "vera", tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 5, 5)
    x = torch.randn(3, 6)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora")
    torch.testing.assert_close(theirs(x), model(x), rtol=0, atol=1e-6)


# --- PEFT


def both(tmp_path: Path, save_projection: bool = True, **config: Any) -> tuple[nn.Module, nn.Module]:
    """Our model and PEFT's, of the same base, with adapters that ours wrote and PEFT read."""
    ours = adapted(VeRA(r=5, projection_seed=3, save_projection=save_projection))
    save_adapter(ours, tmp_path / "ours")
    return ours, peft_model(tmp_path / "ours")


IN_ONE_CONFIG = "ignore:fan_in_fan_out is set to:UserWarning"  # PEFT says so where it meets both kinds of layers
NOT_SAVED = "ignore:Specified to not (load|save) vera_A and vera_B:UserWarning"


def peft_model(path: Path) -> nn.Module:
    model = peft.PeftModel.from_pretrained(net(), path, is_trainable=True)
    return model.double()


@pytest.mark.filterwarnings(IN_ONE_CONFIG)
def test_peft_draws_the_same_pair_from_the_same_seed_and_shapes() -> None:
    config = peft.VeraConfig(r=5, target_modules=list(SHAPES), projection_prng_key=11)
    theirs = peft.get_peft_model(net(torch.float32), config).base_model
    pair = adapters(adapted(VeRA(r=5, projection_seed=11), torch.float32))[0].shared
    assert torch.equal(pair.vera_A, theirs.vera_A["default"])
    assert torch.equal(pair.vera_B, theirs.vera_B["default"])


@pytest.mark.filterwarnings(IN_ONE_CONFIG)
@pytest.mark.filterwarnings(NOT_SAVED)
@pytest.mark.parametrize("save_projection", [True, False])
def test_peft_computes_the_same_from_our_folder(save_projection: bool, tmp_path: Path) -> None:
    ours, theirs = both(tmp_path, save_projection)
    x = draw(3, 6)
    torch.testing.assert_close(theirs(x), ours(x), rtol=0, atol=1e-12)


@pytest.mark.filterwarnings(IN_ONE_CONFIG)
@pytest.mark.filterwarnings(NOT_SAVED)
@pytest.mark.parametrize("save_projection", [True, False])
def test_we_compute_the_same_from_pefts_folder(save_projection: bool, tmp_path: Path) -> None:
    config = peft.VeraConfig(r=5, target_modules=list(SHAPES), projection_prng_key=3, save_projection=save_projection)
    theirs = peft.get_peft_model(net(torch.float32), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "vera_lambda" in name:
                parameter.normal_()
    theirs.save_pretrained(tmp_path)
    ours = net(torch.float32)
    load_adapter(ours, tmp_path)
    assert adapters(ours)[0].method == VeRA(r=5, projection_seed=3, save_projection=save_projection)
    x = draw(3, 6).float()
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-6)
    assert one_object(ours)


@pytest.mark.filterwarnings(IN_ONE_CONFIG)
def test_peft_has_the_same_gradients_and_takes_the_same_steps(tmp_path: Path) -> None:
    ours, theirs = both(tmp_path)
    mine = {one: [one.vera_lambda_d, one.vera_lambda_b] for one in adapters(ours)}
    layers = [getattr(theirs.base_model.model, name) for name in SHAPES]
    twins = [[layer.vera_lambda_d["default"], layer.vera_lambda_b["default"]] for layer in layers]
    optimizers = [
        torch.optim.AdamW([p for group in vectors for p in group], lr=0.05, weight_decay=0.1)
        for vectors in (mine.values(), twins)
    ]
    for step in range(5):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(draw(3, 6)).square().sum().backward()
        for one, other in zip(mine.values(), twins, strict=True):
            for a, b in zip(one, other, strict=True):
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-10, msg=f"step {step}")
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours(draw(3, 6)), theirs(draw(3, 6)), rtol=0, atol=1e-9)


def test_a_folder_of_pefts_without_the_sizes_says_to_go_by_the_model(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(6, 9)), peft.VeraConfig(r=5, target_modules=["0"]))
    theirs.save_pretrained(tmp_path / "peft")
    with pytest.raises(AdapterError, match=r"do not hold the size of 0.weight: load it into the model"):
        list(offline.inspect(tmp_path / "peft"))


# --- the callback


class Wide(Lit):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(width=64, **kwargs)


@pytest.mark.parametrize("save_projection", [True, False])
def test_a_resumed_run_goes_on_bit_for_bit(
    save_projection: bool, trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    method = VeRA(r=16, save_projection=save_projection)

    def run(epochs: int, ckpt_path: str | None = None) -> Wide:
        module = Wide()
        saver = ModelCheckpoint(tmp_path, filename=f"{epochs}")
        runner = trainer(callbacks=[LoRACallback(method), saver], max_epochs=epochs, enable_checkpointing=True)
        runner.fit(module, loader(), ckpt_path=ckpt_path)
        return module

    whole, part = run(2), run(1)
    resumed = run(2, str(tmp_path / "1.ckpt"))
    assert part.losses + resumed.losses == whole.losses
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert len(pairs(resumed)) == 1
    loaded = load_from_checkpoint(Wide, tmp_path / "1.ckpt")
    x = torch.randn(2, 4)
    assert torch.equal(loaded(x), part(x))
    values = torch.load(tmp_path / "1.ckpt")["state_dict"]
    assert any("vera_A" in name for name in values) is save_projection


def test_a_checkpoint_holds_the_pair_once_and_the_optimizer_nothing_of_it(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    class Deep(Lit):
        def build(self) -> nn.Module:
            return nn.Sequential(nn.Linear(4, BIG), *[nn.Linear(BIG, BIG) for _ in range(4)], nn.Linear(BIG, 3))

    saver = ModelCheckpoint(tmp_path, filename="one")
    module = Deep()
    trainer(callbacks=[LoRACallback(VeRA(r=64)), saver], max_epochs=1, enable_checkpointing=True).fit(module, loader(1))
    vectors = sum(one.vera_lambda_d.numel() + one.vera_lambda_b.numel() for one in adapters(module))
    pair = sum(p.numel() for p in adapters(module)[0].shared.parameters())
    assert (tmp_path / "one.ckpt").stat().st_size < 4 * (pair + 3 * vectors) + 50_000 < 4 * 2 * pair


def test_a_resume_is_refused_where_other_projections_are_drawn(
    trainer: Callable[..., L.Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = VeRA(r=16, save_projection=False)
    saver = ModelCheckpoint(tmp_path, filename="one")
    trainer(callbacks=[LoRACallback(method), saver], max_epochs=1, enable_checkpointing=True).fit(Wide(), loader())
    checkpoint = torch.load(tmp_path / "one.ckpt")
    checkpoint["lightning_lora"]["shared"]["sha256"] = "0"
    torch.save(checkpoint, tmp_path / "one.ckpt")
    with pytest.raises(AdapterError, match="its projections are not in it"):
        trainer(callbacks=[LoRACallback(method)]).fit(Wide(), loader(), ckpt_path=str(tmp_path / "one.ckpt"))
    with pytest.raises(AdapterError, match="its projections are not in it"):
        load_from_checkpoint(Wide, tmp_path / "one.ckpt")


# --- DVoRA


def kinds() -> dict[str, tuple[Callable[[], nn.Module], Tensor]]:
    return {
        "linear": (lambda: nn.Linear(6, 5), draw(3, 6)),
        "Conv1D": (lambda: Conv1D(5, 6), draw(3, 6)),
        "embedding": (lambda: nn.Embedding(7, 5), torch.tensor([[1, 2, 6], [0, 0, 3]])),
        "convolution": (lambda: nn.Conv2d(3, 4, 3, padding=1), draw(2, 3, 5, 5)),
        "GRU cell": (lambda: nn.GRUCell(6, 5), draw(2, 6)),
    }


def with_magnitudes(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(7)
    model = nn.Sequential(kinds()[kind][0]()).to(dtype)
    inject(model, VeRA(r=3, magnitude=True), ["0"], seed=1)
    return model


@pytest.mark.parametrize("kind", kinds())
def test_dvora_starts_as_the_base_trains_three_vectors_and_is_the_formula(kind: str) -> None:
    build, x = kinds()[kind]
    model = with_magnitudes(kind)
    torch.manual_seed(7)
    plain = nn.Sequential(build()).double()
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-13)
    with torch.no_grad():
        for one in adapters(model):
            for parameter in (one.vera_lambda_d, one.vera_lambda_b, one.magnitude):
                parameter.add_(0.2 * torch.rand(parameter.shape, dtype=torch.float64))
    for site in sites(model):
        one, layout = site.adapter("default"), site.slot.layout
        weight = getattr(plain[0], site.parameter)
        V = layout.matrix(weight) + one.delta()
        norm = V.norm(dim=0, keepdim=True) if layout.looked_up else V.norm(dim=1, keepdim=True)
        m = one.magnitude[None] if layout.looked_up else one.magnitude[:, None]
        weight.data = layout.put(weight, m * V / norm)
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-12)
    model(x).square().sum().backward()
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.grad is not None} == {
        "vera_lambda_d", "vera_lambda_b", "magnitude",
    }  # fmt: skip
    assert len(pairs(model)) == 1
    groups = {group["name"] for group in param_groups(model, lr=0.1)}
    assert groups == {"core", "scale", "magnitude"}


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("save_projection", [True, False])
def test_a_saved_dvora_gives_a_fresh_base_the_same_outputs_and_is_not_for_peft(
    kind: str, save_projection: bool, tmp_path: Path
) -> None:
    build, x = kinds()[kind]
    torch.manual_seed(7)
    model, fresh = nn.Sequential(build()).double(), nn.Sequential(build()).double()
    fresh.load_state_dict(model.state_dict())
    inject(model, VeRA(r=3, magnitude=True, save_projection=save_projection), ["0"])
    change(model)
    save_adapter(model, tmp_path)
    load_adapter(fresh, tmp_path)
    torch.testing.assert_close(fresh(x), model(x), rtol=0, atol=0)
    why = read_tensors(tmp_path / "adapter_model.safetensors")[1]["not_for_peft"]
    assert why.startswith(("PEFT's VeRA has no magnitudes", "PEFT has VeRA on linear layers"))
    outputs = model(x)
    torch.testing.assert_close(merge_(model)(x), outputs, rtol=0, atol=1e-12)


def test_dvora_made_on_the_meta_device_starts_as_one_made_on_the_cpu() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 5))
    inject(model, VeRA(r=3, magnitude=True))
    model.to_empty(device="cpu")
    expected = with_magnitudes("linear", torch.float32)
    model[0].load_state_dict({name: getattr(expected[0], name) for name in ("weight", "bias")}, strict=False)
    x = draw(3, 6).float()
    assert torch.equal(model(x), expected(x))
    assert torch.equal(adapters(model)[0].magnitude, adapters(expected)[0].magnitude)


# --- what it refuses


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r=0: the rank must be a whole number of at least 1"),
        ({"d_init": 0.0}, "d_init=0.0: must be a finite number other than 0"),
        ({"projection_seed": -1}, "projection_seed=-1: must be a whole number of at least 0"),
        ({"save_projection": "yes"}, "save_projection='yes': must be True or False"),
        ({"dropout": 1.0}, "dropout=1.0: must be at least 0 and below 1"),
        ({"magnitude": "yes"}, r"magnitude='yes': must be True \(DVoRA\) or False \(VeRA\)"),
        ({"alpha": 16}, r"VeRA\(alpha=16\): VeRA has no alpha / r scale"),
        ({"scaling": "rsqrt"}, "VeRA has no alpha / r scale"),
        ({"init": "pissa"}, r"VeRA\(init='pissa'\): VeRA's projections are shared and random by definition"),
        ({"freeze_A": True}, r"VeRA\(freeze_A=True\): VeRA already freezes A and B"),
    ],
)
def test_values_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VeRA(**fields)


def test_ranks_by_layer_are_refused_because_the_pair_is_shared() -> None:
    model = net()
    with pytest.raises(ValueError, match=r"first.weight has r=3 and second.weight has r=5: VeRA has no"):
        inject(model, VeRA(r=5), rank_pattern={"first": 3})
    assert not sites(model)


def test_alphas_are_refused_because_there_is_no_scale() -> None:
    with pytest.raises(ValueError, match=r"alpha=8.0: VeRA has no alpha / r scale"):
        inject(net(), VeRA(r=5), alpha_pattern={"first": 8.0})


def test_a_ratio_of_learning_rates_is_refused_because_there_is_no_trained_a() -> None:
    with pytest.raises(ValueError, match="VeRA trains the vectors d and b, not A and B"):
        LoRACallback(VeRA(), lr_ratio=16)


def test_a_damaged_description_of_the_pair_is_refused(tmp_path: Path) -> None:
    save_adapter(adapted(VeRA(r=5, save_projection=False)), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors, described = read_tensors(file)
    for value in (["no", "object"], {"out_features": 9}):
        file.write_bytes(to_bytes(tensors, described | {"shared": value}))
        with pytest.raises(AdapterError):
            load_adapter(net(), tmp_path / "adapter")
