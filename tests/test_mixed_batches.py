"""A task for each example of a batch, and several tasks added together: what is computed, and in how many launches."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from test_contract import KINDS, METHODS, base, change, inject_into
from test_functional import Launches
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from lightning_lora import (
    AdaLoRA,
    DyLoRA,
    LoRA,
    LoRAFA,
    Method,
    VeRA,
    at_rank,
    inject,
    merge_,
    merged,
    per_example,
    sites,
    use,
    using,
)
from lightning_lora.adapter import Adapter
from lightning_lora.layers import Called, kind_in_use

Tasks = Sequence[str | None]
EXAMPLES = ("b", None, "a", "b", "a", "a")
CALLED = [name for name, kind in KINDS.items() if issubclass(kind_in_use(kind.layer()), Called)]
NOTHING_OF_THEIR_OWN = ("DyLoRA", "LoRADrop", "LoRAFA", "ReLoRA", "DVoRA")
PAIRS = [(kind, name) for name in METHODS for kind in CALLED if name not in NOTHING_OF_THEIR_OWN or kind == "linear"]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def net(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*layers or (nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 7))).eval()
    return model.double().requires_grad_(False)


def with_tasks(model: nn.Module, **methods: Method | tuple[Method, list[str]]) -> nn.Module:
    """Give a model tasks whose adapters change it, some of them on certain layers only."""
    for seed, (task, method) in enumerate(methods.items()):
        inject(model, *(method if isinstance(method, tuple) else (method,)), task=task, seed=seed)
    change(model)
    return model.double()


def alone(model: nn.Module, tasks: Tasks, x: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """What all examples of a task give in a batch without the others."""
    run = run or model
    rows = torch.arange(len(x)).view(len(tasks), -1)
    outputs, places = [], []
    for task in dict.fromkeys(tasks):
        index = rows[[i for i, other in enumerate(tasks) if other == task]].flatten()
        with using(model, *([] if task is None else [task])):
            outputs.append(run(x[index]))
        places.append(index)
    return torch.cat(outputs)[torch.cat(places).argsort()]


def together(model: nn.Module, tasks: Tasks, x: Tensor) -> Tensor:
    with per_example(model, tasks):
        return model(x)


def gradients(model: nn.Module, output: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    output.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


# What is computed


@pytest.mark.parametrize(("kind", "method"), PAIRS)
def test_an_example_gets_what_its_task_gives_it_alone_and_gives_the_same_gradients(kind: str, method: str) -> None:
    model = base(kind).requires_grad_(False).eval()
    inject_into(model, kind, METHODS[method])
    inject(
        model,
        METHODS[method].at(1, METHODS[method].alpha),
        KINDS[kind].targets,
        fused=KINDS[kind].fused,
        task="b",
        seed=4,
    )
    use(model, "default")
    change(model)
    tasks = ["default" if task == "a" else task for task in EXAMPLES]
    ((name, x),) = KINDS[kind].inputs().items()
    x = torch.cat([x, x.roll(1, -1), x.roll(2, -1)])

    def run(rows: Tensor) -> Tensor:
        return model(**{name: rows})

    expected = alone(model, tasks, x, run)
    with per_example(model, tasks):
        for without_gradients in (torch.inference_mode, torch.inference_mode, torch.no_grad):
            with without_gradients():
                assert_close(run(x), expected.detach())
        found = run(x)
        assert_close(found, expected)
    assert_close(gradients(model, found), gradients(model, expected))
    assert (expected[: len(x) // 6] - alone(model, [None], x, run)[: len(x) // 6]).abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(6, 12), (6, 3, 12), (6, 2, 2, 12), (12, 12), (30, 3, 12)])
@pytest.mark.parametrize(
    "tasks",
    [
        ("a", "a", "b", "b", "c", "c"),
        ("b", "a", "c", "c", "b", "a"),
        EXAMPLES,
        ("a", "a", "a", "a", "a", "b"),
        ("c", None, None, "b", "a", "e"),
        ("e", "e", "e", "e", None, "d"),
        ("a",) * 6,
        (None,) * 6,
    ],
)
def test_tasks_of_other_ranks_scales_methods_and_layers_share_a_batch(tasks: Tasks, shape: tuple[int, ...]) -> None:
    model = with_tasks(
        net(),
        a=LoRA(r=2),
        b=LoRA(r=5, alpha=3, scaling="rsqrt"),
        c=VeRA(r=4),
        d=LoRAFA(r=1),
        e=(AdaLoRA(r=3), ["2"]),
    )
    x = draw(*shape)
    expected = alone(model, tasks, x)
    assert_close(together(model, tasks, x), expected)
    with torch.no_grad():
        assert_close(together(model, tasks, x), expected)


@pytest.mark.parametrize("tokens", [1, 2, 40])
@pytest.mark.parametrize("tasks", [EXAMPLES, ("a", "a", "a", "b", "b", "b")])
def test_gradients_reach_the_input_and_the_factors_of_the_example_s_own_task(tasks: Tasks, tokens: int) -> None:
    model = with_tasks(net(), a=LoRA(r=2), b=LoRA(r=3))
    x = draw(6, tokens, 12).requires_grad_()
    expected = {**gradients(model, alone(model, tasks, x)), "x": x.grad}
    x.grad = None
    found = {**gradients(model, together(model, tasks, x)), "x": x.grad}
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_gradients_reach_the_input_where_the_factors_are_frozen_after_an_inference() -> None:
    model = with_tasks(net(), a=LoRA(r=2), b=LoRA(r=3)).requires_grad_(False)
    x = draw(6, 2, 12)
    with per_example(model, EXAMPLES):
        with torch.inference_mode():
            first = model(x)
        x.requires_grad_()
        found = model(x)
        (gradient,) = torch.autograd.grad(found.sum(), x)
    (expected,) = torch.autograd.grad(alone(model, EXAMPLES, x).sum(), x)
    assert_close(found.detach(), first)
    assert_close(gradient, expected)


class Widening(nn.Linear):
    """Gives more precision than it takes, as quantized layers may."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.double())


