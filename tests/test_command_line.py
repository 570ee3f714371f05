"""`lightning-lora`: results on standard output, complaints on standard error, an exit code, never a traceback."""

import copy
import json

import pytest
import safetensors.torch
import torch
from torch import nn

from lightning_lora import LoRA, inject, load_adapter, merge_, save_adapter, sites
from lightning_lora.analysis import effective_rank, singular_values
from lightning_lora.cli import main


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(6, 5)
        self.v = nn.Linear(6, 5)
        self.attention = nn.MultiheadAttention(6, 2)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        x, _ = self.attention(x, x, x)
        return self.head(self.q(x) + self.v(x))


class Holder(nn.Module):
    """A LightningModule's outline: the network is its attribute, the head is outside."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.extra = nn.Linear(2, 2)

    def training_step(self): ...

    def configure_optimizers(self): ...


def adapted(**kwargs):
    torch.manual_seed(0)
    holder = Holder(Net()).eval()
    base = copy.deepcopy(holder)
    options = {"modules_to_save": ["head", "extra"], "rank_pattern": {"q": 3}} | kwargs
    inject(holder, LoRA(r=2, alpha=4, scaling="rsqrt"), **options)
    for site in sites(holder):
        nn.init.normal_(site.adapter("default").lora_B)
    with torch.no_grad():
        holder.net.head.weight.add_(1)
        holder.extra.weight.add_(1)
    return holder, base


@pytest.fixture
def trained(tmp_path):
    holder, base = adapted()
    save_adapter(holder, tmp_path / "a.adapter")
    return holder, base, tmp_path


def test_inspect_shows_every_site_with_norm_and_effective_rank(trained, capsys):
    holder, _, folder = trained
    assert main(["inspect", str(folder / "a.adapter")]) == 0
    out = capsys.readouterr().out
    for site in sites(holder):
        adapter = site.adapter("default")
        [line] = [line for line in out.splitlines() if line.startswith(site.name.removeprefix("net."))]
        assert f"{adapter.delta().norm().item():.4g}" in line
    assert "LoRA, 4 matrices, network net" in out
    assert "trained in full: head.bias, head.weight" in out
    assert "verified" in out


def test_singular_values_are_those_of_the_dense_change():
    holder, _ = adapted()
    adapter = sites(holder)[0].adapter("default").double()
    dense = torch.linalg.svdvals(adapter.delta())[: adapter.method.r]
    torch.testing.assert_close(singular_values(adapter), dense, rtol=1e-12, atol=1e-12)


def test_effective_rank_counts_equal_directions_and_is_zero_without_change():
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3)
    assert effective_rank(torch.tensor([5.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0


@pytest.mark.parametrize("kind", ["ckpt", "state dict", "safetensors", "folder"])
def test_merge_writes_what_merge_computes_and_keeps_what_else_is_there(kind, trained, capsys):
    holder, base, folder = trained
    state, out = base.state_dict(), folder / "out"
    if kind == "ckpt":
        into = folder / "base.ckpt"
        torch.save({"state_dict": state, "epoch": 3, "optimizer_states": [1]}, into)
    elif kind == "state dict":
        into = folder / "base.pt"
        torch.save(state, into)
    elif kind == "safetensors":
        into = folder / "base.safetensors"
        safetensors.torch.save_file(state, into)
    else:
        into = folder / "base"
        into.mkdir()
        names = sorted(state)
        for number, part in enumerate((names[:4], names[4:])):
            safetensors.torch.save_file({n: state[n] for n in part}, into / f"model-{number}.safetensors")
        (into / "config.json").write_text("{}")
    assert main(["merge", str(folder / "a.adapter"), "--into", str(into), "--out", str(out)]) == 0, (
        capsys.readouterr().err
    )
    if kind == "folder":
        assert (out / "config.json").read_text() == "{}"
        merged = {k: v for part in out.glob("*.safetensors") for k, v in safetensors.torch.load_file(part).items()}
    elif kind == "safetensors":
        merged = safetensors.torch.load_file(out / "base.safetensors")
    else:
        content = torch.load(out / into.name, weights_only=True)
        merged = content["state_dict"] if kind == "ckpt" else content
        assert kind != "ckpt" or (content["epoch"] == 3 and "optimizer_states" not in content)
    expected = merge_(holder).state_dict()
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(merged[name], tensor), name


def test_merge_finds_the_bare_network_and_leaves_out_what_is_outside_of_it(trained):
    holder, base, folder = trained
    torch.save(base.net.state_dict(), folder / "net.pt")
    assert (
        main(["merge", str(folder / "a.adapter"), "--into", str(folder / "net.pt"), "--out", str(folder / "m.pt")]) == 0
    )
    expected = merge_(holder).net.state_dict()
    merged = torch.load(folder / "m.pt", weights_only=True)
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    assert merged.keys() == expected.keys()


def test_merge_refuses_another_base_unless_told(trained, capsys):
    _, base, folder = trained
    with torch.no_grad():
        base.net.q.weight.mul_(1.1)
    torch.save(base.state_dict(), folder / "other.pt")
    command = ["merge", str(folder / "a.adapter"), "--into", str(folder / "other.pt"), "--out", str(folder / "m.pt")]
    assert main(command) == 1
    assert "net.q.weight is not what" in capsys.readouterr().err
    assert not (folder / "m.pt").exists()
    assert main([*command, "--allow_base_mismatch"]) == 0


def test_merge_into_another_architecture_names_both_and_what_is_absent(trained, capsys):
    _, base, folder = trained
    state = base.net.state_dict()
    del state["v.weight"]
    torch.save(state, folder / "other.pt")
    command = ["merge", str(folder / "a.adapter"), "--into", str(folder / "other.pt"), "--out", str(folder / "m.pt")]
    assert main(command) == 1
    message = capsys.readouterr().err
    assert f"{folder / 'other.pt'}: {folder / 'a.adapter'}: the adapters belong to v.weight, which" in message


def test_merge_never_replaces_a_file(trained, capsys):
    _, base, folder = trained
    torch.save(base.state_dict(), folder / "base.pt")
    before = (folder / "base.pt").read_bytes()
    command = ["merge", str(folder / "a.adapter"), "--into", str(folder / "base.pt"), "--out", str(folder / "base.pt")]
    assert main(command) == 1
    assert "exists" in capsys.readouterr().err
    assert (folder / "base.pt").read_bytes() == before


def test_export_has_one_rank_no_scale_and_the_same_change(tmp_path, capsys):
    folder = tmp_path
    holder, base = adapted(exclude_modules=["attention"])
    save_adapter(holder, folder / "a.adapter")
    assert main(["export", str(folder / "a.adapter"), "--out", str(folder / "portable")]) == 0
    err = capsys.readouterr().err
    assert "head.weight: trained in full, which vLLM and llama.cpp refuse" in err
    assert "extra.weight: outside of the network" in err
    config = json.loads((folder / "portable/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 3, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    load_adapter(base.net, folder / "portable")
    x = torch.randn(4, 6)
    ours, exported = holder.net.double()(x.double()), base.net.double()(x.double())
    torch.testing.assert_close(exported, ours, rtol=1e-6, atol=1e-6 * ours.abs().max().item())
    assert {site.adapter("default").method.r for site in sites(base.net)} == {3}


def test_export_refuses_what_has_no_portable_form(trained, capsys):
    _, _, folder = trained
    assert main(["export", str(folder / "a.adapter"), "--out", str(folder / "portable")]) == 1
    message = capsys.readouterr().err
    assert (
        "a.adapter has no portable form: PEFT adds the change of an nn.MultiheadAttention's out_proj twice" in message
    )
    assert not (folder / "portable").exists()


def test_methods_lists_options_with_their_defaults(capsys):
    assert main(["methods"]) == 0
    assert "LoRA: Low-rank adaptation" in (out := capsys.readouterr().out)
    assert "r = 8" in out


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ([], 2, ""),
        (["nonsense"], 2, "nonsense"),
        (["inspect"], 2, "required"),
        (["merge", "a", "--out", "b"], 2, "into"),
        (["inspect", "nowhere"], 1, "nowhere: no adapter_model.safetensors in this folder"),
        (["merge", "nowhere", "--into", "x", "--out", "y"], 1, "nowhere: no adapter_model.safetensors"),
        (["export", "nowhere", "--out", "."], 1, "exists: give a new folder"),
    ],
)
def test_a_users_mistake_ends_in_a_sentence_and_an_exit_code(arguments, code, sentence, capsys):
    try:
        ended = main(arguments)
    except SystemExit as exit:
        ended = exit.code
    assert ended == code
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"not weights", b"\xff" * 64])
@pytest.mark.parametrize("name", ["base.pt", "base.safetensors"])
def test_a_damaged_base_is_named(name, content, trained, capsys):
    _, _, folder = trained
    (folder / name).write_bytes(content)
    assert main(["merge", str(folder / "a.adapter"), "--into", str(folder / name), "--out", str(folder / "m.pt")]) == 1
    assert f"{folder / name}: " in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "merge", "export", "methods"])
def test_help_stands_alone(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"lightning-lora [options] {command}" in capsys.readouterr().out
