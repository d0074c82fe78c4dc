# One environment in .venv, made from constraints.txt on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch's CPU build is enough for everything here; on a machine with a GPU and its own torch, use that environment with
# `make test BIN=/path/to/its/bin`.
STAMP := $(VENV)/.installed

.PHONY: bench test lint clean

bench: $(STAMP)
	$(BIN)/python -m benchmarks

# Kernel tests run on whatever the process offers: torch on a CPU, Triton on a GPU, and Triton's interpreter here.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal -q
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q -m interpreter

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench,test]'
	touch $@

clean:
	rm -rf $(VENV) checkpoints build dist
