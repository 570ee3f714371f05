"""`AdapterEMA`: its average is right at every step, is where it should be, is small, and disturbs nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from conftest import Lit, loader
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
)
from lightning.pytorch.callbacks import StochasticWeightAveraging as SWA
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lora import AdapterEMA, LoRA, LoRACallback, inject, load_adapter, load_from_checkpoint
from lightning_lora.moving_average import MovingAverage

METHOD = LoRA(r=2, alpha=4)
DECAY = 0.8


def callback(**kwargs: Any) -> LoRACallback:
    return LoRACallback(METHOD, **kwargs)


def ema(**kwargs: Any) -> AdapterEMA:
    return AdapterEMA(**{"decay": DECAY} | kwargs)


def trained(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def kept(content: dict[str, Any], like: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: content["state_dict"][name] for name in like}


def by_hand(steps: list[dict[str, Tensor]], decay: float = DECAY) -> dict[str, Tensor]:
    """Return the average of values after each step that counts, in the arithmetic that AdapterEMA uses."""
    average = dict(steps[0])
    for step in steps[1:]:
        average = {name: torch.lerp(average[name], step[name], 1 - decay) for name in average}
    return average


class Watch(L.Callback):
    """Keeps what is trained: after every batch, while it is validated, and when training goes on after that."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []
        self.started: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.started.append(trained(pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append(trained(pl_module))

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.validated.append(trained(pl_module))


ONCE = loader(1)  # validates in one batch


# ---- the arithmetic


def test_the_average_after_every_step_is_what_it_is_by_hand(trainer: Any) -> None:
    watch = Watch()
    run = trainer(callbacks=[callback(modules_to_save=["second"]), ema(), watch], val_check_interval=1)
    run.fit(Lit(), loader(), ONCE)
    assert len(watch.steps) == len(watch.validated) == 8
    assert {"net.second.weight", "net.first.adapters.weight.default.lora_A"} <= watch.steps[0].keys()
    exact = {name: tensor.double() for name, tensor in watch.steps[0].items()}
    for count, (step, validated) in enumerate(zip(watch.steps, watch.validated, strict=True), start=1):
        if count > 1:
            exact = {name: DECAY * exact[name] + (1 - DECAY) * step[name].double() for name in exact}
            assert not same(validated, step)
        assert same(validated, by_hand(watch.steps[:count]))
        for name, average in exact.items():
            torch.testing.assert_close(validated[name].double(), average, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"accumulate_grad_batches": 3}])
