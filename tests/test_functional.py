"""The fused low-rank step computes what the plain one does, at exactly known costs, and stands aside where it must."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from lightning_lora import LoRA, LoRAFA, Method, VeRA, functional, inject, known_methods, sites
from lightning_lora.adapter import Adapter
from lightning_lora.dropout import dropout
from lightning_lora.functional import fused_linear, fused_step, low_rank_step, with_gain

N, IN, OUT, R = 96, 20, 12, 4  # rows enough for the fused form
HALF = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # the relative rounding error of one number


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + len(shape)), dtype=torch.float64).to(
        dtype
    )


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor, down: Tensor, scaling: float) -> Tensor:
    return low_rank_step(F.linear(x, weight, bias), x, up, down, scaling)


def tensors(shape: tuple[int, ...] = (2, 3), dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {
        "x": draw(*shape, IN, dtype=dtype),
        "weight": draw(OUT, IN, dtype=dtype),
        "bias": draw(OUT, dtype=dtype),
        "up": draw(OUT, R, dtype=dtype),
        "down": draw(R, IN, dtype=dtype, seed=1),
    }


def trained(given: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: t.detach().clone().requires_grad_(name in names) for name, t in given.items()}


def grads(given: dict[str, Tensor]) -> dict[str, Tensor | None]:
    return {name: t.grad for name, t in given.items()}


# The same values and gradients


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 1, 3, 2), (0,), (2, 0)])
def test_values_and_gradients_are_those_of_the_plain_form_for_any_leading_shape(shape: tuple[int, ...]) -> None:
    ours, plain = (trained(tensors(shape), "x", "bias", "up", "down") for _ in range(2))
    output, expected = fused_linear(**ours, scaling=0.7), reference(**plain, scaling=0.7)
    assert output.shape == (*shape, OUT)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    output.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(grads(ours), grads(plain), rtol=0, atol=1e-10)


@pytest.mark.parametrize("lies", ["transposed", "strided", "expanded"])
def test_inputs_and_gradients_may_lie_in_memory_as_they_like(lies: str) -> None:
    def laid_out(values: Tensor) -> Tensor:
        if lies == "transposed":
            return values.transpose(0, 1).contiguous().transpose(0, 1)
        if lies == "strided":
            return values.repeat_interleave(2, -1)[..., ::2]
        return values[:, :1].expand(values.shape)

    results = []
    for form in (fused_linear, reference):
        given = trained(tensors((3, 4)), "up", "down", "bias")
        x = laid_out(given.pop("x")).requires_grad_()
        output = form(x, **given, scaling=0.7)
        output.backward(laid_out(draw(3, 4, OUT)))
        results.append({"output": output.detach(), "x": x.grad, **grads(given)})
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


def small() -> dict[str, Tensor]:
    return {"x": draw(2, 2, 3), "weight": draw(2, 3), "bias": draw(2), "up": draw(2, 1), "down": draw(1, 3, seed=1)}


SUBSETS = [
    names for n in range(1, 5) for names in itertools.combinations(("x", "bias", "up", "down"), n)
]  # of what is trained


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_first_and_second_derivatives_are_right_whatever_is_trained(names: tuple[str, ...], dropout: float) -> None:
    given = trained(small(), *names)

    def compute(*values: Tensor) -> Tensor:
        torch.manual_seed(3)
        return fused_linear(**{**given, **dict(zip(names, values, strict=True))}, scaling=0.7, dropout=dropout)

    values = tuple(given[name] for name in names)
    assert gradcheck(compute, values)
    assert gradgradcheck(compute, values)


@pytest.mark.parametrize("names", [("x", "y", "up", "down"), ("up",), ("down",), ("x",), ("y", "up")], ids="+".join)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_derivatives_around_any_output_are_right(names: tuple[str, ...], dropout: float) -> None:
    given = small()
    given = trained({name: given[name] for name in ("x", "up", "down")} | {"y": draw(2, 2, 2, seed=5)}, *names)

    def compute(*values: Tensor) -> Tensor:
        torch.manual_seed(3)
        return fused_step(**{**given, **dict(zip(names, values, strict=True))}, scaling=0.7, dropout=dropout)

    values = tuple(given[name] for name in names)
    assert gradcheck(compute, values)
    assert gradgradcheck(compute, values)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("names", [("output", "excess", "bias"), ("output",), ("excess",)], ids="+".join)
def test_derivatives_of_the_gain_are_right(names: tuple[str, ...], biased: bool) -> None:
    given = {"output": draw(2, 2, 3), "excess": draw(3), "bias": draw(3, seed=1) if biased else None}
    names = tuple(name for name in names if given[name] is not None)
    values = tuple(given[name].requires_grad_() for name in names)

    def compute(*values: Tensor) -> Tensor:
        return with_gain(**{**given, **dict(zip(names, values, strict=True))})

    assert gradcheck(compute, values)
    assert gradgradcheck(compute, values)
    y, b = given["output"], given["bias"] if biased else 0.0
    torch.testing.assert_close(compute(*values), y + given["excess"] * (y - b), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("biased", [False, True])
def test_where_the_change_is_zero_the_output_is_the_layers_bit_for_bit(dtype: torch.dtype, biased: bool) -> None:
    given = tensors((N,), dtype)
    given["up"].zero_()
    if not biased:
        given["bias"] = None
    expected = F.linear(given["x"], given["weight"], given["bias"])
    output = fused_linear(**given, scaling=0.7)
    assert torch.equal(output, expected)
    assert torch.equal(fused_step(expected, given["x"], given["up"], given["down"], 0.7), expected)
    assert torch.equal(with_gain(output, torch.zeros(OUT), given["bias"]), expected)


@pytest.mark.parametrize("dtype", HALF)
def test_in_half_precision_everything_is_as_near_to_the_exact_value_as_the_plain_form_is(dtype: torch.dtype) -> None:
    exact = trained(tensors((N,)), "x", "up", "down")
    narrow = {name: t.detach().to(dtype) for name, t in exact.items()}
    exact = trained({name: t.double() for name, t in narrow.items()}, "x", "up", "down")  # what is given has no error
    reference(**exact, scaling=0.7).sin().sum().backward()
    errors = []
    for form in (fused_linear, reference):
        given = trained({**narrow, "up": narrow["up"].float(), "down": narrow["down"].float()}, "x", "up", "down")
        output = form(**given, scaling=0.7)
        assert output.dtype == dtype
        output.double().sin().sum().backward()
        assert (given["x"].grad.dtype, given["up"].grad.dtype, given["down"].grad.dtype) == (
            dtype,
            *2 * [torch.float32],
        )
        assert all(given[n].grad.is_contiguous() for n in ("up", "down"))
        errors.append(
            [(given[n].grad.double() - exact[n].grad).norm() / exact[n].grad.norm() for n in ("x", "up", "down")]
        )
    assert all(ours <= 1.5 * plain + HALF[dtype] for ours, plain in zip(*errors, strict=True))


def test_few_rows_on_a_cpu_are_computed_in_the_precision_of_the_factors() -> None:
    given = tensors((4,), torch.bfloat16)
    x, up, down = given["x"], draw(OUT, R, dtype=torch.float32), draw(R, IN, dtype=torch.float32)
    term = low_rank_step(torch.zeros(4, OUT, dtype=torch.bfloat16), x, up, down, 1.0)
    assert torch.equal(term, (x.float() @ down.T @ up.T).bfloat16())


def test_dropout_zeroes_what_the_plain_form_zeroes_from_the_same_seed() -> None:
    results = []
    for fused in (True, False):
        given = trained(tensors((N,), torch.float32), "x", "up", "down")
        torch.manual_seed(5)
        if fused:
            output = fused_linear(**given, scaling=0.7, dropout=0.3)
        else:
            x, weight, bias, up, down = given.values()
            output = low_rank_step(F.linear(x, weight, bias), dropout(x, 0.3), up, down, 0.7)
        output.square().sum().backward()
        results.append({"output": output.detach(), **grads(given)})
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-3)


def test_a_backward_can_run_twice_and_gives_the_same_bits() -> None:
    given = trained(tensors((N,), torch.float32), "x", "up", "down")
    loss = fused_linear(**given, scaling=0.7).square().sum()
    first = torch.autograd.grad(loss, [given["x"], given["up"], given["down"]], retain_graph=True)
    second = torch.autograd.grad(loss, [given["x"], given["up"], given["down"]])
    assert all(map(torch.equal, first, second))


def test_memory_that_was_never_written_is_not_read() -> None:
    """In deterministic mode PyTorch fills such memory with NaN."""
    given = trained(tensors((N,), torch.float32), "x", "up", "down")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        y = F.linear(given["x"], given["weight"])
        output = fused_linear(**given, scaling=0.7, dropout=0.2) + fused_step(
            y, given["x"], given["up"], given["down"], 0.7
        )
        output.square().sum().backward()
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(t.isfinite().all() for t in (output, given["x"].grad, given["up"].grad, given["down"].grad))


# On layers: the same results in both forms, whatever the method


@pytest.fixture
def form(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def take(name: str) -> None:
        for least in ("_FEWEST_ROWS", "_MANY_ROWS"):
            monkeypatch.setattr(functional, least, {"fused": 0, "plain": math.inf}[name])

    return take


METHODS: dict[str, Method] = {
    name: cls().at(2, 1.0)
    for name, cls in known_methods().items()
    if cls.__module__.startswith("lightning_lora.methods.")
} | {"LoRA that keeps its start": LoRA(r=2, alpha=1.0, init="pissa"), "DVoRA": VeRA(r=2, magnitude=True)}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(IN, OUT),
    "linear without bias": lambda: nn.Linear(IN, OUT, bias=False),
    "transformers' Conv1D": lambda: Conv1D(OUT, IN),
}


def adapted(
    method: Method,
    layer: Callable[[], nn.Module] = LAYERS["linear"],
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> nn.Module:
    """A layer with an adapter that changes it."""
    torch.manual_seed(0)
    model = nn.Sequential(layer().to(dtype)).requires_grad_(False)
    inject(model, method, seed=1, **options)
    generator = torch.Generator().manual_seed(2)
    for adapter in (module for module in model.modules() if isinstance(module, Adapter)):
        shapes = {name: parameter.shape for name, parameter in adapter.named_parameters(recurse=False)}
        values = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        adapter.load_state_dict(values, strict=False)
    return model


def results(model: nn.Module, x: Tensor, amp: bool = False) -> dict[str, Tensor | None]:
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        output = model(x)
    output.double().sin().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return {"output": output.detach(), "x": x.grad, **found}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_every_method_gives_the_same_in_both_forms(
    method: Method, layer: Callable[[], nn.Module], form: Callable[[str], None]
) -> None:
    model, x = adapted(method, layer), draw(2, N // 2, IN)
    form("fused")
    ours = results(model, x)
    form("plain")
    torch.testing.assert_close(ours, results(model, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("regime", ["autocast", "autocast of half precision", "bf16"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_every_method_gives_the_same_up_to_rounding_in_half_precision(
    method: Method, regime: str, form: Callable[[str], None]
) -> None:
    model = adapted(method, dtype=torch.bfloat16 if regime == "bf16" else torch.float32)
    x = draw(2, N // 2, IN, dtype=torch.float32 if regime == "autocast" else torch.bfloat16)
    form("fused")
    ours = results(model, x, "autocast" in regime)
    form("plain")
    plain = results(model, x, "autocast" in regime)
    assert {name: t is not None and t.dtype for name, t in ours.items()} == {
        name: t is not None and t.dtype for name, t in plain.items()
    }
    for name, expected in plain.items():
        if expected is not None:
            assert (ours[name].double() - expected.double()).norm() <= 0.02 * expected.double().norm(), name


def nodes(output: Tensor) -> set[str]:
    """The names of all nodes of an output's graph."""
    found, todo = set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None:
            found.add(type(node).__name__)
            todo += [following for following, _ in node.next_functions]
    return found