@pytest.mark.parametrize("cls", [nn.Linear, Widening])
@pytest.mark.parametrize("tokens", [1, 6])
def test_one_scale_for_all_tasks_is_applied_once(cls: type[nn.Linear], tokens: int) -> None:
    model = with_tasks(net(cls(12, 10)), a=LoRA(r=4), b=LoRA(r=4))
    x, tasks = draw(4, tokens, 12), ["a", "b", "b", "a"]
    x = x.float() if cls is Widening else x
    torch.testing.assert_close(together(model, tasks, x), alone(model, tasks, x), rtol=1e-5, atol=1e-5)
    if cls is nn.Linear:
        assert_close(together(model, tasks, x), alone(model, tasks, x))


def test_models_of_transformers_take_a_task_for_each_sequence() -> None:
    sizes = {"vocab_size": 20, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    llama = LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    ids = torch.arange(24).view(4, 6) % 20
    for model, layers in (
        (GPT2LMHeadModel(GPT2Config(**sizes)), ["c_attn", "wte", "lm_head"]),
        (LlamaForCausalLM(llama), ["q_proj", "down_proj"]),
    ):
        with_tasks(model.eval(), a=(LoRA(r=2), layers), b=(LoRA(r=3), layers[:1]))
        tasks = ["b", "a", None, "b"]
        with torch.no_grad():
            expected = alone(model, tasks, ids, lambda rows, model=model: model(rows).logits)
            with per_example(model, tasks):
                torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-10)
                beams = model(ids.repeat_interleave(3, 0)).logits
        torch.testing.assert_close(beams, expected.repeat_interleave(3, 0), rtol=0, atol=1e-10)