@pytest.mark.parametrize("which", [{}, {"update_every_n_steps": 3}, {"update_starting_at_step": 2}])
def test_the_result_is_that_of_lightnings_own_average_to_rounding(
    which: dict[str, int], options: dict[str, int], trainer: Any
) -> None:
    ours, theirs = Lit(), Lit()
    lora = {"modules_to_save": ["second"], "lr_ratio": 4}
    trainer(callbacks=[ema(**which), callback(**lora)], max_epochs=3, **options).fit(ours, loader(5))
    trainer(callbacks=[callback(**lora), EMAWeightAveraging(decay=DECAY, **which)], max_epochs=3, **options).fit(
        theirs, loader(5)
    )
    assert ours.losses == theirs.losses
    plain = Lit()
    trainer(callbacks=[callback(**lora)], max_epochs=3, **options).fit(plain, loader(5))
    for name, average in state(theirs).items():
        torch.testing.assert_close(ours.state_dict()[name], average, rtol=1e-5, atol=1e-7)
        if name in trained(plain):
            assert not torch.allclose(plain.state_dict()[name], average, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize(
    ("options", "accumulate", "counted"),
    [
        ({}, 1, [0, 1, 2, 3, 4, 5]),
        ({}, 2, [1, 3, 5]),  # batches, of which two make a step
        ({}, 4, [3, 5]),  # Lightning steps at the end of the data
        ({"update_every_n_steps": 2}, 1, [0, 2, 4]),
        ({"update_every_n_steps": 2}, 2, [1, 5]),
        ({"update_starting_at_step": 3}, 1, [3, 4, 5]),
        ({"update_starting_at_step": 3, "update_every_n_steps": 2}, 1, [4]),
    ],
)
def test_only_steps_that_count_are_averaged(
    options: dict[str, int], accumulate: int, counted: list[int], trainer: Any
) -> None:
    watch, module = Watch(), Lit()
    run = trainer(callbacks=[callback(), ema(**options), watch], max_epochs=1, accumulate_grad_batches=accumulate)
    run.fit(module, loader(6))
    assert same(trained(module), by_hand([watch.steps[batch] for batch in counted]))


def test_a_parameter_that_does_not_move_keeps_its_very_value() -> None:
    module = nn.Linear(50, 50)
    before, average = state(module), MovingAverage(0.999)
    for _ in range(10):
        average.update(module)
    assert same(average.values, before)


def test_half_precision_is_averaged_in_fp32_because_its_steps_would_vanish() -> None:
    module, average = nn.Linear(4, 4).bfloat16(), MovingAverage(0.999)
    with torch.no_grad():
        module.weight.fill_(1)
        average.update(module)
        module.weight.fill_(2)
        average.update(module)
    torch.testing.assert_close(average.values["weight"], torch.full((4, 4), 1.001))
    average.put_in(module)
    assert module.weight.dtype == torch.bfloat16
    assert average.is_in(module)
    average.take_out(module)
    assert torch.equal(module.weight, torch.full((4, 4), 2.0).bfloat16())


def test_the_average_goes_where_the_strategy_moves_the_module() -> None:
    for hook in ("on_fit_start", "on_fit_end"):
        module, average = Lit(), ema()
        average._average.update(module)
        average._average.put_in(module)
        module.to("meta")
        getattr(average, hook)(None, module)
        held = [*average._average.values.values(), *average._average.set_aside.values()]
        assert {tensor.device.type for tensor in held} == {"meta"}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"decay": 1.0}, r"decay=1.0: must be at least 0 and below 1, for example AdapterEMA\(decay=0.999\)"),
        ({"decay": -0.1}, "decay=-0.1: must be"),
        ({"decay": float("nan")}, "decay=nan: must be"),
        ({"update_every_n_steps": 0}, "update_every_n_steps=0: must be at least 1"),
        ({"update_starting_at_step": -1}, "update_starting_at_step=-1: must be at least 0"),
    ],
)
def test_a_value_out_of_range_is_named(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        AdapterEMA(**options)


# ---- what it costs


class Copies(TorchDispatchMode):
    """Counts the elements of one module's tensors that are copied or computed with outside of forward and backward."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            for one in args:
                if isinstance(one, Tensor) and one.untyped_storage().data_ptr() in self.storages:
                    self.seen.append(str(func))
        return func(*args, **kwargs or {})


def test_the_base_is_never_copied_and_the_average_is_as_large_as_what_is_trained(trainer: Any, tmp_path: Path) -> None:
    average, module, found = ema(), Lit(width=64), []

    class Count(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            held = average._average
            found.append((sum(t.numel() for t in held.values.values()), len(held.set_aside)))

    saver = ModelCheckpoint(tmp_path, "{epoch}")
    run = trainer(callbacks=[callback(audit=False), average, Count(), saver], enable_checkpointing=True)
    base = list(module.parameters())
    with Copies(base) as copies:
        run.fit(module, loader(), ONCE)
    assert copies.seen == []
    size = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert size == 2 * (4 + 64) + 2 * (64 + 3)
    assert set(found) == {(size, 0)}
    with Copies(base) as copies:  # the check can fail
        trainer(callbacks=[callback(audit=False), EMAWeightAveraging()]).fit(module, loader(), ONCE)
    assert len(copies.seen) > 8


# ---- what it leaves alone


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"val_check_interval": 1}])
def test_training_is_bit_for_bit_what_it_is_without(options: dict[str, Any], trainer: Any) -> None:
    def run(*more: L.Callback) -> tuple[list[float], Watch, dict[str, Any]]:
        module, watch = Lit(), Watch()
        one = trainer(callbacks=[callback(lr_ratio=4), *more, watch], max_epochs=3, **options)
        one.fit(module, loader(), loader())
        return module.losses, watch, one.optimizers[0].state_dict()["state"]

    losses, watch, optimizer = run(ema())
    plain_losses, plain, plain_optimizer = run()
    assert losses == plain_losses
    assert all(same(*pair) for pair in zip(watch.steps, plain.steps, strict=True))
    assert all(same(*pair) for pair in zip(watch.started, plain.started, strict=True))
    assert all(same(optimizer[i], plain_optimizer[i]) for i in plain_optimizer)
    assert not same(watch.validated[-1], plain.validated[-1])


def test_the_place_in_the_list_of_callbacks_does_not_matter(trainer: Any, tmp_path: Path) -> None:
    results = []
    for callbacks in ([callback(), ema()], [ema(), callback()]):
        module = Lit()
        run = trainer(callbacks=callbacks)
        run.fit(module, loader(), loader())
        run.save_checkpoint(tmp_path / "a.ckpt")
        content = read(tmp_path / "a.ckpt")
        results.append((module.losses, state(module), content["state_dict"], content["current_model_state"]))
    (losses, *states), (other_losses, *other_states) = results
    assert losses == other_losses
    assert all(same(*pair) for pair in zip(states, other_states, strict=True))


class Normed(Lit):
    """Trains a BatchNorm, with its running statistics."""

    def build(self) -> nn.Module:
        net = super().build()
        net.norm = nn.BatchNorm1d(4)
        return net

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.net.norm(x))


def test_buffers_are_not_averaged_the_current_ones_are_validated_and_saved(trainer: Any, tmp_path: Path) -> None:
    def run(*more: L.Callback) -> tuple[Lit, dict[str, Any], list[Tensor]]:
        module, seen = Normed(), []

        class Look(L.Callback):
            def on_validation_batch_start(self, *_: Any) -> None:
                seen.append(module.net.norm.running_mean.clone())

        one = trainer(callbacks=[callback(modules_to_save=["norm"]), *more, Look()])
        one.fit(module, loader(), loader())
        one.save_checkpoint(tmp_path / "a.ckpt")
        return module, read(tmp_path / "a.ckpt")["state_dict"], seen

    (averaged, file, seen), (plain, plain_file, plain_seen) = run(ema()), run()
    assert averaged.net.norm.running_mean.any()
    for name in ("net.norm.running_mean", "net.norm.running_var", "net.norm.num_batches_tracked"):
        assert torch.equal(averaged.state_dict()[name], plain.state_dict()[name])
        assert torch.equal(file[name], plain_file[name])
    assert all(torch.equal(*pair) for pair in zip(seen, plain_seen, strict=True))
    assert not torch.equal(averaged.net.norm.weight, plain.net.norm.weight)


# ---- where the average is


def test_all_of_validation_sees_the_average_and_the_module_is_what_it_was_after_it(trainer: Any) -> None:
    class Looks(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.seen: dict[str, dict[str, Tensor]] = {}

        def on_validation_start(self) -> None:
            self.seen["start"] = trained(self)

        def on_validation_epoch_start(self) -> None:
            self.seen["epoch start"] = trained(self)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.seen[f"step {batch_idx}"] = trained(self)

        def on_validation_epoch_end(self) -> None:
            self.seen["epoch end"] = trained(self)

        def on_validation_end(self) -> None:
            self.seen["after"] = trained(self)

    module, watch = Looks(), Watch()
    trainer(callbacks=[callback(), watch, ema()]).fit(module, loader(), loader(2))
    after = module.seen.pop("after")
    assert len(module.seen) == 5
    assert all(same(seen, by_hand(watch.steps)) for seen in module.seen.values())
    assert same(after, watch.steps[-1])
    assert same(watch.started[4], watch.steps[3])


def test_a_fit_ends_with_the_average_in_the_model_and_everything_after_it_uses_that(
    trainer: Any, tmp_path: Path
) -> None:
    class Ends(Lit):
        def on_train_end(self) -> None:
            self.at_the_end = trained(self)

    module, watch = Ends(), Watch()
    run = trainer(callbacks=[ema(), callback(), watch])
    run.fit(module, loader(), loader())
    average = by_hand(watch.steps)
    assert same(trained(module), average)
    assert same(module.at_the_end, average)
    before = state(module)
    [validated] = run.validate(module, loader(), verbose=False)
    [tested] = run.test(module, loader(), verbose=False)
    predicted = run.predict(module, loader())
    assert validated["val_loss"] == tested["test_loss"]
    assert torch.equal(predicted[0], module(next(iter(loader()))[0]))
    assert same(state(module), before)
    run.save_checkpoint(tmp_path / "a.ckpt")
    content = read(tmp_path / "a.ckpt")
    assert same(kept(content, average), average)
    assert same(content["current_model_state"], watch.steps[-1])


def test_without_a_step_that_counts_there_is_no_average(trainer: Any, tmp_path: Path) -> None:
    module, plain, watch = Lit(), Lit(), Watch()
    run = trainer(callbacks=[callback(), ema(update_starting_at_step=8), watch])
    run.fit(module, loader(), ONCE)
    trainer(callbacks=[callback()]).fit(plain, loader())
    assert same(state(module), state(plain))
    assert same(watch.validated[0], watch.steps[3])
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert "current_model_state" not in read(tmp_path / "a.ckpt")


@pytest.mark.parametrize("saver_first", [True, False])
def test_an_exception_in_validation_gives_the_current_values_back_and_what_is_saved_then_resumes(
    saver_first: bool, trainer: Any, tmp_path: Path
) -> None:
    class Stop(BaseException):
        """What no code is prepared for."""

    class Stops(Lit):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if self.trainer.current_epoch == 1 and batch_idx == 1:
                raise Stop

    module, watch = Stops(), Watch()
    saver = OnExceptionCheckpoint(tmp_path)
    savers, saving = [saver, ema()] if saver_first else [ema(), saver], {"enable_checkpointing": True}
    run = trainer(callbacks=[callback(), watch, *savers], max_epochs=3, **saving)
    with pytest.raises(Stop), pytest.warns(UserWarning, match="was called without a model"):  # Lightning's, of savers
        run.fit(module, loader(), loader())
    current, average = watch.steps[-1], by_hand(watch.steps)
    assert len(watch.steps) == 8
    assert same(trained(module), current)
    content = read(tmp_path / "on_exception.ckpt")
    assert same(kept(content, average), average)
    assert same(content["current_model_state"], current)
    whole, rest = Lit(), Lit()
    trainer(callbacks=[callback(), ema()], max_epochs=3).fit(whole, loader(), loader())
    again = trainer(callbacks=[callback(), ema(), OnExceptionCheckpoint(tmp_path)], max_epochs=3, **saving)
    again.fit(rest, loader(), loader(), ckpt_path=tmp_path / "on_exception.ckpt")
    assert module.losses + rest.losses == whole.losses
    assert same(state(rest), state(whole))


def test_an_interrupted_run_keeps_nothing_for_the_next(trainer: Any, tmp_path: Path) -> None:
    class Stops(Lit):
        stop = True

        def on_train_batch_end(self, *_: Any) -> None:
            if self.stop and self.global_step == 6:
                raise KeyError("stop")

    module, plain = Stops(), Lit()
    trainer(callbacks=[callback(), ema()], max_epochs=1).fit(plain, loader())
    run = trainer(callbacks=[callback(), ema()], max_epochs=2)
    with pytest.raises(KeyError):
        run.fit(module, loader())
    first = trainer(callbacks=[callback(), ema()], max_epochs=1)
    first.fit(Lit(), loader())
    first.save_checkpoint(tmp_path / "a.ckpt")
    run.test(module, loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert same(state(module), state(plain))
    run.save_checkpoint(tmp_path / "b.ckpt")
    content = read(tmp_path / "b.ckpt")
    assert same(kept(content, trained(plain)), trained(plain))
    assert "current_model_state" not in content


def test_what_an_interrupted_run_averaged_is_not_saved_by_the_next_with_a_new_callback(
    trainer: Any, tmp_path: Path
) -> None:
    class Own(Lit):
        start = 0

        def configure_callbacks(self) -> list[L.Callback]:
            return [callback(), ema(update_starting_at_step=self.start)]

        def on_train_batch_end(self, *_: Any) -> None:
            if self.start == 0 and self.global_step == 2:
                raise KeyError("stop")

    module, run = Own(), trainer()
    with pytest.raises(KeyError):
        run.fit(module, loader())
    module.start = 1000
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert same(kept(read(tmp_path / "a.ckpt"), trained(module)), trained(module))


def test_a_second_fit_starts_from_what_is_in_the_model_with_a_new_average(trainer: Any) -> None:
    module, watch = Lit(), Watch()
    run = trainer(callbacks=[callback(), ema(), watch])
    run.fit(module, loader())
    average = trained(module)
    run.fit_loop.max_epochs = 4
    run.fit(module, loader())
    assert same(watch.started[8], average)
    assert same(trained(module), by_hand(watch.steps[8:]))


# ---- checkpoints


def test_checkpoints_and_folders_hold_the_average_and_the_current_values_beside_it(
    trainer: Any, tmp_path: Path
) -> None:
    module, watch = Lit(), Watch()
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    run = trainer(callbacks=[callback(modules_to_save=["second"]), ema(), watch, saver], enable_checkpointing=True)
    run.fit(module, loader())
    for epoch in (0, 1):
        content = read(tmp_path / f"epoch={epoch}.ckpt")
        average = by_hand(watch.steps[: 4 * (epoch + 1)])
        assert same(kept(content, average), average)
        assert same(content["current_model_state"], watch.steps[4 * (epoch + 1) - 1])
        assert not any("first.weight" in name for name in content["state_dict"])
        fresh = Lit()
        load_adapter(fresh, tmp_path / f"epoch={epoch}.adapter")
        assert same({name: state(fresh)[name] for name in average}, average)
        fresh = load_from_checkpoint(Lit, tmp_path / f"epoch={epoch}.ckpt")
        assert same({name: state(fresh)[name] for name in average}, average)


@pytest.mark.parametrize("plugins", [[], [AsyncCheckpointIO]])
def test_a_weights_only_checkpoint_of_a_running_fit_holds_the_average_too(
    plugins: list[Any], trainer: Any, tmp_path: Path
) -> None:
    watch = Watch()
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_weights_only=True)
    run = trainer(
        callbacks=[callback(), ema(), watch, saver], enable_checkpointing=True, plugins=[one() for one in plugins]
    )
    run.fit(Lit(), loader(), loader())
    content = read(tmp_path / "epoch=0.ckpt")
    average = by_hand(watch.steps[:4])
    assert same(kept(content, average), average)
    assert "current_model_state" not in content
    fresh = Lit()
    load_adapter(fresh, tmp_path / "epoch=0.adapter")
    assert same({name: state(fresh)[name] for name in average}, average)


def test_a_checkpoint_is_tested_with_its_average_in_the_same_trainer_and_in_a_new_one(
    trainer: Any, tmp_path: Path
) -> None:
    module, watch = Lit(), Watch()
    saver, saving = ModelCheckpoint(tmp_path, "first", monitor="epoch", mode="min"), {"enable_checkpointing": True}
    run = trainer(callbacks=[callback(), ema(), watch, saver], **saving)
    run.fit(module, loader(), ONCE)
    average = by_hand(watch.steps[:4])
    for stage in (run.test, run.validate):
        stage(module, loader(), ckpt_path="best", verbose=False)
        assert same(trained(module), average)
    for more in ([ema()], []):
        fresh = Lit()
        new = trainer(callbacks=[callback(), *more, ModelCheckpoint(tmp_path, monitor="epoch", mode="min")], **saving)
        with nullcontext() if more else pytest.warns(UserWarning, match=r"add the following callbacks: \['AdapterEMA'"):
            new.test(fresh, loader(), ckpt_path=tmp_path / "first.ckpt", verbose=False)
        assert same({name: state(fresh)[name] for name in average}, average)


def test_values_that_the_model_got_after_its_fit_are_saved_as_they_are(trainer: Any, tmp_path: Path) -> None:
    module = Lit()
    run = trainer(callbacks=[callback(), ema()])
    run.fit(module, loader())
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    run.save_checkpoint(tmp_path / "a.ckpt")
    content = read(tmp_path / "a.ckpt")
    assert same(kept(content, trained(module)), trained(module))
    assert "current_model_state" not in content


class Tied(Lit):
    """Trains one parameter that has two names."""

    def build(self) -> nn.Module:
        net = super().build()
        net.third = nn.Linear(8, 3)
        net.third.weight = net.second.weight
        return net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.net.third(self.net.first(x))


def test_a_tied_parameter_is_averaged_under_both_its_names(trainer: Any, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "one", every_n_epochs=1)
    module = Tied()
    lora = callback(target_modules=["first"], modules_to_save=["second", "third"])
    run = trainer(callbacks=[lora, ema(), saver], max_epochs=1, enable_checkpointing=True)
    run.fit(module, loader())
    content = read(tmp_path / "one.ckpt")["state_dict"]
    assert torch.equal(content["net.second.weight"], module.net.second.weight)
    assert torch.equal(content["net.third.weight"], module.net.second.weight)


# ---- resuming


class Stateful:
    """A loader that stores its position."""

    def __init__(self, batches: int = 6) -> None:
        self.batches, self.position = list(loader(batches)), 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for index in range(self.position, len(self)):
            self.position = (index + 1) % len(self)
            yield self.batches[index]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}, {}),
    "not started yet": ({}, {"update_starting_at_step": 13}, {}),
    "head, ratio, every second of the accumulated steps": (
        {"modules_to_save": ["second"], "lr_ratio": 4},
        {"update_every_n_steps": 2, "update_starting_at_step": 1},
        {"accumulate_grad_batches": 2},
    ),
    "bf16-true, bf16 adapters": ({"dtype": "bfloat16"}, {"decay": 0.99}, {"precision": "bf16-true"}),
}


@pytest.mark.filterwarnings("ignore:the checkpoint was written before a validation that was due")
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(case: str, trainer: Any, tmp_path: Path) -> None:
    lora, average, options = CASES[case]
    steps = 6 // options.get("accumulate_grad_batches", 1)

    def run(module: Lit, epochs: int, ckpt_path: Any = None) -> tuple[Any, Watch, dict[str, Any]]:
        watch = Watch()
        saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=2 * steps // 3)
        one = trainer(
            callbacks=[callback(**lora), ema(**average), watch, saver],
            max_epochs=epochs,
            enable_checkpointing=True,
            **options,
        )
        one.fit(module, Stateful(), ONCE, ckpt_path=ckpt_path)
        one.save_checkpoint(tmp_path / f"after {epochs}.ckpt")
        return one, watch, read(tmp_path / f"after {epochs}.ckpt")

    whole = Lit()
    first, watch, file = run(whole, 3)
    assert len(whole.losses) == 18
    assert bool(file.get("averaging_state")) == (case == "bf16-true, bf16 adapters")
    run(Lit(), 2)
    in_the_middle, at_the_end, when_training_ended = f"step={4 * steps // 3}", f"step={2 * steps}", "after 2"
    for name, done in ((in_the_middle, 8), (at_the_end, 12), (when_training_ended, 12)):
        rest = Lit()
        second, watched, file_again = run(rest, 3, tmp_path / f"{name}.ckpt")
        assert rest.losses == whole.losses[done:], name
        assert all(same(*pair) for pair in zip(watched.steps, watch.steps[done:], strict=True))
        assert same(watched.validated[-1], watch.validated[-1])
        assert same(state(rest), state(whole))
        for entry in ("state_dict", "current_model_state", "averaging_state"):
            assert same(file.get(entry, {}), file_again.get(entry, {}))
        states = [one.optimizers[0].state_dict()["state"] for one in (first, second)]
        assert all(same(*pair) for pair in zip(states[0].values(), states[1].values(), strict=True))


def test_a_finished_run_that_is_resumed_without_more_to_train_ends_with_its_average(
    trainer: Any, tmp_path: Path
) -> None:
    module, again = Lit(), Lit()
    run = trainer(callbacks=[callback(), ema()])
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    trainer(callbacks=[callback(), ema()]).fit(again, loader(), ckpt_path=tmp_path / "a.ckpt")
    assert again.losses == []
    assert same(state(again), state(module))


def test_a_checkpoint_without_an_average_starts_one(trainer: Any, tmp_path: Path) -> None:
    first = trainer(callbacks=[callback()], max_epochs=1)
    first.fit(Lit(), loader())
    first.save_checkpoint(tmp_path / "a.ckpt")
    watch, module = Watch(), Lit()
    trainer(callbacks=[callback(), ema(), watch]).fit(module, loader(), ckpt_path=tmp_path / "a.ckpt")
    assert len(watch.steps) == 4
    assert same(trained(module), by_hand(watch.steps))


def test_a_compiled_run_and_a_plain_one_resume_each_other(trainer: Any, tmp_path: Path) -> None:
    class Compiled(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.compile(self.net, backend="eager")

    whole = Lit()
    trainer(callbacks=[callback(), ema()], max_epochs=3).fit(whole, loader())
    for first, second in ((Lit(), Compiled()), (Compiled(), Lit())):
        run = trainer(callbacks=[callback(), ema()], max_epochs=2)
        run.fit(first, loader())
        run.save_checkpoint(tmp_path / "a.ckpt")
        trainer(callbacks=[callback(), ema()], max_epochs=3).fit(second, loader(), ckpt_path=tmp_path / "a.ckpt")
        assert first.losses + second.losses == whole.losses
        assert all(map(torch.equal, trained(second).values(), trained(whole).values()))


def test_a_learning_rate_search_in_mid_run_changes_neither_the_current_values_nor_the_average(
    trainer: Any, tmp_path: Path
) -> None:
    class Tunes(Lit):
        lr = 0.01

    class Searches(LearningRateFinder):
        def on_fit_start(self, *_: Any) -> None:
            pass

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                self.lr_find(trainer, pl_module)

    def run(*more: L.Callback) -> tuple[Watch, Lit]:
        module, watch = Tunes(), Watch()
        search = Searches(num_training_steps=3, update_attr=False)
        trainer(callbacks=[callback(), *more, search, watch], max_epochs=2).fit(module, loader())
        return watch, module

    (watch, module), (plain, _) = run(ema()), run()
    assert all(same(*pair) for pair in zip(watch.steps, plain.steps, strict=True))
    assert same(trained(module), by_hand(watch.steps))


# ---- kinds of training


class TwoOptimizers(Lit):
    """Trains its two layers by turns, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            self.manual_backward(self.loss(batch))
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [AdamW(layer.parameters(), lr=0.01) for layer in (self.net.first, self.net.second)]


@pytest.mark.parametrize(("every", "counted"), [(1, [0, 1, 2, 3]), (2, [0, 1, 2, 3]), (4, [0, 2])])
def test_manual_optimization_with_two_optimizers_updates_once_per_batch_that_stepped(
    every: int, counted: list[int], trainer: Any
) -> None:
    watch, module = Watch(), TwoOptimizers()
    trainer(callbacks=[callback(), ema(update_every_n_steps=every), watch], max_epochs=1).fit(module, loader())
    assert len(watch.steps[0]) == 4
    assert same(trained(module), by_hand([watch.steps[batch] for batch in counted]))


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_gradient_scaler_left_out_does_not_count(fused: bool, trainer: Any) -> None:
    class Overflows(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * (float("inf") if batch_idx == 2 else 1)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    module, watch = Overflows(lambda m: AdamW(m.parameters(), lr=0.01, fused=fused)), Watch()
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    trainer(callbacks=[callback(), ema(), watch], max_epochs=1, plugins=[plugin]).fit(module, loader(5))
    assert same(watch.steps[2], watch.steps[1])
    assert scaler.get_scale() == 2.0**7
    assert same(trained(module), by_hand([watch.steps[batch] for batch in (0, 1, 3, 4)]))


def test_a_parameter_that_is_thawed_later_joins_at_the_next_update(trainer: Any) -> None:
    class Thaws(BaseFinetuning):
        def freeze_before_training(self, pl_module: L.LightningModule) -> None:
            self.freeze(pl_module.net.first)

        def finetune_function(self, pl_module: L.LightningModule, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.net.first, optimizer)

    module, watch = Lit(lambda m: AdamW(m.net.second.parameters(), lr=0.01)), Watch()
    trainer(callbacks=[ema(), Thaws(), watch]).fit(module, loader(), ONCE)
    assert watch.steps[3].keys() < watch.steps[4].keys()
    late = by_hand(watch.steps[4:])
    assert same(trained(module), late | by_hand([{n: step[n] for n in watch.steps[0]} for step in watch.steps]))


# ---- with whom


def test_it_works_without_the_lora_callback_on_whatever_requires_a_gradient(trainer: Any, tmp_path: Path) -> None:
    def adapted() -> Lit:
        module = Lit()
        inject(module, METHOD, modules_to_save=["second"])
        return module

    def frozen() -> Lit:
        module = Lit()
        module.net.first.requires_grad_(False)
        return module

    for make in (adapted, frozen, Lit):
        whole, part, rest, watch = make(), make(), make(), Watch()
        trainer(callbacks=[ema(), watch], max_epochs=3).fit(whole, loader(), loader())
        assert same(trained(whole), by_hand(watch.steps))
        run = trainer(callbacks=[ema()], max_epochs=2)
        run.fit(part, loader(), loader())
        run.save_checkpoint(tmp_path / "a.ckpt")
        assert read(tmp_path / "a.ckpt")["current_model_state"].keys() == trained(part).keys()
        trainer(callbacks=[ema()], max_epochs=3).fit(rest, loader(), loader(), ckpt_path=tmp_path / "a.ckpt")
        assert part.losses + rest.losses == whole.losses
        assert same(state(rest), state(whole))


def test_two_of_them_are_refused(trainer: Any) -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `AdapterEMA`"):
        trainer(callbacks=[callback(), ema(), ema()]).fit(Lit(), loader())


@pytest.mark.parametrize("other", [EMAWeightAveraging, lambda: SWA(0.01)])
def test_another_averaging_callback_beside_it_is_refused(other: Callable[[], L.Callback], trainer: Any) -> None:
    run = trainer(callbacks=[callback(), other(), ema()])
    with pytest.raises(ValueError, match="and AdapterEMA would both put averages into the model: leave one of them"):
        run.fit(Lit(), loader())


def test_a_sharded_strategy_is_refused(trainer: Any) -> None:
    run = trainer(callbacks=[ema()])
    run.strategy.__class__ = type("FSDPStrategy", (type(run.strategy),), {})
    with pytest.raises(ValueError, match=r"strategy=FSDPStrategy: .* use strategy='lora_fsdp'"):
        run.fit(Lit(), loader())


def test_the_other_lightning_package_works_too(trainer: Any, tmp_path: Path) -> None:
    pl = pytest.importorskip("pytorch_lightning")

    class Other(pl.LightningModule):
        build, loss, forward = Lit.build, Lit.loss, Lit.forward
        training_step, validation_step = Lit.training_step, Lit.validation_step
        configure_optimizers = Lit.configure_optimizers

        def __init__(self) -> None:
            super().__init__()
            self.width, self.configure, self.losses = 8, None, []
            self.net = self.build()

    plain, part, rest = Lit(), Other(), Other()
    trainer(callbacks=[callback(), ema()], max_epochs=3).fit(plain, loader(), loader())
    run = trainer(pl.Trainer, callbacks=[callback(), ema()], max_epochs=2)
    run.fit(part, loader(), loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = trainer(pl.Trainer, callbacks=[callback(), ema()], max_epochs=3)
    again.fit(rest, loader(), loader(), ckpt_path=tmp_path / "a.ckpt")
    assert part.losses + rest.losses == plain.losses
    assert same(state(rest), state(plain))
