"""Every YAML fragment of `callbacks/` and `configs/` is what LightningCLI takes, and any pair combines."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import AdapterEMA, LoRACallback, PreemptionCheckpoint, sites

# Lightning 2.6's CLI calls two functions that newer jsonargparse deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
ROOT = Path(__file__).parent.parent
CALLBACKS = sorted(ROOT.glob("callbacks/*.yaml"))
BESIDE = ROOT / "callbacks/ema.yaml"  # adapts nothing itself
LEAVING = ROOT / "callbacks/preemption.yaml"  # nor does this
METHODS = [path for path in CALLBACKS if path not in (BESIDE, LEAVING)]
AVERAGED = [path for path in METHODS if path.stem not in ("lora_drop", "relora")]  # which say that they cannot be
CONFIGS = sorted(ROOT.glob("configs/*.yaml"))


class Plain(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(8, 16)), batch_size=4)


class ParsedOnly(LightningCLI):
    """Stops before classes are made, because a machine may lack the hardware that a config asks for."""

    def instantiate_classes(self):
        pass


@pytest.fixture(autouse=True)
def _no_arguments_of_the_test_run(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])


def command_line(*arguments: str, folder: Path, cli=LightningCLI, **kwargs):
    fixed = ["--trainer.logger=false", f"--trainer.default_root_dir={folder}", "--trainer.enable_progress_bar=false"]
    return cli(
        Plain, args=[*arguments, *fixed], save_config_callback=None, run=False, seed_everything_default=0, **kwargs
    )


@pytest.mark.parametrize("callback", METHODS, ids=lambda path: path.stem)
def test_each_callback_fragment_trains(callback, tmp_path):
    cli = command_line(
        f"--config={ROOT / 'configs/cpu.yaml'}",
        f"--trainer.callbacks+={callback}",
        "--trainer.max_epochs=1",
        folder=tmp_path,
    )
    cli.trainer.fit(cli.model)
    assert len(sites(cli.model)) == 2
    assert all(site.adapter("default").delta().abs().sum() > 0 for site in sites(cli.model))


@pytest.mark.parametrize("callback", AVERAGED, ids=lambda path: path.stem)
def test_the_average_goes_with_each_of_them_that_can_be_averaged(callback, tmp_path):
    cli = command_line(
        f"--config={ROOT / 'configs/cpu.yaml'}",
        f"--trainer.callbacks+={callback}",
        f"--trainer.callbacks+={BESIDE}",
        "--trainer.callbacks.decay=0.5",
        "--trainer.max_epochs=1",
        folder=tmp_path,
    )
    [average] = [one for one in cli.trainer.callbacks if isinstance(one, AdapterEMA)]
    assert average.decay == 0.5
    cli.trainer.fit(cli.model)
    cli.trainer.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert content["current_model_state"].keys() == {n for n, p in cli.model.named_parameters() if p.requires_grad}
    assert any(
        not torch.equal(value, content["state_dict"][name]) for name, value in content["current_model_state"].items()
    )


def test_the_checkpoint_of_a_job_that_has_to_go_comes_with_one_more_fragment(tmp_path):
    cli = command_line(
        f"--trainer.callbacks+={ROOT / 'callbacks/lora.yaml'}",
        f"--trainer.callbacks+={LEAVING}",
        f"--trainer.callbacks.dirpath={tmp_path}",
        folder=tmp_path,
    )
    [leaving] = [one for one in cli.trainer.callbacks if isinstance(one, PreemptionCheckpoint)]
    assert leaving.ckpt_path == f"{tmp_path}/preempted.ckpt"


@pytest.mark.parametrize("callback", CALLBACKS, ids=lambda path: path.stem)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_any_pair_parses_and_round_trips(callback, config, tmp_path):
    cli = command_line(f"--config={config}", f"--trainer.callbacks+={callback}", folder=tmp_path, cli=ParsedOnly)
    text = cli.parser.dump(cli.config)
    saved = tmp_path / "saved.yaml"
    saved.write_text(text)
    again = ParsedOnly(
        Plain, args=[f"--config={saved}"], save_config_callback=None, run=False, seed_everything_default=0
    )
    assert again.parser.dump(again.config) == text
    assert "lightning_lora" in text


def test_fields_of_the_callback_and_its_method_are_set_behind_it(tmp_path):
    cli = command_line(
        "--trainer.accelerator=cpu",
        f"--trainer.callbacks+={ROOT / 'callbacks/lora.yaml'}",
        "--trainer.callbacks.method.r=3",
        "--trainer.callbacks.modules_to_save=[net.2]",
        folder=tmp_path,
    )
    [callback] = [one for one in cli.trainer.callbacks if isinstance(one, LoRACallback)]
    assert callback.method.r == 3
    assert callback.modules_to_save == ["net.2"]


def test_our_strategies_options_are_set_in_a_config(tmp_path):
    strategy = "lightning_lora.strategies.ddp.LoRADDPStrategy"
    arguments = [f"--trainer.strategy={strategy}", "--trainer.strategy.broadcast_base=false"]
    arguments += ["--trainer.strategy.process_group_backend=gloo", "--trainer.accelerator=cpu"]
    chosen = command_line(*arguments, folder=tmp_path).trainer.strategy
    assert not chosen.broadcast_base
    assert chosen.process_group_backend == "gloo"


def test_short_names_are_known_once_the_library_is_imported(tmp_path):
    cli = command_line(
        "--trainer.accelerator=cpu",
        "--trainer.callbacks+=LoRACallback",
        "--trainer.callbacks.method=LoRA",
        "--trainer.callbacks.method.dropout=0.5",
        folder=tmp_path,
    )
    [callback] = [one for one in cli.trainer.callbacks if isinstance(one, LoRACallback)]
    assert callback.method.dropout == 0.5


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("--trainer.callbacks.method.r=0", "the rank must be a whole number of at least 1"),
        ("--trainer.callbacks.method.alpha=-1", "alpha=-1.0: must be a finite number above 0"),
        ("--trainer.callbacks.lr_ratio=0", "lr_ratio=0.0: must be a finite number above 0"),
    ],
)
def test_a_bad_value_is_answered_in_our_own_words(argument, sentence, tmp_path, capsys):
    with pytest.raises((SystemExit, ValueError)) as caught:
        command_line("--trainer.accelerator=cpu", "--trainer.callbacks+=LoRACallback", argument, folder=tmp_path)
    assert sentence in str(caught.value) + capsys.readouterr().err


def test_a_misspelt_field_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command_line(
            "--trainer.accelerator=cpu",
            "--trainer.callbacks+=LoRACallback",
            "--trainer.callbacks.method.rank=4",
            folder=tmp_path,
        )
    assert "rank" in capsys.readouterr().err