def test_dropout_of_a_task_is_that_of_its_own_examples() -> None:
    model = with_tasks(net(nn.Linear(12, 10)), a=LoRA(r=2, dropout=0.5)).train()
    x = draw(4, 12)
    torch.manual_seed(1)
    expected = alone(model, ["a", None, "a", None], x)
    torch.manual_seed(1)
    found = together(model, ["a", None, "a", None], x)
    assert_close(found, expected)
    assert not torch.allclose(found, together(model, ["a", None, "a", None], x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_in_half_precision_and_under_autocast_the_output_has_the_dtype_that_it_has_alone(dtype: torch.dtype) -> None:
    model = with_tasks(net(), a=LoRA(r=2), b=LoRA(r=3)).float().to(dtype)
    x = draw(6, 2, 12).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32), torch.no_grad():
        found, expected = together(model, EXAMPLES, x), alone(model, EXAMPLES, x)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_what_is_written_to_the_factors_inside_the_block_is_seen() -> None:
    model = with_tasks(net(), a=LoRA(r=2), b=DyLoRA(r=4))
    x = draw(6, 12)
    with torch.no_grad(), per_example(model, EXAMPLES):
        first = model(x)
        assert torch.equal(model(x), first)
        with at_rank(model, 1):
            assert not torch.allclose(model(x), first)
        assert torch.equal(model(x), first)
        sites(model)[1].adapter("a").lora_A.mul_(2)
        found = model(x)
    assert_close(found, alone(model, EXAMPLES, x).detach())
    assert not torch.allclose(found, first)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_compile_makes_one_graph_of_a_mixed_batch() -> None:
    model, x = with_tasks(net(), a=LoRA(r=2), b=LoRA(r=3)), draw(6, 4, 12)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with using(model, "a"):
        one = compiled(x)
        assert_close(one, model(x))
    with per_example(model, EXAMPLES):
        assert_close(compiled(x), model(x))
    with using(model, "a"):
        assert_close(compiled(x), one)


# Where the examples are


@pytest.mark.parametrize("tokens", [4, 6])
def test_dim_says_that_the_sequence_comes_first(tokens: int) -> None:
    model = with_tasks(net(), a=LoRA(r=2), b=LoRA(r=3))
    x = draw(6, tokens, 12)
    with per_example(model, EXAMPLES, dim=1):
        found, pooled = model(x.transpose(0, 1)), model(x[:, 0])
    assert_close(found.transpose(0, 1), alone(model, EXAMPLES, x))
    assert_close(pooled, alone(model, EXAMPLES, x[:, 0]))


@pytest.mark.parametrize(
    ("layer", "shape", "dim"),
    [
        (nn.Linear(6, 5), (7, 6), 0),
        (nn.Linear(6, 5), (6,), 0),
        (nn.Linear(6, 5), (4, 3, 6), 0),
        (nn.Linear(6, 5), (18, 6), 1),
        (nn.Linear(6, 5), (6, 4, 6), 1),
        (nn.Conv1d(6, 6, 3), (6, 8), 0),
        (nn.ConvTranspose2d(6, 6, 3), (6, 8, 8), 0),
    ],
)
def test_an_input_that_cannot_be_divided_is_refused_by_the_site_s_name(
    layer: nn.Module, shape: tuple[int, ...], dim: int
) -> None:
    model = with_tasks(net(layer), a=(LoRA(r=1), ["0"]))
    with (
        per_example(model, ["a", None, "a", "a", None, "a"], dim=dim),
        pytest.raises(ValueError, match=r"^0\.weight: an output of size \[.*\] cannot be divided among 6 examples"),
    ):
        model(draw(*shape))


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x, x, x, need_weights=False)[0])


def test_where_something_has_the_sequence_first_one_has_to_say_what_layers_see() -> None:
    model = with_tasks(net(SequenceFirst()), a=(LoRA(r=2), ["0.out"]))
    x, tasks = draw(3, 6, 8), ["a", None, "a", "a", None, "a"]
    with (
        pytest.raises(ValueError, match=r"0\.attention has batch_first=False.*dim=1"),
        per_example(model, tasks),
    ):
        pass
    with per_example(model, tasks, dim=1):
        found = model(x)
    for i, task in enumerate(tasks):
        with using(model, *([task] if task else [])):
            assert_close(found[:, i], model(x[:, i : i + 1])[:, 0])


# What cannot be


