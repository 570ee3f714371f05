"""The README's snippets do what the README says."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_lora import LoRA
from lightning_lora.cli import main

pytestmark = pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX`")  # advice on the default logger
ROOT = Path(__file__).parent.parent


def snippets(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def after_python(tmp_path_factory):
    """The namespace and folder that the Python snippets leave behind, run in their order."""
    folder = tmp_path_factory.mktemp("readme")
    namespace: dict = {"__name__": "readme"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for number, code in enumerate(snippets("README.md", "python")):
            exec(compile(code, f"README.md snippet {number}", "exec"), namespace)
    return namespace, folder


def test_the_trained_model_is_better_than_chance(after_python):
    namespace, _ = after_python
    x, model = namespace["x"], namespace["tuned"].eval()
    assert (model(x).argmax(1) == x[:, :3].argmax(1)).float().mean() > 0.6


def test_base_and_merged_logits_are_what_the_comments_say(after_python):
    namespace, folder = after_python
    x = namespace["x"]
    pretrained = namespace["network"]()
    pretrained.load_state_dict(torch.load(folder / "pretrained.pt"))
    assert torch.equal(namespace["base_logits"], namespace["tuned"].head(pretrained(x)))
    assert not torch.equal(namespace["base_logits"], namespace["merged_logits"])
    assert torch.equal(namespace["merged_logits"], namespace["plain"](x))
    assert type(namespace["plain"].net[0]) is torch.nn.Linear


def test_every_lightning_lora_command_runs(after_python, monkeypatch, capsys):
    namespace, folder = after_python
    monkeypatch.chdir(folder)
    commands = [
        line for block in snippets("README.md", "bash") for line in block.splitlines() if "lightning-lora" in line
    ]
    assert len(commands) == 4
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, capsys.readouterr().err
    merged = namespace["network"]()
    merged.load_state_dict(torch.load("merged.pt"))
    torch.testing.assert_close(namespace["tuned"].head(merged(namespace["x"])), namespace["merged_logits"])


def test_the_yaml_command_trains(after_python, tmp_path):
    [command] = [line for block in snippets("README.md", "bash") for line in block.splitlines() if "train.py" in line]
    model = snippets("README.md", "python")[0].partition("\n\nmodel = ")[0]
    (tmp_path / "train.py").write_text(
        model
        + "\n\nimport lightning_lora\nfrom lightning.pytorch.cli import LightningCLI\n"
        + "torch.save(network().state_dict(), 'pretrained.pt')\n"
        + "class Data(L.LightningDataModule):\n"
        + "    def train_dataloader(self):\n"
        + "        x = torch.randn(64, 16)\n"
        + "        return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=32)\n"
        + "LightningCLI(Classifier, Data)\n"
    )
    for folder in ("configs", "callbacks"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    run = subprocess.run(
        [sys.executable, *shlex.split(command)[1:], "--trainer.max_epochs=1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    [config] = tmp_path.glob("lightning_logs/version_0/config.yaml")
    assert "r: 4" in config.read_text()
    assert list(tmp_path.glob("lightning_logs/version_0/checkpoints/*.adapter/adapter_config.json"))


def test_every_make_target_that_the_readme_names_exists():
    targets = {
        line.split()[1] for block in snippets("README.md", "bash") for line in block.splitlines() if "make" in line
    }
    assert targets == {"demo", "test", "bench"}
    for target in targets:
        run = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=False)
        assert run.returncode == 0


def test_every_link_into_the_repository_leads_somewhere():
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("callbacks/*.md")]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_method_table_names_every_known_argument_default():
    shown = f"`{LoRA()!r}`".replace("'", '"')
    assert shown in (ROOT / "README.md").read_text()