FUSED = "_LowRankStepBackward"


def test_many_rows_take_the_fused_form_and_a_few_the_plain_one() -> None:
    model = adapted(LoRA(r=2))
    assert nodes(model(draw(64, IN))) == {FUSED, "AccumulateGrad"}
    assert nodes(model(draw(4, 16, IN))) == {FUSED, "AccumulateGrad"}
    assert FUSED not in nodes(model(draw(63, IN)))


@pytest.mark.parametrize("amp", [False, True])
def test_in_half_precision_a_cpu_takes_the_fused_form_for_more_rows(amp: bool) -> None:
    model = adapted(LoRA(r=2), dtype=torch.float32 if amp else torch.bfloat16)
    x = draw(1024, IN, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        assert FUSED in nodes(model(x))
        assert FUSED not in nodes(model(x[:1023]))


@pytest.mark.parametrize("method", [LoRA(r=2), LoRAFA(r=2)])
def test_without_gradients_the_same_bits_come_out(method: Method) -> None:
    model, x = adapted(method, dtype=torch.float32), draw(N, IN, dtype=torch.float32)
    expected = model(x)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
    assert torch.equal(model.requires_grad_(False)(x), expected)


def test_two_adapters_on_one_layer_are_added_one_after_the_other(form: Callable[[str], None]) -> None:
    from lightning_lora import use

    model = adapted(LoRA(r=2))
    inject(model, LoRA(r=3), task="second", seed=4)
    sites(model)[0].adapter("second").lora_B.data.normal_()
    use(model, "default", "second")
    form("fused")
    ours = results(model, draw(N, IN))
    form("plain")
    torch.testing.assert_close(ours, results(model, draw(N, IN)), rtol=0, atol=1e-12)


# Exact costs


class Launches(TorchDispatchMode):
    """The operations that run a kernel, by name."""

    without_kernel = (
        *("view", "_unsafe_view", "t", "transpose", "expand", "detach", "alias", "unsqueeze", "squeeze", "slice"),
        *("empty", "empty_like", "new_empty", "promote_types", "scalar_tensor"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.overloadpacket.__name__
        if name not in self.without_kernel and not name.startswith("split"):
            self.names.append(name)
        return op(*args, **(kwargs or {}))


def costs(model: nn.Module, x: Tensor, amp: bool) -> tuple[int, int, int]:
    """Kernels forward, kernels backward, bytes kept beside parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16, enabled=amp),
        saved_tensors_hooks(pack, lambda t: t),
        Launches() as ahead,
    ):
        output = model(x)
    gradient = torch.ones_like(output)
    with Launches() as back:
        output.backward(gradient)
    return len(ahead.names), len(back.names), sum(kept.values())


def x_and(z: int, mask: bool = False, output: bool = False, derived: int = 0) -> Callable[[int], int]:
    """Bytes of x, of z with so many columns, of a mask, of the output, and of values computed from parameters."""
    return lambda size: size * (N * (IN + z) + N * OUT * output + derived) + N * IN * mask


W32, AMP, AMP_HALF, W16 = "fp32", "autocast", "autocast of half precision", "bf16 base, fp32 adapter"
LORA, FA, DROPS = LoRA(r=R), LoRAFA(r=R), LoRA(r=R, dropout=0.1)
ADALORA = known_methods()["AdaLoRA"]().at(R, 1.0)
# Of one layer without bias: launches forward, backward, and what is kept. On a CPU only, one or two of those in half
# precision turn a small matrix, and with dropout there are four and one more.
COSTS = [
    (W32, LORA, 3, 5, x_and(R)),
    (AMP, LORA, 7, 13, x_and(R)),
    (AMP_HALF, LORA, 6, 12, x_and(R)),
    (W16, LORA, 5, 11, x_and(R)),
    (W32, FA, 3, 4, lambda size: size * N * R),
    (W16, FA, 5, 8, lambda size: size * N * R),
    (W32, DROPS, 4 + 4, 7 + 1, x_and(R, mask=True)),
    (AMP_HALF, DROPS, 7 + 4, 14 + 1, x_and(R, mask=True)),
    (W16, DROPS, 6 + 4, 13 + 1, x_and(R, mask=True)),
    (W32, ADALORA, 4, 8, x_and(R, derived=R * IN)),
    (W16, ADALORA, 6, 13, x_and(R, derived=R * IN)),
    (W32, VeRA(r=R), 5, 9, lambda size: size * (N * R + OUT * R)),
    (W16, VeRA(r=R), 7, 12, lambda size: size * (N * R + OUT * R)),
]


@pytest.mark.parametrize(
    ("regime", "method", "ahead", "back", "kept"),
    COSTS,
    ids=[f"{c[0]}-{type(c[1]).__name__}{'-dropout' * bool(c[1].dropout)}" for c in COSTS],
)
def test_a_layer_launches_and_keeps_exactly_this(
    regime: str, method: Method, ahead: int, back: int, kept: Callable[[int], int], form: Callable[[str], None]
) -> None:
    form("fused")
    wide = regime in (W32, AMP)
    model = adapted(method, LAYERS["linear without bias"], torch.bfloat16 if regime == W16 else torch.float32)
    x = draw(N, IN, dtype=torch.float32 if wide else torch.bfloat16).requires_grad_()
    assert costs(model, x, regime in (AMP, AMP_HALF)) == (ahead, back, kept(4 if regime == W32 else 2))


@pytest.mark.parametrize(("dtype", "ahead", "back"), [(torch.float32, 15, 10), (torch.bfloat16, 18, 18)])
def test_dora_launches_and_keeps_exactly_this(
    dtype: torch.dtype, ahead: int, back: int, form: Callable[[str], None]
) -> None:
    form("fused")
    model = adapted(known_methods()["DoRA"]().at(R, 1.0), LAYERS["linear without bias"], dtype)
    x = draw(N, IN, dtype=dtype).requires_grad_()
    per_unit = 3 * 4 * OUT + OUT  # the norm, the gain, and where they are not 0
    found = costs(model, x, False)
    assert found[:2] == (ahead, back)
    assert found[2] <= x_and(R, output=True)(dtype.itemsize) + per_unit


@pytest.mark.parametrize("amp", [False, True])
def test_layers_that_share_their_input_keep_it_once(amp: bool, form: Callable[[str], None]) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(IN, OUT, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) + self.k(x) + self.v(x)

    model = Attention().requires_grad_(False)
    inject(model, LORA)
    form("fused")
    assert costs(model, draw(N, IN, dtype=torch.float32), amp)[2] == (2 if amp else 4) * N * (IN + 3 * R)


def test_an_input_that_needs_no_gradient_gets_none_computed() -> None:
    model = adapted(LORA, LAYERS["linear without bias"], torch.float32)
    assert costs(model, draw(N, IN, dtype=torch.float32), False)[:2] == (3, 3)  # u, dA, dB
    model = adapted(FA, LAYERS["linear without bias"], torch.float32)
    assert costs(model, draw(N, IN, dtype=torch.float32), False)[:2] == (3, 1)  # dB alone


def product(into: Any, one: torch.Size, other: torch.Size, **kwargs: Any) -> int:
    return 2 * one[0] * one[1] * other[1]


IN_PLACE = {torch.ops.aten.addmm_: product}  # which PyTorch's counter leaves out


def test_a_step_does_exactly_this_many_operations() -> None:
    model, x = adapted(LORA, dtype=torch.float32), draw(N, IN, dtype=torch.float32).requires_grad_()
    base, low_rank = 2 * N * IN * OUT, 2 * N * R * (IN + OUT)
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counted:
        output = model(x)
    assert counted.get_total_flops() == base + low_rank
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counted:
        output.sum().backward()
    assert counted.get_total_flops() == base + 2 * low_rank


# Nothing else is written to


class Kept(nn.Linear):
    """A forward of its own that computes the same and keeps its output; it may even return its input."""

    def forward(self, input: Tensor) -> Tensor:
        self.last = F.linear(input, self.weight, self.bias)
        return self.last


def test_the_output_that_a_subclass_keeps_stays_as_it_was(form: Callable[[str], None]) -> None:
    model, x = adapted(LoRA(r=2), lambda: Kept(IN, OUT)), draw(N, IN)
    output = model(x)
    layer = model[0]
    assert torch.equal(layer.last, F.linear(x, layer.weight, layer.bias))
    assert "_LowRankStepBackward" in nodes(output)
    ours = results(model, x)
    form("plain")
    torch.testing.assert_close(ours, results(model, x), rtol=0, atol=1e-12)


class Passes(nn.Linear):
    """Where its weight is the identity it returns the input itself, or a view of it."""

    def forward(self, input: Tensor) -> Tensor:
        return input.view(input.shape)


def test_an_input_that_is_returned_is_not_written_to() -> None:
    def identity() -> nn.Module:
        layer = Passes(IN, IN, bias=False)
        nn.init.eye_(layer.weight)
        return layer

    model, x = adapted(LoRA(r=2), identity), draw(N, IN)
    before = x.clone()
    output = model(x)
    assert torch.equal(x, before)
    assert not torch.equal(output, x)
    with torch.no_grad():
        model(x)
    assert torch.equal(x, before)


def test_what_the_layers_before_keep_for_their_backward_is_not_written_to() -> None:
    model = nn.Sequential(nn.Sigmoid(), *adapted(LoRA(r=2)), nn.Sigmoid())
    results(model, draw(N, IN))  # PyTorch refuses a backward over changed values


class AddsInPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x += 1
        return x


class Adds(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
@pytest.mark.parametrize("change", [(nn.ReLU(inplace=True), nn.ReLU()), (AddsInPlace(), Adds())])
def test_outputs_may_be_changed_in_place(method: str, change: tuple[nn.Module, nn.Module]) -> None:
    model, x = adapted(known_methods()[method]().at(2, 1.0)), draw(2, N // 2, IN)
    in_place, out_of_place = (results(nn.Sequential(*model, one), x) for one in change)
    torch.testing.assert_close(in_place, out_of_place, rtol=0, atol=0)


def test_hooks_see_one_finished_output() -> None:
    model, seen = adapted(LoRA(r=2)), []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    assert model(draw(N, IN)) is seen[0]


# Where other rules hold


def test_a_thawed_weight_and_bias_get_their_gradients() -> None:
    ours = adapted(LoRA(r=2))
    ours[0].weight.requires_grad_()
    ours[0].bias.requires_grad_()
    found = results(ours, draw(N, IN))
    plain = nn.Sequential(nn.Linear(IN, OUT, dtype=torch.float64))
    adapter = sites(ours)[0].adapter("default")
    plain[0].weight.data = ours[0].weight.data + adapter.delta().detach()
    plain[0].bias.data = ours[0].bias.data
    expected = results(plain, draw(N, IN))
    torch.testing.assert_close(found["0.weight"], expected["0.weight"], rtol=0, atol=1e-12)
    torch.testing.assert_close(found["0.bias"], expected["0.bias"], rtol=0, atol=1e-12)


def test_a_trained_bias_beside_a_frozen_weight_gets_its_gradient(form: Callable[[str], None]) -> None:
    for method in ("LoRA", "DoRA"):
        model = adapted(known_methods()[method]().at(2, 1.0))
        model[0].bias.requires_grad_()
        form("fused")
        ours = results(model, draw(N, IN))
        form("plain")
        torch.testing.assert_close(ours, results(model, draw(N, IN)), rtol=0, atol=1e-12)
        assert ours["0.bias"].any()


class Shifted(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return values + 1


@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_what_a_parametrization_computes_is_computed(parameter: str) -> None:
    model, x = adapted(LoRA(r=2)), draw(N, IN)
    term = model(x) - F.linear(x, model[0].weight, model[0].bias)
    parametrize.register_parametrization(model[0], parameter, Shifted())
    torch.testing.assert_close(model(x), F.linear(x, model[0].weight, model[0].bias) + term, rtol=0, atol=1e-12)


def test_a_backward_inside_autocast_stays_in_the_precision_of_the_forward() -> None:
    model, x = adapted(LoRA(r=2), dtype=torch.float32), draw(N, IN, dtype=torch.float32)
    expected = results(model, x)
    inside = x.clone().requires_grad_()
    output = model(inside)
    loss = output.double().sin().sum()
    with torch.autocast("cpu", torch.bfloat16):
        loss.backward()
    assert torch.equal(inside.grad, expected["x"])


def test_float64_stays_float64_under_autocast() -> None:
    model, x = adapted(LoRA(r=2)), draw(N, IN)
    expected = results(model, x)
    found = results(model, x, amp=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_weight_that_autocast_casts_is_cast_twice_for_many_rows_and_kept_for_few() -> None:
    model = adapted(LORA, LAYERS["linear without bias"], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        many = model(draw(1024, IN, dtype=torch.bfloat16).requires_grad_())
        few = model(draw(1023, IN, dtype=torch.bfloat16).requires_grad_())
    assert "MmBackward0" not in nodes(many)
    assert "MmBackward0" in nodes(few)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_gives_the_same_gradients(reentrant: bool, dropout: float) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    model, x = adapted(LoRA(r=2, dropout=dropout)), draw(N, IN)
    expected = results(model, x)
    found = results(Checkpointed(model), x)
    assert all(
        torch.equal(found[name if name in ("output", "x") else f"inner.{name}"], t)
        for name, t in expected.items()
        if t is not None
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
def test_torch_compile_makes_one_graph_of_the_plain_form(method: str) -> None:
    model, x = adapted(known_methods()[method]().at(2, 1.0)), draw(N, IN)
    expected = results(model, x)
    torch._dynamo.reset()
    compiled = results(torch.compile(model, fullgraph=True, backend="aot_eager"), x)
    found = {name.removeprefix("_orig_mod."): t for name, t in compiled.items()}
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_export_sees_every_operation() -> None:
    model, x = adapted(LoRA(r=2), dtype=torch.float32).eval(), draw(N, IN, dtype=torch.float32)
    exported = torch.export.export(model, (x,), strict=False)
    torch.testing.assert_close(exported.module()(x), model(x))


def test_function_transforms_see_every_operation() -> None:
    model, x = adapted(LoRA(r=2)), draw(3, N, IN)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).sin().sum()

    per_batch = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    expected = results(model, x)
    for name in (name for name in expected if "lora" in name):
        torch.testing.assert_close(per_batch[name].sum(0), expected[name], rtol=0, atol=1e-11)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # PyTorch's own call
def test_forward_mode_differentiation_works() -> None:
    model, x, tangent = adapted(LoRA(r=2)), draw(N, IN), draw(N, IN, seed=9)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent
    step = 1e-6
    torch.testing.assert_close(
        found, (model(x + step * tangent) - model(x - step * tangent)) / (2 * step), rtol=0, atol=1e-7
    )


@pytest.mark.parametrize("method", [LoRA(r=2), LoRAFA(r=2), known_methods()["DoRA"]().at(2, 1.0)])
def test_a_gradient_penalty_trains_as_in_the_plain_form(method: Method, form: Callable[[str], None]) -> None:
    model = adapted(method)

    def penalised() -> dict[str, Tensor | None]:
        x = draw(N, IN).requires_grad_()
        trained = [x, *(p for p in model.parameters() if p.requires_grad)]
        loss = model(x).sin().sum()
        slopes = torch.autograd.grad(loss, trained, create_graph=True)
        (loss + sum(slope.square().sum() for slope in slopes)).backward()
        found = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        return {"x": x.grad, **found}

    form("fused")
    ours = penalised()
    form("plain")
    torch.testing.assert_close(ours, penalised(), rtol=1e-10, atol=1e-10)


class Tagged(Tensor):
    """A subclass, as distributed and packed tensors are."""


def test_tensors_with_rules_of_their_own_take_the_plain_form() -> None:
    model, x = adapted(LoRA(r=2)), draw(N, IN)
    assert FUSED not in nodes(model(x.as_subclass(Tagged)))
    torch.testing.assert_close(model(x.as_subclass(Tagged)).as_subclass(Tensor), model(x), rtol=0, atol=1e-12)


LOOKS_UP = "embedding"
COMPILED = [("linear", name) for name in ("LoRA", "DoRA", "VeRA", "AdaLoRA")] + [(LOOKS_UP, "LoRA")]


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's own
@pytest.mark.parametrize("shape", [(6,), (2, 3)])
@pytest.mark.parametrize(("layer", "method"), COMPILED)
def test_what_inductor_compiles_computes_the_same(layer: str, method: str, shape: tuple[int, ...]) -> None:
    looks_up = layer == LOOKS_UP
    model = adapted(
        METHODS[method],
        (lambda: nn.Embedding(IN, OUT)) if looks_up else LAYERS[layer],
        torch.float32,
        target_modules=["0"],
    )
    x = torch.arange(6).view(shape) if looks_up else draw(*shape, IN, dtype=torch.float32)
    torch._dynamo.reset()
    results = []
    for run in (model, torch.compile(model, fullgraph=True)):
        output = run(x)
        ours = [p for p in model.parameters() if p.requires_grad]
        results.append([output.detach(), *torch.autograd.grad(output.square().sum(), ours)])
    for found, right in zip(*reversed(results), strict=True):
        assert (found - right).norm() <= 1e-5 * right.norm()


@pytest.mark.parametrize("shape", [(0, IN), (2, 0, IN), (IN,)])
def test_empty_batches_and_single_rows_pass(shape: tuple[int, ...], form: Callable[[str], None]) -> None:
    model = adapted(LoRA(r=2))
    for name in ("fused", "plain"):
        form(name)
        found = results(model, draw(*shape))
        assert found["output"].shape == (*shape[:-1], OUT)
        assert found["x"].shape == shape


def test_a_dora_of_rank_0_passes(form: Callable[[str], None]) -> None:
    model, x = adapted(known_methods()["DoRA"](r=0)), draw(N, IN)
    form("fused")
    ours = results(model, x)
    form("plain")
    torch.testing.assert_close(ours, results(model, x), rtol=0, atol=1e-12)


def test_an_input_of_the_wrong_size_is_refused_in_pytorchs_words() -> None:
    with pytest.raises(RuntimeError, match=f"mat1 and mat2 shapes cannot be multiplied \\({N}x7 and {IN}x{OUT}\\)"):
        adapted(LoRA(r=2))(draw(N, 7))


@pytest.fixture(autouse=True)
def _whole_graphs() -> Iterator[None]:
    yield
    torch._dynamo.reset()
