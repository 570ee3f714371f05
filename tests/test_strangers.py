"""Modules that were written without LoRA in mind: the callback works first time, or stops and tells what to write."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import lightning as L
import pytest
import strangers as s
import torch
import transformers as hf
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader

from lightning_lora import AdapterError, LoRA, LoRACallback, load_from_checkpoint, sites, using

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),  # what nn.TransformerEncoder makes itself
    pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode"),  # a teacher that is meant to be so
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),  # PyTorch's hint about checkpointing
]

SIZES = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT2 = {"vocab_size": 20, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "pad_token_id": 0}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}


def bert():
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return s.HFClassifier(hf.BertForSequenceClassification(hf.BertConfig(**SIZES, **no_dropout)))


def llama():
    return s.HFLanguageModel(hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, tie_word_embeddings=True)))


def t5():
    config = hf.T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
    config.decoder_start_token_id = 0
    return s.HFSeq2Seq(hf.T5ForConditionalGeneration(config))


def gpt2():
    return s.HFLanguageModel(hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)))


def gpt2_classifier():
    return s.HFClassifier(hf.GPT2ForSequenceClassification(hf.GPT2Config(**GPT2)))


class Reseeds(Callback):
    """Gives every batch its own random numbers, so that a resumed run can be compared with an unbroken one."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.manual_seed(100 * trainer.current_epoch + batch_idx)


def build(make: Callable[[], L.LightningModule]) -> L.LightningModule:
    torch.manual_seed(0)
    return make()


def make_trainer(tmp_path, options, *callbacks, **kwargs) -> L.Trainer:
    lora = LoRACallback(LoRA(r=2), **options)
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 2}
    quiet |= kwargs
    return L.Trainer(accelerator="cpu", callbacks=[lora, saver, Reseeds(), *callbacks], **quiet)


def train(make, data, tmp_path, options, ckpt_path=None) -> L.LightningModule:
    module = build(make)
    make_trainer(tmp_path, options).fit(module, data(), ckpt_path=ckpt_path)
    return module


def predict(module, x):
    module.eval()
    with torch.no_grad():
        return module(x)


class Works(NamedTuple):
    """A module that trains with ``options``, of whose own entries only ``saved`` are trained and in the file."""

    make: Callable[[], L.LightningModule]
    data: Callable[[], DataLoader] = s.vectors
    options: Mapping[str, Any] = MappingProxyType({})
    saved: tuple[str, ...] = ()
    sites: int = 2
    x: torch.Tensor = torch.linspace(-2, 2, 40).view(5, 8)


Z = torch.linspace(-2, 2, 20).view(5, 4)
IDS = torch.tensor([[3, 12, 7, 0, 0], [15, 1, 2, 9, 4]])
SPECTRAL = ("weight.original", "weight.0._u", "weight.0._v")

