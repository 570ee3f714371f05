"""Trains and tests the section classifier and, if LoRA was used, checks the trained adapter."""

import json
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch import Tensor, nn

import lightning_lora
from sections import SectionClassifier, SectionData, load_encoder, mean_pool


class SectionCLI(LightningCLI):
    """A LightningCLI whose data module tokenizes for the model's base."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Links the tokenizer's base to the model's."""
        parser.link_arguments("model.base", "data.base")


class Score(NamedTuple):
    """What a run came to.

    Attributes:
        checkpoint: The best one, whose weights the model then has.
        validation_accuracy: Of that checkpoint.
        test_accuracy: Likewise.
        trainable: Number of trainable parameters.
        seconds: Of the fit.
    """

    checkpoint: Path
    validation_accuracy: float
    test_accuracy: float
    trainable: int
    seconds: float


def method_of(trainer: L.Trainer) -> str | None:
    """Returns the class name of the method that the callback injects, or None if there is no such callback."""
    callbacks = (one for one in trainer.callbacks if isinstance(one, lightning_lora.LoRACallback))
    return next((type(one.method).__name__ for one in callbacks), None)


def print_row(**columns: str) -> None:
    """Prints one row of a table under its header."""
    print()
    print(*(name.replace("_", " ").ljust(len(value)) for name, value in columns.items()), sep="  ")
    print(*(value.ljust(len(name)) for name, value in columns.items()), sep="  ", end="\n\n")


def fit_and_test(trainer: L.Trainer, model: SectionClassifier, data: SectionData) -> Score:
    """Fits, and tests the best checkpoint."""
    start = time.perf_counter()
    trainer.fit(model, data)
    seconds = time.perf_counter() - start
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    test_acc = trainer.test(model, data, ckpt_path="best", verbose=False)[0]["test_acc"]
    best = trainer.checkpoint_callback
    return Score(Path(best.best_model_path), float(best.best_model_score), test_acc, trainable, seconds)


@torch.no_grad()
def predict(encoder: nn.Module, head: nn.Module, data: SectionData) -> tuple[Tensor, Tensor]:
    """Returns the pooled encoder outputs and the logits of the test set."""
    encoder.eval()
    pooled = torch.cat([mean_pool(encoder, batch) for batch in data.test_dataloader()])
    return pooled, head(pooled)


def check_merged(model: SectionClassifier, logits: Tensor, data: SectionData) -> None:
    """Merges the adapter into the model's weights and compares the predictions."""
    merged = lightning_lora.merge_(model)
    _, merged_logits = predict(merged.encoder, merged.head, data)
    print(f"merged against unmerged: largest difference of logits {(merged_logits - logits).abs().max():.1e}")
    assert torch.equal(merged_logits.argmax(1), logits.argmax(1)), "the merged model predicts other sections"


def check_peft(base: str, folder: Path, head: nn.Module, pooled: Tensor, data: SectionData) -> None:
    """Loads the adapter folder with PEFT into a fresh encoder and compares the encoder's outputs."""
    from peft import PeftModel

    peft_model = PeftModel.from_pretrained(load_encoder(base), folder)
    difference = (predict(peft_model, head, data)[0] - pooled).abs().max().item()
    print(f"loaded by PEFT against ours: largest difference of pooled outputs {difference:.1e}")
    assert difference <= 1e-4, "PEFT computes something else from the adapter folder"


def main() -> None:
    """Runs the example from the command line."""
    cli = SectionCLI(SectionClassifier, SectionData, run=False, seed_everything_default=0)
    trainer, model, data = cli.trainer, cli.model, cli.datamodule
    score = fit_and_test(trainer, model, data)
    print_row(
        method=method_of(trainer) or ("head only" if model.hparams.freeze_encoder else "full"),
        test_accuracy=f"{score.test_accuracy:.3f}",
        trainable_parameters=f"{score.trainable:,}",
        checkpoint_bytes=f"{score.checkpoint.stat().st_size:,}",
        seconds_for_fit=f"{score.seconds:.1f}",
    )
    if method_of(trainer) is None:
        return
    folder = score.checkpoint.with_suffix(".adapter")
    print("adapter folder:", *(f"{file.name} ({file.stat().st_size:,} bytes)" for file in sorted(folder.iterdir())))
    pooled, logits = predict(model.encoder, model.head, data)
    if find_spec("peft") and json.loads((folder / "adapter_config.json").read_text())["peft_type"] != "LIGHTNING_LORA":
        check_peft(model.hparams.base, folder, model.head, pooled, data)
    check_merged(model, logits, data)


if __name__ == "__main__":
    main()
