# `make demo` and `make test` do all their own set-up in .venv; `make help` lists the rest.

PYTHON ?= python3
STORE ?= .calprune
BIN := .venv/bin
STAMP := .venv/.installed

# Without an NVIDIA GPU the CPU build of torch is taken, which is a tenth of the CUDA build's size.
# A torch that is already in .venv, of whatever build, is left alone.
TORCH_CPU := --retries 0 --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu
TORCH := $(shell if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; \
	then echo "$(TORCH_CPU)"; else echo torch; fi)

.PHONY: demo test check bench setup clean help

demo: $(STAMP)  ## prune the testbed model 52 ways, print the table, write the report
	$(BIN)/python -m jobs run jobs/grids/demo.yaml --store $(STORE)
	$(BIN)/python -m analysis report $(STORE) --grid demo --reference mismatched

test: check  ## all checks and tests
	$(BIN)/python -m pytest

check: $(STAMP)  ## format, lint, types and import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)  ## time the pruners, print the tables, leave them in $(STORE)/benchmark.json
	$(BIN)/python -m benchmarks.prune --output $(STORE)/benchmark.json

setup: $(STAMP)  ## the environment in .venv

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:  ## remove the environment and the demo's store
	rm -rf .venv $(STORE)

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'