WORK = {
    "two optimizers, toggled": Works(s.GAN, sites=4, x=Z),
    "gradients of the adversary switched by hand": Works(s.Pix2Pix, sites=4, x=Z),
    "generator every third batch, gradient penalty": Works(s.WGANGP, options={"audit": False}, sites=4, x=Z),
    "critic that clips its weights, trained in full": Works(
        s.ClippedWGAN,
        options={"modules_to_save": ["D"]},
        saved=("D.0.weight", "D.0.bias", "D.2.weight", "D.2.bias"),
        x=Z,
    ),
    "adversary with spectral norm": Works(
        s.SpectralGAN,
        sites=4,
        saved=tuple(f"discriminator.0.parametrizations.weight.0.{name}" for name in ("_u", "_v")),
        x=Z,
    ),
    "adversary with spectral norm, trained in full": Works(
        s.SpectralGAN,
        options={"modules_to_save": ["discriminator"]},
        saved=(
            *(f"discriminator.0.parametrizations.{name}" for name in SPECTRAL),
            "discriminator.0.bias",
            "discriminator.2.weight",
            "discriminator.2.bias",
        ),
        x=Z,
    ),
    "encoder in two optimizers": Works(s.AdversarialAutoencoder, sites=6),
    "optimization by hand, two schedulers": Works(s.ByHand, sites=3),
    "groups by name": Works(s.DecayByName),
    "groups by class, and counted": Works(s.DecayByClass),
    "groups by layer": Works(s.LayerwiseRates, sites=4),
    "warm-up in optimizer_step": Works(s.WarmsUp, options={"lr_ratio": 4.0}),
    "closure": Works(s.SecondOrder),
    "frozen teacher": Works(s.Distillation, options={"exclude_modules": ["teacher"]}),
    "average kept by hand": Works(s.KeepsAnAverage, options={"audit": False}, sites=4),
    "compiled": Works(s.Compiled),
    "convolutions and batch norm": Works(s.ConvNet, s.images, x=torch.linspace(-2, 2, 128).view(2, 1, 8, 8)),
    "recurrent": Works(s.Tagger, s.sentences, x=IDS),
    "encoder with padding": Works(s.PaddedEncoder, s.sentences, sites=9, x=IDS),
    "variational": Works(s.VAE, sites=5),
    "one encoder by two names": Works(s.TwoTowers),
    "raw parameter in modules_to_save": Works(s.Prefix, options={"modules_to_save": ["prefix"]}, saved=("prefix",)),
    "memory bank on the module itself": Works(s.MetricLearning, saved=("bank", "seen")),
    "queue in a submodule": Works(s.RemembersKeys, saved=("queue.keys",)),
    "codebook in a submodule": Works(s.Quantizes, saved=("net.1.codes",)),
    "tasks in turn": Works(s.MultiTask, options={"audit": False}, sites=4),
    "checkpointing without reentrance": Works(partial(s.Checkpointed, use_reentrant=False), sites=3),
    "one weight in two layers": Works(s.TiedAutoencoder, sites=1),
    "subclass of nn.Linear that computes the same": Works(s.Casts),
    "masked layer": Works(s.Autoregressive, sites=3),
    "children called adapters": Works(s.Houlsby, sites=3),
    "children called adapters, trained in full": Works(
        s.Houlsby, options={"modules_to_save": ["adapters"]}, saved=("adapters.0.weight", "adapters.0.bias")
    ),
    "own checkpoint hooks": Works(s.KeepsNotes),
    "BERT": Works(bert, s.sentences, sites=14, x=IDS),
    "Llama with tied embeddings": Works(llama, s.sentences, sites=14, x=IDS),
    "T5": Works(t5, s.sentences, sites=16, x=IDS),
    "GPT-2": Works(gpt2, s.sentences, sites=8, x=IDS),
    "GPT-2 with a linear head": Works(gpt2_classifier, s.sentences, sites=9, x=IDS[1:]),
}


