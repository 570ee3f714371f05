"""What the tests share: a tiny LightningModule, its data, and a quiet Trainer."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

torch.set_num_threads(1)


class Net(nn.Module):
    """Two linear layers, no randomness in the forward."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(4, width)
        self.second = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Lit(L.LightningModule):
    """A LightningModule as a user writes it; it keeps the loss of every batch.

    Args:
        configure: What ``configure_optimizers`` returns, as a function of the module.
        width: Of the hidden layer.
    """

    def __init__(self, configure: Callable[[Any], Any] | None = None, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.net = self.build()
        self.configure = configure
        self.losses: list[float] = []

    def build(self) -> nn.Module:
        """Return the network, the same at every call."""
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return Net(self.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        if self.configure is not None:
            return self.configure(self)
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def loader(batches: int = 4, batch_size: int = 4) -> DataLoader[Any]:
    """Return the same batches in the same order at every call."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(batches * batch_size, 4, generator=generator)
    y = torch.randint(0, 3, (batches * batch_size,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def run_processes(script: str, folder: Path, timeout: int) -> None:
    """Run a script of this folder, which starts processes and writes what they found to another one.

    Args:
        script: Its name.
        folder: Where it writes to.
        timeout: In seconds.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PL_", "PYTEST", "LOCAL_RANK"))}
    here = [str(Path(__file__).parent.parent), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name(script), folder],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**kept, "PYTHONPATH": os.pathsep.join(here), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start every test from the same random state, and without what an earlier ``seed_everything`` left."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    torch.manual_seed(0)


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., L.Trainer]:
    """Return a factory of Trainers that run two epochs on the CPU and write nothing unless they are told to."""

    def make(cls: Any = L.Trainer, **kwargs: Any) -> Any:
        quiet = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 2,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        return cls(**quiet | kwargs)

    return make
