"""Under autocast layers that are given one fp32 input share its cast: no result changes, nothing outlives its use."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import assert_same_bits
from test_functional import Launches
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRA, LoRACallback, LoRAFA, Method, functional, inject, known_methods, shared_casts, sites
from lightning_lora.adapter import Adapter
from lightning_lora.shared_casts import shared_cast

N, IN, OUT, R = 96, 20, 12, 4
BF16 = torch.bfloat16
LORA = LoRA(r=R)


@pytest.fixture(autouse=True)
def _fused_at_any_size(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(functional, "_FEWEST_ROWS", 0)
    monkeypatch.setattr(functional, "_MANY_ROWS", 0)
    yield
    shared_casts._thread.last.cast = None


class Attention(nn.Module):
    """Three layers on one input, and what happens between them."""

    def __init__(self, between: Callable[[Tensor], Tensor | None] = lambda x: None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(IN, OUT) for _ in range(3))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.5  # no leaf
        q = self.q(x)
        changed = self.between(x)
        x = x if changed is None else changed
        return (q * self.k(x)).sigmoid() * self.v(x)


def adapted(model: nn.Module, method: Method = LORA, share: bool = True) -> nn.Module:
    inject(model, method, seed=1, share_inputs=share)
    generator = torch.Generator().manual_seed(2)
    for adapter in (module for module in model.modules() if isinstance(module, Adapter)):
        shapes = {name: parameter.shape for name, parameter in adapter.named_parameters(recurse=False)}
        adapter.load_state_dict({n: 0.3 * torch.randn(s, generator=generator) for n, s in shapes.items()}, strict=False)
    return model


def given() -> Tensor:
    return torch.randn(N, IN, generator=torch.Generator().manual_seed(5)).requires_grad_()


def results(model: Callable[[Tensor], Tensor], named: nn.Module, dtype: torch.dtype = BF16) -> dict[str, Any]:
    x = given()
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype):
        output = model(x)
    output.float().sin().sum().backward()
    found = {name: p.grad for name, p in named.named_parameters() if p.grad is not None}
    named.zero_grad()
    return {"output": output.detach(), "x": x.grad, **found}


class Casts(Launches):
    """How often an input of this width is cast to half precision."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = super().__torch_dispatch__(op, types, args, kwargs)
        if op.overloadpacket.__name__ == "_to_copy" and output.shape == (N, IN) and output.dtype != torch.float32:
            self.count = getattr(self, "count", 0) + 1
        return output


def casts(run: Callable[[], Any]) -> int:
    with Casts() as counted, torch.autocast("cpu", BF16):
        run()
    return getattr(counted, "count", 0)


# The same bits, for less


METHODS = {
    name: cls().at(R, 1.0)
    for name, cls in known_methods().items()
    if cls.__module__.startswith("lightning_lora.methods.")
} | {"dropout": LoRA(r=R, dropout=0.3)}


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_outputs_and_all_gradients_are_the_same_bit_for_bit(method: Method, dtype: torch.dtype) -> None:
    shared, own = (adapted(Attention(), method, share) for share in (True, False))
    assert_same_bits(results(shared, shared, dtype), results(own, own, dtype))


def test_three_layers_launch_two_casts_less_and_keep_their_input_once() -> None:
    found = []
    for share in (True, False):
        model, x, kept = adapted(Attention(), share=share), given(), dict[int, int]()
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(tensor: Tensor, kept: dict[int, int] = kept, own: set[int] = own) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autocast("cpu", BF16), saved_tensors_hooks(pack, lambda t: t), Launches() as ahead:
            output = model(x)
        with Launches() as back:
            output.float().sum().backward()
        found.append((len(ahead.names), len(back.names), sum(kept.values())))
    (ahead, back, kept_bytes), expected = found
    assert (ahead, back, kept_bytes) == (expected[0] - 2, expected[1], expected[2] - 2 * 2 * N * IN)


@pytest.mark.parametrize("method", [LORA, LoRAFA(r=R)])
def test_one_cast_serves_all_also_where_nothing_is_kept(method: Method) -> None:
    model = adapted(Attention(), method)
    assert casts(lambda: model(given())) == 1
    assert casts(torch.no_grad()(lambda: model(given()))) == 1