READ = [
    (nn.MultiheadAttention(8, 2, batch_first=True), ["0.in_proj_weight"]),
    (nn.MultiheadAttention(8, 2, batch_first=True), ["out_proj"]),
    (nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), ["linear1"]),
    (nn.GRU(8, 4, batch_first=True), ["0"]),
    (nn.EmbeddingBag(8, 4), ["0.weight"]),
]


@pytest.mark.parametrize(("layer", "targets"), READ)
def test_a_weight_that_a_forward_reads_is_refused_unless_all_examples_have_the_same_task_there(
    layer: nn.Module, targets: list[str]
) -> None:
    model = with_tasks(net(layer), a=(LoRA(r=1), targets))
    with pytest.raises(ValueError, match=r"reads this weight once"), per_example(model, ["a", None]):
        pass
    with per_example(model, ["a", "a"]):
        assert {site.slot.active for site in sites(model)} == {("a",)}
    with per_example(model, [None, None]):
        assert {site.slot.active for site in sites(model)} == {()}


def test_on_leaving_the_tasks_in_use_are_those_of_before() -> None:
    model, x = with_tasks(net(), a=LoRA(r=2), b=LoRA(r=3)), draw(6, 12)
    use(model, "b")
    expected = model(x)
    together(model, EXAMPLES, x)
    assert torch.equal(model(x), expected)
    with pytest.raises(KeyboardInterrupt), per_example(model, EXAMPLES):
        raise KeyboardInterrupt
    assert torch.equal(model(x), expected)
    with pytest.raises(ValueError, match="no adapter of that name"), per_example(model, ["a", "z"]):
        pass
    assert torch.equal(model(x), expected)


# What it costs


def launches(model: nn.Module, x: Tensor) -> list[str]:
    with torch.no_grad():
        model(x)
        with Launches() as counted:
            model(x)
    return counted.names


def many(tasks: int) -> nn.Module:
    return with_tasks(net(nn.Linear(12, 10)), **{f"t{i}": LoRA(r=4) for i in range(tasks)})


@pytest.mark.parametrize("tokens", [1, 32])
@pytest.mark.parametrize("tasks", [1, 4, 64])
@pytest.mark.parametrize("bare", [False, True])
def test_a_mixed_batch_takes_at_most_eight_launches_for_a_linear_layer(tasks: int, tokens: int, bare: bool) -> None:
    model = many(tasks)
    chosen: list[str | None] = [f"t{(7 * i + i // 16) % tasks}" for i in range(64)]
    if bare:
        chosen[-1] = None
    with per_example(model, chosen):
        found = launches(model, draw(64, tokens, 12))
        trained = launches_trained(model, draw(64, tokens, 12))
    assert len(found) <= 6
    assert len(trained) <= (10 if bare else 8)


def launches_trained(model: nn.Module, x: Tensor) -> list[str]:
    with Launches() as counted:
        model(x)
    return counted.names


@pytest.mark.parametrize(
    ("tasks", "tokens", "expected"),
    [
        (["t0", "t0", "t1", "t1"], 2, ["addmm", "bmm", "baddbmm"]),
        (["t0", "t1", "t0", "t1"], 8, ["addmm", "index_select", "index_select", "bmm", "baddbmm"]),
        (["t0", "t1", "t0", "t1"], 2, ["addmm", "index_select", "bmm", "bmm", "index_select", "add"]),
        (["t0"] * 4, 2, ["addmm", "mm", "mul", "mm", "add"]),
        ([None] * 4, 2, ["addmm"]),
    ],
)
def test_the_smaller_ones_of_factors_and_rows_are_gathered_and_none_where_tasks_lie_in_order(
    tasks: Tasks, tokens: int, expected: list[str]
) -> None:
    model, x = many(2), draw(4, tokens, 12)
    with per_example(model, tasks):
        assert launches(model, x) == expected
    with using(model):
        assert launches(model, x) == ["addmm"]


# Several tasks added together


