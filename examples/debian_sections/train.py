"""Trains and tests the section classifier and, if LoRA was used, checks the trained adapter."""

import time
from importlib.util import find_spec
from pathlib import Path

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


def uses_lora(trainer: L.Trainer) -> bool:
    """Says whether the LoRA callback is among the trainer's callbacks."""
    return any(isinstance(callback, lightning_lora.LoRACallback) for callback in trainer.callbacks)


def print_row(**columns: str) -> None:
    """Prints one row of a table under its header."""
    print()
    print(*(name.replace("_", " ").ljust(len(value)) for name, value in columns.items()), sep="  ")
    print(*(value.ljust(len(name)) for name, value in columns.items()), sep="  ", end="\n\n")


def fit_and_test(trainer: L.Trainer, model: SectionClassifier, data: SectionData) -> Path:
    """Fits, tests the best checkpoint, and prints the figures.

    Returns:
        The best checkpoint, whose weights the model then has.
    """
    start = time.perf_counter()
    trainer.fit(model, data)
    seconds = time.perf_counter() - start
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    test_acc = trainer.test(model, data, ckpt_path="best", verbose=False)[0]["test_acc"]
    checkpoint = Path(trainer.checkpoint_callback.best_model_path)
    print_row(
        method="LoRA" if uses_lora(trainer) else "head only" if model.hparams.freeze_encoder else "full",
        test_accuracy=f"{test_acc:.3f}",
        trainable_parameters=f"{trainable:,}",
        checkpoint_bytes=f"{checkpoint.stat().st_size:,}",
        seconds_for_fit=f"{seconds:.1f}",
    )
    return checkpoint


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
    checkpoint = fit_and_test(trainer, model, data)
    if not uses_lora(trainer):
        return
    folder = checkpoint.with_suffix(".adapter")
    print("adapter folder:", *(f"{file.name} ({file.stat().st_size:,} bytes)" for file in sorted(folder.iterdir())))
    pooled, logits = predict(model.encoder, model.head, data)
    if find_spec("peft"):
        check_peft(model.hparams.base, folder, model.head, pooled, data)
    check_merged(model, logits, data)


if __name__ == "__main__":
    main()
