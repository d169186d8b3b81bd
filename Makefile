# make train: from nothing to a trained model. make test: the tests. Both create the virtual environment they need.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Workers of pytest; one thread each, since many tests start several processes of their own.
TEST_WORKERS ?= 2
EXTRAS := dev
# TORCH=cpu installs the build of torch without CUDA, from whatever index or folder pip is configured with.
TORCH ?=
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)

.PHONY: help train quick test test-all test-affected test-versions budgets check docs bench format
.DEFAULT_GOAL := help

help:
	@echo "make train    prepare real text, pretrain a small Llama in TP 2 x PP 2, fine-tune it into an assistant, ask it"
	@echo "make quick    run the tests that start no process (under 2 minutes of processor time)"
	@echo "make test     run all but the slow tests (25 minutes of processor time; TEST_WORKERS=2)"
	@echo "make test-all run every test"
	@echo "make test-affected    run the slow tests whose code the change since the main branch touched"
	@echo "make test-versions    run the few tests that CI runs on a second Python"
	@echo "make budgets  run what make test runs, and write its processor time into tests/budgets.txt"
	@echo "make check    formatting, lint, types, import layers"
	@echo "make docs     build the documentation site into build/docs"
	@echo "make bench    measure a training step and data preparation"
	@echo "make format   format the code"

train: $(STAMP)
	$(BIN)/llm-parallel quickstart

quick: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/unit -m "not slow and not gloo and not processes" --no-processes

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder --hold-budgets

test-all: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

test-affected: $(STAMP)
	files="$$($(BIN)/python -m tests.support.affected)" && { test -z "$$files" || \
		OMP_NUM_THREADS=1 $(BIN)/pytest -m slow -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $$files; }

test-versions: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(TEST_WORKERS) @tests/versions.txt
	$(BIN)/llm-parallel quickstart --folder $(VENV)/quickstart --chat-steps 10 train.steps=20 train.eval_interval_steps=20 optim.warmup_steps=5

budgets: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder --write-budgets

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict -f docs/mkdocs.yml

bench: $(STAMP)
	$(BIN)/llm-parallel bench step configs/bench-17m.yaml
	$(BIN)/python benchmarks/data.py

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Each line checks one thing that a bare machine may lack and names the package that brings it.
$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*) $(wildcard csrc/decode/*)
	@command -v $(PYTHON) >/dev/null || { echo "No $(PYTHON) here; install it (Debian: apt install python3) or say make PYTHON=/path/to/python3." >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$(PYTHON) is older than 3.10; say make PYTHON=python3.11 or another newer one." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "$(PYTHON) cannot create virtual environments; on Debian and Ubuntu: apt install python3-venv." >&2; exit 2; }
	@test -f "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || { echo "$(PYTHON) lacks its C headers; on Debian and Ubuntu: apt install python3-dev." >&2; exit 2; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || { echo "There is no C++ compiler; on Debian and Ubuntu: apt install g++." >&2; exit 2; }
	@echo "Installing llm-parallel[$(EXTRAS)] into $(VENV) (once; some minutes) ..."
	@$(PYTHON) -m venv $(VENV)
ifeq ($(TORCH),cpu)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'torch==$(TORCH_VERSION)+cpu' || { echo "pip finds no torch $(TORCH_VERSION)+cpu for this Python; give it the index that has one (PIP_EXTRA_INDEX_URL=...), or leave TORCH=cpu out." >&2; exit 2; }
else
	@ls /dev/nvidia[0-9]* >/dev/null 2>&1 || $(BIN)/python -m pip install --disable-pip-version-check --quiet --dry-run --no-deps --report - -c constraints.txt torch 2>/dev/null | grep -qE '"(nvidia|cuda)-' || exit 0; echo "This machine shows no GPU, and the torch that pip finds for this Python brings about 5.5 GB of CUDA libraries. If your index has the build without CUDA, stop this and say: make TORCH=cpu $(MAKECMDGOALS)"
endif
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $(STAMP)
