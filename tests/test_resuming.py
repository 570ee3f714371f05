"""Resuming after a change: what changed is named, and on request what fits goes on and the rest starts fresh."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Lit, loader
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from lightning_lora import AdaLoRA, AdapterEMA, AdapterError, DoRA, LoRA, LoRACallback, LoRAFA, VeRA, sites

X = torch.linspace(-1, 1, 12).view(3, 4)
FIRST, SECOND = "net.first.weight", "net.second.weight"


def written(trainer: Any, path: Path, method: Any = None, module: Any = None, **options: Any) -> Any:
    """A module after two epochs, its checkpoint and its optimizer."""
    module = module or Lit()
    run = trainer(callbacks=[LoRACallback(method or LoRA(r=2, alpha=4), **options)])
    run.fit(module, loader())
    run.save_checkpoint(path)
    return module, run.optimizers[0]


def resumed(trainer: Any, path: Path, method: Any = None, module: Any = None, **options: Any) -> Any:
    """A module that resumed and took no step yet, its optimizer, and what was warned of."""
    module = module or Lit()
    run = trainer(callbacks=[LoRACallback(method or LoRA(r=2, alpha=4), **options)], max_epochs=2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run.fit(module, loader(), ckpt_path=path)
    return module, run.optimizers[0], [str(one.message) for one in said if "another configuration" in str(one.message)]


def factors(module: Any) -> dict[str, dict[str, Tensor]]:
    return {site.name: dict(site.adapter("default").state_dict()) for site in sites(module)}


def changes(module: Any) -> dict[str, Tensor]:
    return {site.name: site.adapter("default").delta().detach() for site in sites(module)}


def moments(optimizer: Any, module: Any) -> dict[str, Tensor]:
    state = optimizer.state
    return {name: state[p]["exp_avg"] for name, p in module.named_parameters() if "exp_avg" in state.get(p, {})}


OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "rank": (LoRA(r=3, alpha=4), {}),
    "alpha": (LoRA(r=2, alpha=8), {}),
    "scaling": (LoRA(r=2, alpha=4, scaling="rsqrt"), {}),
    "dropout": (LoRA(r=2, alpha=4, dropout=0.1), {}),
    "rank of one matrix": (LoRA(r=2, alpha=4), {"rank_pattern": {"second": 1}}),
    "fewer targets": (LoRA(r=2, alpha=4), {"target_modules": ["first"]}),
    "method": (DoRA(r=2, alpha=4), {}),
    "method with a frozen factor": (LoRAFA(r=2, alpha=4), {}),
    "method that shares": (VeRA(r=2), {}),
    "method that changes ranks": (AdaLoRA(r=3, target_r=2), {}),
    "start": (LoRA(r=2, alpha=4, init="pissa"), {}),
    "what is trained in full": (LoRA(r=2, alpha=4), {"bias": "all"}),
}


@pytest.mark.parametrize("change", OTHERS)
def test_a_change_is_an_error_that_names_it_and_the_ways_on(change: str, trainer: Any, tmp_path: Path) -> None:
    written(trainer, tmp_path / "a.ckpt")
    method, options = OTHERS[change]
    with pytest.raises(AdapterError) as raised:
        resumed(trainer, tmp_path / "a.ckpt", method, **options)
    said = str(raised.value)
    named = {
        "fewer targets": "only in the checkpoint: net.second.weight; only here: none",
        "what is trained in full": "net.first.bias, net.second.bias is missing, which this run trains",
    }.get(change, f"but this run has {method.at(1, 4) if 'one matrix' in change else method}")
    assert named in said
    assert "resume_mismatch='reinit'" in said or change == "what is trained in full"


@pytest.mark.parametrize("how", ["reinit", "resize"])
@pytest.mark.parametrize("change", OTHERS)
def test_every_change_can_be_gone_on_from_and_says_what_starts_fresh(
    change: str, how: str, trainer: Any, tmp_path: Path
) -> None:
    before, optimizer = written(trainer, tmp_path / "a.ckpt")
    method, options = OTHERS[change]
    module, after, said = resumed(trainer, tmp_path / "a.ckpt", method, resume_mismatch=how, **options)
    held, kept = factors(before), factors(module)
    for name, own in kept.items():
        same = own.keys() == held[name].keys() and all(torch.equal(own[key], held[name][key]) for key in own)
        fits = {"dropout": True, "fewer targets": True, "what is trained in full": True}.get(change, False)
        assert same == (fits or (change == "rank of one matrix" and name == FIRST)), name
    assert len(said) == (change != "dropout")
    old, new = moments(optimizer, before), moments(after, module)
    for name, moment in new.items():
        assert torch.equal(moment, old[name])
    resumed_names = {name for name in new if "adapters" in name}
    expected = {
        "dropout": {FIRST, SECOND},
        "what is trained in full": {FIRST, SECOND},
        "fewer targets": {FIRST},
        "rank of one matrix": {FIRST},
    }.get(change, set())
    assert {name.replace(".adapters.weight.default.lora_A", ".weight") for name in resumed_names if "_A" in name} == (
        expected
    )
    run = trainer(callbacks=[LoRACallback(method, resume_mismatch=how, **options)], max_epochs=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(Lit(), loader(), ckpt_path=tmp_path / "a.ckpt")
    assert run.global_step == 12


@pytest.mark.parametrize(
    "method",
    [LoRA(r=4, alpha=4), LoRA(r=5, alpha=20), LoRA(r=3, alpha=4, scaling="rsqrt"), LoRA(r=2, alpha=16)],
    ids=str,
)
def test_a_higher_rank_or_another_scale_leaves_the_function_as_it_was(
    method: LoRA, trainer: Any, tmp_path: Path
) -> None:
    before, _ = written(trainer, tmp_path / "a.ckpt")
    module, _, said = resumed(trainer, tmp_path / "a.ckpt", method, resume_mismatch="resize")
    torch.testing.assert_close(module(X), before(X), rtol=1e-5, atol=1e-6)
    own, fresh = factors(module)[FIRST], Lit()
    trainer(callbacks=[LoRACallback(method)]).validate(fresh, loader(), verbose=False)
    assert own["lora_A"].shape[0] == method.r
    assert torch.equal(own["lora_A"][:2], factors(before)[FIRST]["lora_A"])
    assert torch.equal(own["lora_A"][2:], factors(fresh)[FIRST]["lora_A"][2:])
    assert not own["lora_B"][:, 2:].any()
    assert "4 are resized" in said[0]


@pytest.mark.parametrize("alpha", [4, 6])
def test_a_lower_rank_is_the_best_approximation_of_the_change(alpha: float, trainer: Any, tmp_path: Path) -> None:
    before, _ = written(trainer, tmp_path / "a.ckpt", LoRA(r=3, alpha=4))
    module, _, _ = resumed(trainer, tmp_path / "a.ckpt", LoRA(r=1, alpha=alpha), resume_mismatch="resize")
    for name, change in changes(before).items():
        u, values, v = torch.linalg.svd(change.double())
        best = (values[0] * u[:, :1] @ v[:1]).float()
        torch.testing.assert_close(changes(module)[name], best, rtol=1e-4, atol=1e-6)
        assert values[1] > 0


def test_dora_is_resized_with_its_magnitude(trainer: Any, tmp_path: Path) -> None:
    before, _ = written(trainer, tmp_path / "a.ckpt", DoRA(r=2, alpha=4))
    module, _, _ = resumed(trainer, tmp_path / "a.ckpt", DoRA(r=4, alpha=4), resume_mismatch="resize")
    torch.testing.assert_close(module(X), before(X), rtol=1e-5, atol=1e-6)


def test_more_targets_start_fresh_and_the_others_go_on(trainer: Any, tmp_path: Path) -> None:
    before, optimizer = written(trainer, tmp_path / "a.ckpt", target_modules=["second"])
    module, after, said = resumed(trainer, tmp_path / "a.ckpt", resume_mismatch="reinit")
    assert torch.equal(factors(module)[SECOND]["lora_B"], factors(before)[SECOND]["lora_B"])
    assert not factors(module)[FIRST]["lora_B"].any()
    assert moments(after, module).keys() == moments(optimizer, before).keys()
    assert "2 start fresh (net.first.adapters.weight.default.lora_A, net.first" in said[0]


def test_a_head_that_is_not_trained_any_more_is_said_to_be_left_out(trainer: Any, tmp_path: Path) -> None:
    written(trainer, tmp_path / "a.ckpt", modules_to_save=["second"], target_modules=["first"])
    _, _, said = resumed(trainer, tmp_path / "a.ckpt", resume_mismatch="reinit", target_modules=["first"])
    assert "2 are left out (net.second.bias, net.second.weight)" in said[0]


def test_without_a_change_the_option_changes_nothing(trainer: Any, tmp_path: Path) -> None:
    before, optimizer = written(trainer, tmp_path / "a.ckpt", modules_to_save=["second"])
    module, after, said = resumed(trainer, tmp_path / "a.ckpt", modules_to_save=["second"], resume_mismatch="reinit")
    assert not said
    assert all(torch.equal(t, module.state_dict()[name]) for name, t in before.state_dict().items())
    assert all(torch.equal(moments(optimizer, before)[name], m) for name, m in moments(after, module).items())


def test_shared_matrices_of_vera_fit_all_adapters_or_none(trainer: Any, tmp_path: Path) -> None:
    written(trainer, tmp_path / "a.ckpt", VeRA(r=2), target_modules=["second"])
    module, _, _ = resumed(trainer, tmp_path / "a.ckpt", VeRA(r=2), resume_mismatch="reinit")
    found = [site.adapter("default") for site in sites(module)]
    assert found[0].shared is found[1].shared
    assert not any(adapter.delta().any() for adapter in found)


def test_a_structure_that_training_chose_is_resumed_whatever_the_option(trainer: Any, tmp_path: Path) -> None:
    method = AdaLoRA(r=3, target_r=1)
    before, _ = written(trainer, tmp_path / "a.ckpt", method)
    module, _, said = resumed(trainer, tmp_path / "a.ckpt", method, resume_mismatch="reinit")
    assert not said
    assert all(torch.equal(t, module.state_dict()[name]) for name, t in before.state_dict().items())


def test_another_base_stays_an_error(trainer: Any, tmp_path: Path) -> None:
    class Other(Lit):
        def build(self) -> nn.Module:
            net = super().build()
            net.first.weight.data.mul_(2)
            return net

    written(trainer, tmp_path / "a.ckpt")
    with pytest.raises(AdapterError, match="another base"):
        resumed(trainer, tmp_path / "a.ckpt", module=Other(), resume_mismatch="resize")


def test_validation_knows_no_such_option(trainer: Any, tmp_path: Path) -> None:
    written(trainer, tmp_path / "a.ckpt")
    run = trainer(callbacks=[LoRACallback(LoRA(r=3), resume_mismatch="resize")])
    with pytest.raises(AdapterError, match="was trained with LoRA"):
        run.validate(Lit(), loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False)


def test_a_moving_average_is_not_fitted(trainer: Any, tmp_path: Path) -> None:
    run = trainer(callbacks=[LoRACallback(LoRA(r=2)), AdapterEMA(decay=0.9)])
    run.fit(Lit(), loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(AdapterError, match="was written with a moving average"):
        resumed(trainer, tmp_path / "a.ckpt", LoRA(r=3), resume_mismatch="resize")


# ---- the order of parameters


def reversed_adamw(module: Lit) -> Any:
    return AdamW([*reversed(list(module.parameters()))], lr=0.01)


def test_optimizer_states_find_their_parameters_in_another_order(trainer: Any, tmp_path: Path) -> None:
    """All matrices are square, so no shape tells them apart."""

    class Square(Lit):
        def build(self) -> nn.Module:
            with torch.random.fork_rng():
                torch.manual_seed(7)
                return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    before, optimizer = written(trainer, tmp_path / "a.ckpt", LoRA(r=4), Square(reversed_adamw), lr_ratio=16)
    module, after, _ = resumed(trainer, tmp_path / "a.ckpt", LoRA(r=4), Square(), lr_ratio=4)
    old, new = moments(optimizer, before), moments(after, module)
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_groups_of_other_parameters_are_an_error_that_names_them(trainer: Any, tmp_path: Path) -> None:
    def one_each(first: str, second: str) -> Any:
        return lambda m: SGD(
            [{"params": getattr(m.net, first).parameters()}, {"params": getattr(m.net, second).parameters()}], lr=0.1
        )

    written(trainer, tmp_path / "a.ckpt", module=Lit(one_each("first", "second")))
    with pytest.raises(ValueError, match=r"holds net.first.* in a group where this run's .* has net.second"):
        resumed(trainer, tmp_path / "a.ckpt", module=Lit(one_each("second", "first")))


def test_a_state_without_names_is_taken_in_order_and_not_fitted(trainer: Any, tmp_path: Path) -> None:
    before, optimizer = written(trainer, tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    del content["optimizer_states"][0]["lora_names"]
    torch.save(content, tmp_path / "b.ckpt")
    module, after, _ = resumed(trainer, tmp_path / "b.ckpt")
    assert all(torch.equal(moments(optimizer, before)[name], m) for name, m in moments(after, module).items())
    with pytest.raises(AdapterError, match="carry no names"):
        resumed(trainer, tmp_path / "b.ckpt", LoRA(r=3), resume_mismatch="reinit")
