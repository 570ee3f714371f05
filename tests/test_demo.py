"""The demo's data are what its README says, and its script runs from training to the last check."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "examples/debian_sections"
sys.path.insert(0, str(DEMO))

from demo import METHODS, arguments  # noqa: E402


def rows(split: str) -> list[dict[str, str]]:
    with (DEMO / f"data/{split}.tsv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def test_the_splits_have_their_sizes_and_share_no_source_package_and_no_synopsis():
    splits = {split: rows(split) for split in ("train", "validation", "test")}
    assert {split: len(found) for split, found in splits.items()} == {"train": 2000, "validation": 500, "test": 1000}
    for column in ("source", "synopsis"):
        values = [row[column] for found in splits.values() for row in found]
        assert len(set(values)) == 3500
    for found in splits.values():
        assert len({row["section"] for row in found}) == 14


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory) -> Path:
    """A BERT of two narrow layers with a word list of the data, as `save_pretrained` leaves it."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("base")
    words = sorted({word.lower() for row in rows("train") for word in row["synopsis"].split() if word.isalnum()})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    tokenizer = transformers.BertTokenizerFast(vocab_file=str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words) + 5, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def short(base: Path, folder: Path) -> list[str]:
    return [
        f"--model.base={base}",
        "--trainer.max_epochs=1",
        *(f"--trainer.limit_{loop}_batches=4" for loop in ("train", "val", "test")),
        "--trainer.enable_progress_bar=false",
        f"--trainer.logger.init_args.save_dir={folder}",
    ]


def test_the_script_trains_tests_and_checks_the_adapter(tiny_base, tmp_path):
    command = [sys.executable, str(DEMO / "train.py"), *arguments("lora"), *short(tiny_base, tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for text in ("LoRA ", "test accuracy", "loaded by PEFT", "merged against unmerged"):
        assert text in run.stdout


@pytest.mark.filterwarnings("ignore")  # those of tiny runs and of transformers
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_and_its_adapter_is_checked(name, tiny_base, tmp_path, monkeypatch, capsys):
    import train

    sooner = {
        "delta_lora": ["--trainer.callbacks.method.start_step=1"],
        "relora": ["--trainer.callbacks.method.restart_every=2"],
    }
    argv = ["train.py", *arguments(name), *short(tiny_base, tmp_path), *sooner.get(name, [])]
    monkeypatch.setattr(sys, "argv", argv)
    train.main()
    printed = capsys.readouterr().out
    assert "test accuracy" in printed
    assert ("merged against unmerged" in printed) == (name not in ("head", "full"))
    assert ("loaded by PEFT" in printed) == (name not in ("head", "full", "dvora", "delta_lora", "relora"))


def test_every_ready_callback_of_a_method_can_be_run_and_an_unknown_one_is_refused_with_the_choice():
    ready = {file.stem for file in (ROOT / "callbacks").glob("*.yaml")} - {"ema", "preemption"}
    assert set(METHODS) == {"head", "full"} | ready
    command = [sys.executable, str(DEMO / "demo.py"), "lara"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert all(name in run.stderr for name in METHODS)


def test_the_command_of_a_method_is_one_that_a_user_could_type():
    assert [part.replace(f"{ROOT}/", "") for part in arguments("lora_plus", seed=3)] == [
        "--config=configs/cpu.yaml",
        "--config=examples/debian_sections/sections.yaml",
        "--seed_everything=3",
        "--trainer.callbacks+=callbacks/lora_plus.yaml",
        "--trainer.callbacks.modules_to_save=[head]",
        "--trainer.callbacks.lr_ratio=4",
        "--model.lr=0.001",
    ]