LAYERS = [
    (nn.Linear(12, 10), (3, 12)),
    (nn.Linear(12, 10), (5, 20, 12)),
    (Conv1D(10, 12), (5, 20, 12)),
    (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    (nn.ConvTranspose1d(4, 6, 3, groups=2), (2, 4, 5)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_eight_tasks_add_what_each_of_them_adds_and_each_gets_its_gradient(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    methods = {f"t{i}": (LoRA(r=i % 3 + 1, alpha=i + 1), ["0"]) for i in range(7)} | {"v": (VeRA(r=2), ["0"])}
    if any(isinstance(layer, kind) for kind in (nn.Conv2d, nn.ConvTranspose1d)):
        methods["v"] = (AdaLoRA(r=2), ["0"])
    model, x = with_tasks(net(layer), **methods), draw(*shape)
    changes, expected = [], {}
    with using(model):
        plain = model(x)
    weights = torch.linspace(-1, 1, plain.numel(), dtype=torch.float64).view(plain.shape)  # the loss is linear in y
    for task in methods:
        with using(model, task):
            output = model(x)
            changes.append((output - plain).detach())
            model.zero_grad()
            (output * weights).sum().backward()
        expected |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with using(model, *methods):
        found = model(x)
        assert_close(found, plain + sum(changes))
        model.zero_grad()
        (found * weights).sum().backward()
    assert_close({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, expected)


def test_eight_tasks_take_one_pair_of_products() -> None:
    model, x = many(8), draw(64, 12)
    names = [f"t{i}" for i in range(8)]
    with using(model, *names):
        assert launches(model, x) == ["addmm", "cat", "cat", "mm", "addmm"]
        for site in sites(model):
            for i, task in zip(count(1), names, strict=False):
                site.adapter(task).scaling *= i
        found = launches(model, x)
    assert found == ["addmm", *["mul"] * 7, "cat", "cat", "mm", "addmm"]


def test_tables_that_are_looked_up_are_not_put_side_by_side() -> None:
    model = with_tasks(net(nn.Embedding(7, 5)), a=(LoRA(r=2), ["0"]), b=(LoRA(r=3), ["0"]))
    with using(model, "a", "b"):
        assert "cat" not in launches(model, torch.arange(6).view(2, 3))


def test_tasks_with_dropout_have_a_mask_each() -> None:
    model = with_tasks(net(nn.Linear(12, 10)), a=LoRA(r=2, dropout=0.5), b=LoRA(r=3, dropout=0.5)).train()
    x = draw(3, 12)
    with using(model):
        plain = model(x)
    with using(model, "a", "b"):
        torch.manual_seed(1)
        found = model(x)
    torch.manual_seed(1)
    changes = 0
    for task in ("a", "b"):
        with using(model, task):
            changes = changes + model(x) - plain
    assert_close(found, plain + changes)


def test_the_adapters_themselves_are_called_so_that_their_hooks_run() -> None:
    model, x = with_tasks(net(), a=LoRA(r=2), b=LoRA(r=3)), draw(6, 12)
    called: list[nn.Module] = []
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    for adapter in adapters:
        adapter.register_forward_pre_hook(lambda module, _: called.append(module))
    with using(model, "a", "b"):
        model(x)
    assert called == adapters
    together(model, EXAMPLES, x)
    assert {id(module) for module in called[4:]} == {id(adapter) for adapter in adapters}


def test_the_example_in_the_docs_runs_and_does_what_it_says() -> None:
    page = (Path(__file__).parent.parent / "docs" / "many_tasks.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/many_tasks.md", "exec"), names)
    torch.testing.assert_close(names["each"][0], names["english"][0])
    torch.testing.assert_close(names["each"][3], names["english"][3])
    assert all(site.slot.active == ("de", "tone") for site in sites(names["model"]))


def test_merging_inside_the_block_is_refused_before_anything_is_written() -> None:
    model = with_tasks(net(), a=LoRA(r=2), b=(LoRA(r=3), ["2"]))
    before = {name: p.clone() for name, p in model.state_dict().items()}
    for act in (merge_, lambda model: merged(model).__enter__()):
        with per_example(model, ["a", "b"]), pytest.raises(RuntimeError, match="differ by example"):
            act(model)
    with per_example(model, ["b", "b"]):
        pass
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