def test_with_the_switch_off_each_layer_casts_its_own() -> None:
    assert casts(lambda: adapted(Attention(), share=False)(given())) == 3


def test_the_switch_can_be_turned_later() -> None:
    model = adapted(Attention(), share=False)
    inject(model, LORA, share_inputs=True)
    assert casts(lambda: model(given())) == 1


def test_the_callback_hands_the_switch_on(tmp_path: Any) -> None:
    from conftest import Lit, loader
    from lightning.pytorch import Trainer

    for share in (True, False):
        module = Lit()
        options = {"max_steps": 1, "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
        Trainer(
            accelerator="cpu",
            default_root_dir=tmp_path,
            enable_model_summary=False,
            callbacks=[LoRACallback(LoRA(r=2), share_inputs=share)],
            **options,
        ).fit(module, loader())
        assert {site.adapter("default").shares_inputs for site in sites(module)} == {share}


def test_second_derivatives_are_the_same_bit_for_bit() -> None:
    found = []
    for share in (True, False):
        model, x = adapted(Attention(), share=share), given()
        trained = [x, *(p for p in model.parameters() if p.requires_grad)]
        with torch.autocast("cpu", BF16):
            loss = model(x).float().sin().sum()
        slopes = torch.autograd.grad(loss, trained, create_graph=True)
        penalty = sum(slope.square().sum() for slope in slopes)
        found.append(torch.autograd.grad(penalty, trained))
    assert all(map(torch.equal, *found))
    assert all(gradient.any() for gradient in found[0])


# Whatever happens between two layers


def in_place(x: Tensor) -> None:
    with torch.no_grad():
        x.add_(1)


def through_a_view(x: Tensor) -> None:
    with torch.no_grad():
        x.detach()[0].add_(1)


BETWEEN: dict[str, tuple[Callable[[Tensor], Tensor | None], int]] = {
    "the input is changed in place": (in_place, 2),
    "it is changed through a view": (through_a_view, 2),
    "another tensor takes its place": (lambda x: x + 1, 2),
    "an equal one does": (lambda x: x.clone(), 2),
    "a view does": (lambda x: x.view_as(x), 2),
}


@pytest.mark.parametrize(("between", "count"), BETWEEN.values(), ids=BETWEEN.keys())
def test_layers_see_what_the_input_holds_when_they_run(between: Callable[[Tensor], Tensor | None], count: int) -> None:
    shared, own = (adapted(Attention(between), share=share) for share in (True, False))

    def forward(model: nn.Module) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", BF16):
            output: Tensor = model(given())
        return output

    assert torch.equal(forward(shared), forward(own))
    assert casts(torch.no_grad()(lambda: shared(given()))) == count


def test_gradients_are_those_of_what_each_layer_saw() -> None:
    shared, own = (adapted(Attention(in_place), share=share) for share in (True, False))
    assert_same_bits(results(shared, shared), results(own, own))


def test_another_dtype_is_another_cast() -> None:
    x = torch.randn(3, 4)
    assert shared_cast(x, BF16).dtype == BF16
    assert torch.equal(shared_cast(x, torch.float16), x.half())
    assert torch.equal(shared_cast(x, BF16), x.bfloat16())


def test_an_address_that_is_used_again_is_another_input() -> None:
    for value in range(50):
        x = torch.full((64, 64), float(value))
        assert torch.equal(shared_cast(x, BF16), x.bfloat16())
        del x


def test_a_layer_that_is_skipped_gets_no_gradient() -> None:
    class Skips(Attention):
        def forward(self, x: Tensor) -> Tensor:
            x = x * 1.5
            return self.q(x) + self.v(x)

    shared, own = (adapted(Skips(), share=share) for share in (True, False))
    assert_same_bits(results(shared, shared), results(own, own))
    assert not any("k." in name for name in results(shared, shared))


def test_layers_that_call_each_other_do_not_mix_their_inputs() -> None:
    class Nested(Attention):
        def forward(self, x: Tensor) -> Tensor:
            x = x * 1.5
            inner = torch.cat([self.q(x), self.v(x).detach()], -1)[:, :IN]
            return self.k(x) + self.k(inner) + self.v(inner) + self.v(x)

    shared, own = (adapted(Nested(), share=share) for share in (True, False))
    assert_same_bits(results(shared, shared), results(own, own))


def test_an_input_from_inference_mode_can_be_trained_on() -> None:
    model = adapted(Attention())
    x = given().detach()
    with torch.inference_mode(), torch.autocast("cpu", BF16):
        expected = model.q(x)
    with torch.autocast("cpu", BF16):
        output = model.q(x)
        assert torch.equal(output, expected)
        (output + model.k(x)).float().sum().backward()
    with torch.inference_mode(), torch.autocast("cpu", BF16):
        assert torch.equal(model.q(x * 1), expected)


def test_what_was_cast_without_gradients_gets_them_where_they_are_wanted() -> None:
    model, x = adapted(Attention()), given()
    with torch.autocast("cpu", BF16):
        with torch.no_grad():
            model.q(x)
        model.k(x).float().sum().backward()
    expected, own = given(), adapted(Attention(), share=False)
    with torch.autocast("cpu", BF16):
        own.k(expected).float().sum().backward()
    assert torch.equal(x.grad, expected.grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_bits_and_shares_when_it_computes_again(reentrant: bool) -> None:
    shared, own = (adapted(Attention(), share=share) for share in (True, False))

    def checkpointed(model: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: checkpoint(model, x, use_reentrant=reentrant)

    expected = results(own, own)
    assert_same_bits(results(checkpointed(shared), shared), expected)
    assert casts(lambda: checkpointed(shared)(given()).float().sum().backward()) == 2
    assert casts(lambda: checkpointed(own)(given()).float().sum().backward()) == 6


def test_kept_tensors_may_be_moved_elsewhere() -> None:
    shared, own = (adapted(Attention(), share=share) for share in (True, False))
    expected = results(own, own)
    with save_on_cpu():
        assert_same_bits(results(shared, shared), expected)


def test_threads_that_run_one_model_do_not_mix_their_inputs() -> None:
    turn, wrong = threading.Barrier(2, timeout=60), []

    def run(seed: int) -> None:
        for step in range(100):
            x = torch.full((8, 8), float(2 * step + seed))
            turn.wait()
            first = shared_cast(x, BF16)
            turn.wait()
            second = shared_cast(x, BF16)
            if not (torch.equal(first, x.bfloat16()) and first.data_ptr() == second.data_ptr()):
                wrong.append((seed, step))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Nothing outlives its use


def holds() -> Tensor | None:
    cast = shared_casts._thread.last.cast
    return None if cast is None else cast.copy


def test_the_copy_goes_with_the_input_at_once() -> None:
    gc.disable()
    try:
        x = torch.randn(3, 4, requires_grad=True)  # which a graph would hold
        shared_cast(x, BF16)
        cast = weakref.ref(holds())
        assert cast() is not None
        del x
        assert cast() is None
        assert holds() is None
    finally:
        gc.enable()


def test_the_copy_goes_when_another_thread_lets_go_of_the_input() -> None:
    held = [torch.randn(3, 4)]
    shared_cast(held[0], BF16)
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert holds() is None


def test_there_is_one_copy_at_most() -> None:
    first, second = torch.randn(3, 4), torch.randn(3, 4)
    gc.disable()
    try:
        shared_cast(first, BF16)
        cast = weakref.ref(holds())
        shared_cast(second, BF16)
        assert cast() is None
        del first
        assert torch.equal(holds(), second.bfloat16())
    finally:
        gc.enable()


def test_after_a_step_nothing_is_held() -> None:
    model = adapted(Attention())
    results(model, model)
    assert holds() is None


def test_a_model_that_has_run_can_be_copied() -> None:
    model = adapted(Attention())
    expected = results(model, model)
    assert_same_bits(results(other := copy.deepcopy(model), other), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_compile_sees_none_of_it() -> None:
    model = adapted(Attention())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", BF16):
        found, expected = compiled(given()), model(given())
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    assert holds() is None
