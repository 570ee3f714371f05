"""Runs the example with one method, by the command line that a user would type."""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
METHODS: dict[str, dict[str, Any]] = yaml.safe_load((HERE / "methods.yaml").read_text())


def arguments(name: str, lr: float | None = None, seed: int = 0) -> list[str]:
    """Returns the arguments of train.py for one method.

    Args:
        name: `head`, `full`, or a file in callbacks/ without its ending.
        lr: Peak learning rate; None takes the one in methods.yaml.
        seed: Of weights, data order and dropout.
    """
    chosen = METHODS[name]
    configs = [f"--config={ROOT / 'configs/cpu.yaml'}", f"--config={HERE / 'sections.yaml'}"]
    if name == "head":
        method = ["--model.freeze_encoder=true"]
    elif name == "full":
        method = []
    else:
        options = {"modules_to_save": "[head]", **chosen.get("callback", {})}
        options |= {f"method.{field}": value for field, value in chosen.get("method", {}).items()}
        method = [f"--trainer.callbacks+={ROOT / 'callbacks' / name}.yaml"]
        method += [f"--trainer.callbacks.{field}={value}" for field, value in options.items()]
    return [*configs, f"--seed_everything={seed}", *method, f"--model.lr={float(chosen['lr'] if lr is None else lr)}"]


def main() -> None:
    """Prints the command and runs it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    command = [sys.executable, str(HERE / "train.py"), *arguments(options.method, seed=options.seed)]
    print(shlex.join(command), flush=True)
    sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