@pytest.mark.parametrize("case", WORK.values(), ids=WORK.keys())
def test_it_trains_adapters_alone_saves_no_base_and_resumes_exactly(case, tmp_path):
    base = {name: tensor.clone() for name, tensor in build(case.make).state_dict().items()}

    module = train(case.make, case.data, tmp_path, case.options)

    adapted = sites(module)
    assert len(adapted) == case.sites
    assert all(site.adapter("default").lora_B.any() for site in adapted)
    trained = module.state_dict()
    assert {name for name, before in base.items() if not torch.equal(trained[name], before)} == set(case.saved)
    file = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"]
    assert file.keys() & trained.keys() == (trained.keys() - base.keys()) | set(case.saved)
    assert sum(file[name].numel() for name in file.keys() - trained.keys()) == 0

    resumed = train(case.make, case.data, tmp_path, case.options, ckpt_path=tmp_path / "epoch=0.ckpt")

    again = resumed.state_dict()
    assert again.keys() == trained.keys()
    assert all(torch.equal(again[name], trained[name]) for name in trained)

    fresh = make_trainer(tmp_path, case.options)
    data = DataLoader(case.x, batch_size=len(case.x))
    [output] = fresh.predict(build(case.make), data, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert torch.equal(output, predict(module, case.x))


class Stops(NamedTuple):
    """A module at which the callback stops with an error whose message holds all of ``words``."""

    error: type[Exception]
    words: tuple[str, ...]
    make: Callable[[], L.LightningModule]
    data: Callable[[], DataLoader] = s.vectors
    options: Mapping[str, Any] = MappingProxyType({})


NO_GRADIENT = ("got no gradient in the first batch", "LoRACallback(audit=False)", "use_reentrant=False")
COMPUTED = (
    "discriminator.0.weight is no parameter but computed from others (by a hook",
    "modules_to_save=['discriminator.0']",
)

STOP = {
    "generator that waits for the third batch": Stops(
        RuntimeError, (*NO_GRADIENT, "4 of 8", "G.0.weight", "exclude_modules=['G']"), s.WGANGP
    ),
    "critic that clips its weights": Stops(
        RuntimeError,
        ("D.0.weight, D.2.weight", "weight clipping", "do not require a gradient", "modules_to_save=['D']"),
        s.ClippedWGAN,
    ),
    "gradients of the adversary left on": Stops(
        RuntimeError,
        ("discriminator.0.weight", "require a gradient", "self.toggle_optimizer(...)", "modules_to_save"),
        s.CycleGAN,
    ),
    "adversary with spectral norm of old": Stops(ValueError, COMPUTED, s.OldSpectralGAN),
    "frozen teacher": Stops(
        RuntimeError, (*NO_GRADIENT, "6 of 10", "teacher.0.weight", "exclude_modules=['teacher']"), s.Distillation
    ),
    "average kept by hand": Stops(
        RuntimeError, (*NO_GRADIENT, "ema.0.weight", "the module averages them from others"), s.KeepsAnAverage
    ),
    "target network": Stops(
        RuntimeError, (*NO_GRADIENT, "target.0.weight", "the module averages them from others"), s.BYOL
    ),
    "tasks in turn": Stops(
        RuntimeError, (*NO_GRADIENT, "heads.style.weight", "exclude_modules=['heads.style']"), s.MultiTask
    ),
    "reentrant checkpointing": Stops(
        RuntimeError, (*NO_GRADIENT, "4 of 6", "blocks.0.0.weight"), partial(s.Checkpointed, use_reentrant=True)
    ),
    "reentrant checkpointing of all": Stops(
        RuntimeError, ("the loss depends on no adapter", "use_reentrant=False"), s.CheckpointedWhole
    ),
    "weight read without its layer": Stops(
        RuntimeError, (*NO_GRADIENT, "2 of 6", "lin.weight", "exclude_modules=['lin']"), s.ReadsTheWeight
    ),
    "lazy layer": Stops(ValueError, ("net.0.weight has no shape yet", "run one batch through the model"), s.Lazy),
    "lazy layer left out": Stops(
        ValueError, ("net.0.weight has no shape yet",), s.Lazy, options={"exclude_modules": ["net.0"]}
    ),
    "head alone in the optimizer, and left out": Stops(
        ValueError,
        ("gave its optimizer no parameter", "LoRACallback(modules_to_save=[...])"),
        s.OnlyTheHead,
        options={"exclude_modules": ["head"]},
    ),
    "state_dict that hides layers": Stops(
        AdapterError,
        ("state_dict() of HidesTheEncoder leaves out encoder.0.adapters.weight.default.lora_A", "do not override it"),
        s.HidesTheEncoder,
    ),
    "raw parameters": Stops(
        ValueError, ("found no linear layer in RawParameters", "layers that can be adapted are"), s.RawParameters
    ),
    "language model without its body": Stops(
        ValueError,
        ("leaves out the output head", "target_modules=['model.lm_head']"),
        gpt2,
        s.sentences,
        {"exclude_modules": ["transformer"]},
    ),
}


@pytest.mark.parametrize("case", STOP.values(), ids=STOP.keys())
def test_it_stops_and_says_what_to_write(case, tmp_path):
    module = build(case.make)

    with pytest.raises(case.error) as caught:
        make_trainer(tmp_path, case.options).fit(module, case.data())

    message = str(caught.value)
    assert [words for words in case.words if words not in message] == []
    assert len(message) < 600


def test_a_model_built_in_setup_is_tested_from_its_checkpoint(tmp_path):
    module = train(s.BuiltInSetup, s.vectors, tmp_path, {})
    expected = make_trainer(tmp_path, {}).test(module, s.vectors(), verbose=False)

    fresh = build(s.BuiltInSetup)
    found = make_trainer(tmp_path, {}).test(fresh, s.vectors(), ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)

    assert found == expected
    assert make_trainer(tmp_path, {}).test(build(s.BuiltInSetup), s.vectors(), verbose=False) != expected
    loaded = load_from_checkpoint(s.BuiltInSetup, tmp_path / "epoch=1.ckpt", setup_stage="test")
    x = torch.randn(3, 8)
    assert torch.equal(predict(loaded, x), predict(module, x))


def test_a_model_built_on_meta_is_adapted_once_it_has_its_weights(tmp_path):
    pretrained = s.mlp(8, 16, 4)
    torch.save(pretrained.state_dict(), tmp_path / "weights.pt")
    make = partial(s.BuiltOnMeta, tmp_path / "weights.pt")

    module = train(make, s.vectors, tmp_path, {})
    resumed = train(make, s.vectors, tmp_path, {}, ckpt_path=tmp_path / "epoch=0.ckpt")

    x = torch.randn(3, 8)
    with using(module):
        assert torch.equal(predict(module, x), predict(pretrained, x))
    assert not torch.allclose(predict(module, x), predict(pretrained, x))
    assert torch.equal(predict(resumed, x), predict(module, x))


@pytest.mark.parametrize("merge", [False, True])
def test_a_module_with_hyperparameters_is_loaded_without_a_trainer(merge, tmp_path):
    make = partial(s.Configured, sizes=[8, 24, 4], act="Tanh")
    module = train(make, s.vectors, tmp_path, {})

    loaded = load_from_checkpoint(s.Configured, tmp_path / "epoch=1.ckpt", merge=merge)

    assert loaded.hparams == module.hparams
    assert bool(sites(loaded)) is not merge
    x = torch.randn(3, 8)
    torch.testing.assert_close(predict(loaded, x), predict(module, x))


def test_an_optimizer_built_by_the_command_line_trains_the_adapters(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    lora = LoRACallback(LoRA(r=2), lr_ratio=4.0)
    cli = LightningCLI(
        s.FromCommandLine,
        args=[
            "--optimizer=torch.optim.AdamW",
            "--optimizer.lr=0.01",
            "--lr_scheduler=ExponentialLR",
            "--lr_scheduler.gamma=0.5",
        ],
        run=False,
        seed_everything_default=False,
        save_config_callback=None,
        trainer_defaults={
            "accelerator": "cpu",
            "callbacks": [lora],
            "max_epochs": 2,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    )

    cli.trainer.fit(cli.model)

    [optimizer] = cli.trainer.optimizers
    assert type(optimizer) is torch.optim.AdamW
    assert [(group["lr"], len(group["params"])) for group in optimizer.param_groups] == [(0.0025, 2), (0.01, 2)]
    assert all(site.adapter("default").lora_B.any() for site in sites(cli.model))


def test_every_layers_adapter_learns_at_its_layers_rate(tmp_path):
    module = build(s.LayerwiseRates)
    trainer = make_trainer(tmp_path, {}, max_epochs=1)

    trainer.fit(module, s.vectors())

    rate = {p: g["initial_lr"] for g in trainer.optimizers[0].param_groups for p in g["params"]}
    found = {site.name: {rate[p] for p in site.slot.parameters()} for site in sites(module)}
    assert found == {
        "classifier.weight": {0.01},
        "net.2.weight": {0.005},
        "net.1.weight": {0.0025},
        "net.0.weight": {0.00125},
    }


def test_groups_that_know_plain_parameters_only_get_each_adapter_with_its_weight(tmp_path):
    module = build(s.DecayByClass)
    trainer = make_trainer(tmp_path, {"lr_ratio": 4.0})

    trainer.fit(module, s.vectors())

    found = [(g["weight_decay"], g["lr"], len(g["params"])) for g in trainer.optimizers[0].param_groups]
    assert found == [(0.1, 0.01, 2), (0.0, 0.01, 0), (0.1, 0.04, 2)]


def test_warm_up_by_hand_keeps_the_ratio_of_the_learning_rates(tmp_path):
    used: list[list[float]] = []

    class Watches(Callback):
        def on_train_start(self, trainer, pl_module):
            note = lambda optimizer, *_: used.append([group["lr"] for group in optimizer.param_groups])  # noqa: E731
            trainer.optimizers[0].register_step_post_hook(note)

    make_trainer(tmp_path, {"lr_ratio": 4.0}, Watches(), max_epochs=1).fit(build(s.WarmsUp), s.vectors())

    assert used == [[pytest.approx(lr), pytest.approx(4 * lr)] for lr in (1e-2, 2e-5, 4e-5, 6e-5)]


def test_an_optimizer_of_the_head_alone_gets_the_backbones_adapters_with_a_warning(tmp_path):
    module = build(s.OnlyTheHead)
    backbone = [parameter.clone() for parameter in module.net.parameters()]

    with pytest.warns(UserWarning, match=r"4 trained parameters \(first: net\.0\..*lora_A\) were in no optimizer"):
        make_trainer(tmp_path, {"modules_to_save": ["head"]}).fit(module, s.vectors())

    assert {site.name for site in sites(module)} == {"net.0.weight", "net.2.weight"}
    assert all(site.adapter("default").lora_B.any() for site in sites(module))
    kept = [p for name, p in module.net.named_parameters() if "lora" not in name]
    assert all(torch.equal(p, before) for p, before in zip(kept, backbone, strict=True))
    assert not torch.equal(module.head.weight, build(s.OnlyTheHead).head.weight)


def test_padded_validation_sees_the_adapters(tmp_path):
    losses: list[tuple[float, float]] = []

    class Watches(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            losses.append((trainer.callback_metrics["train_loss"].item(), trainer.callback_metrics["val_loss"].item()))

    module = build(s.PaddedEncoder)
    data = s.sentences()
    trainer = make_trainer(tmp_path, {}, Watches(), max_epochs=6, num_sanity_val_steps=0)

    trainer.fit(module, data, data)

    (first_train, first_val), (last_train, last_val) = losses[0], losses[-1]
    assert last_train < 0.7 * first_train
    assert last_val < 0.7 * first_val
    ids = data.dataset[0]["input_ids"][None]
    adapted = predict(module, ids)
    module.train()
    torch.testing.assert_close(module(ids), adapted)
    with using(module):
        assert not torch.allclose(predict(module, ids), adapted, atol=1e-2)


def test_a_target_network_follows_the_adapters_of_the_online_network(tmp_path):
    module = build(s.BYOL)

    make_trainer(tmp_path, {"audit": False}).fit(module, s.vectors())

    b = {site.name: site.adapter("default").lora_B for site in sites(module)}
    assert all(tensor.any() for tensor in b.values())
    for name in ("0.weight", "2.weight"):
        online, target = b[f"online.{name}"], b[f"target.{name}"]
        assert target.norm() < 0.1 * online.norm()
        assert torch.cosine_similarity(online.flatten(), target.flatten(), dim=0) > 0.9


def test_what_a_module_adds_to_its_checkpoint_comes_back(tmp_path):
    train(s.KeepsNotes, s.vectors, tmp_path, {})

    fresh = build(s.KeepsNotes)
    make_trainer(tmp_path, {}).test(fresh, s.vectors(), ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)

    assert fresh.vocabulary == {"the": 0}
    assert load_from_checkpoint(s.KeepsNotes, tmp_path / "epoch=1.ckpt", allow_base_mismatch=True).vocabulary == {
        "the": 0
    }


def test_a_buffer_made_in_inference_is_saved_by_the_fit_that_follows(tmp_path):
    module = build(s.Observes)
    make_trainer(tmp_path, {}).test(module, s.vectors(), verbose=False)
    assert module.net[1].high.is_inference()

    make_trainer(tmp_path, {}).fit(module, s.vectors())

    file = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(file["net.1.high"], module.net[1].high)


def test_batch_norm_of_the_frozen_base_stands_still(tmp_path):
    module = train(s.ConvNet, s.images, tmp_path, {})

    norm = module.net[1]
    assert norm.num_batches_tracked == 0
    assert torch.equal(norm.running_mean, torch.zeros(4))
