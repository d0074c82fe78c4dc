# One environment in .venv, made from constraints.txt on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch's CPU build is enough for everything here; on a machine with a GPU and its own torch, use that environment with
# `make test BIN=/path/to/its/bin`.
STAMP := $(VENV)/.installed
CHECKPOINT := checkpoints/reference

.DEFAULT_GOAL := help
.PHONY: help bench bench-ci bench-ci-save compile-report gpu-report figures finetune test test-chips test-engines test-exhaustive test-models test-ptx test-transformers other-transformers models lint clean

help:
	@grep -E '^make [a-z-]+ +#' README.md

bench: $(STAMP)
	$(BIN)/python -m benchmarks

# On a quiet machine: measures, saves the run, and draws the tables and the picture of README.md and docs/ from it.
figures: bench
	$(BIN)/python -m benchmarks readme --take benchmarks/results/local/latest.json

# Ratios to sdpa in one run against those of an earlier commit; a slow-down of more than 20 % fails.
bench-ci: $(STAMP)
	$(BIN)/python -m pytest -q -p no:xdist --benchmark-enable --benchmark-columns=median,iqr,rounds benchmarks/regression

bench-ci-save: $(STAMP)
	$(BIN)/python -m pytest -q -p no:xdist --benchmark-enable --benchmark-columns=median,iqr,rounds --save-baseline benchmarks/regression

# On a machine with a GPU, in its own environment: nothing is installed. GPU_PYTHON=/path/to/python chooses another.
GPU_PYTHON ?= python3
gpu-report:
	PYTHONPATH=.:kernels $(GPU_PYTHON) -m benchmarks gpu-report
# Needs no GPU: compiles every 16-bit tile shape for every chip, and draws the tables of docs/compile-report.md.
compile-report: $(STAMP)
	$(BIN)/python -m attention_plugin compile-report --dtype bfloat16 --jobs 2 --write docs/compile-report.md

finetune: $(STAMP) $(CHECKPOINT)/tokenizer.json
	$(BIN)/python examples/finetune.py $(CHECKPOINT) --output checkpoints/finetuned

# The file that training writes last. A checkpoint that is there is kept.
$(CHECKPOINT)/tokenizer.json: | $(STAMP)
	$(BIN)/python -m model.checkpoint $(CHECKPOINT) --train-seconds 60

checkpoints/multimodal/tokenizer.json: | $(STAMP)
	$(BIN)/python -m model.checkpoint checkpoints/multimodal --multimodal

# Kernel tests run on whatever the process offers: torch on a CPU, Triton on a GPU, and Triton's interpreter here.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal -q
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q -m 'interpreter and not exhaustive and not families'

# What would take `make test` beyond ten minutes on two cores: every tile shape for every chip, ...
test-chips: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m 'exhaustive and not engines'

# ... and more random problems in the interpreter, and of SGLang what its own attention shows as well, which would take
# `.ci/run` beyond an hour on a slow machine.
test-exhaustive: test-chips test-engines
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q -m 'interpreter and exhaustive'
	$(BIN)/python -m pytest -n 2 -q -m 'engines and exhaustive' tests/engines

# Tests of kernels with the kernels as compiled for a GPU that is not there, on the machine in tests/kernels/ptx; with
# SEED=1 in a random order, and with what runs beside the threads as late as it may.
CAPABILITY ?= 90
test-ptx: $(STAMP)
	PTX_CAPABILITY=$(CAPABILITY) $(if $(SEED),PTX_SEED=$(SEED)) $(BIN)/python -m pytest -n 2 --dist worksteal -q \
		-m 'interpreter and not exhaustive' tests/kernels

# Each engine in an environment of its own, .venv-vllm and .venv-sglang, made on first use. On a machine whose registry
# is slow the first time takes some minutes more.
test-engines: $(STAMP) $(CHECKPOINT)/tokenizer.json checkpoints/multimodal/tokenizer.json
	$(BIN)/python tests/engines/environment.py vllm .venv-vllm & \
	$(BIN)/python tests/engines/environment.py sglang .venv-sglang && wait $$!
	$(BIN)/python -m pytest -n 2 -q -m 'engines and not exhaustive' --durations 5 tests/engines
	$(BIN)/python tests/engines/engine_table.py check

# What another release of transformers may move: masks, caches, batches, what is refused, and the reference models under it.
TRANSFORMERS ?= 5.24.0
TRANSFORMERS_TESTS ?= tests/attention_plugin tests/model tests/examples tests/benchmarks
OTHER := $(VENV)-transformers-$(TRANSFORMERS)
test-transformers: $(OTHER)
	PYTHONPATH=$(CURDIR)/$(OTHER) $(BIN)/python -m pytest -n 2 --dist worksteal -q $(TRANSFORMERS_TESTS)

other-transformers: $(OTHER)

$(OTHER): | $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --target $@ transformers==$(TRANSFORMERS)

# Every model family of transformers against eager; a quarter of them with the Triton kernels in the interpreter.
test-models: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m families tests/model_families
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q -m 'families and interpreter' tests/model_families

# Runs every model family and writes docs/models.md.
models: $(STAMP)
	PYTHONPATH=.:kernels:tests $(BIN)/python -m model_families.report

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench,examples,test]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-* checkpoints build dist
