# Everything a newcomer types. Each target sets up .venv first, which takes minutes once and nothing afterwards.
#
#   make demo [TP=2 PP=1]   train the tiny model that ships with the project, on this machine, without a GPU
#   make test               the test suite, without the slow lane; says what it skipped and why
#   make test-slow          the slow lane
#   make lint               ruff, mypy, import contracts
#   make clean              remove caches and build leftovers (runs/ and .venv stay)

VENV ?= .venv
TP ?= 2
PP ?= 1
# The first interpreter found; tools/setup_env.py refuses one that is too old and says so.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3,$(shell command -v $(p) 2>/dev/null)))
BIN := $(VENV)/bin

# One thread a process: several processes share the cores, and idle OpenMP threads would spin on them.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint clean

help:
	@sed -n 's/^#   //p' Makefile

setup:
	@test -n "$(PYTHON)" || { echo "no python3 found: install Python 3.11 or newer, or run make PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) tools/setup_env.py --venv $(VENV)

demo: setup
	$(BIN)/python tools/demo.py --tp $(TP) --pp $(PP) $(ARGS)

test: setup
	$(BIN)/pytest -m "not slow" -rs $(ARGS)

test-slow: setup
	$(BIN)/pytest -m slow -rs $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	find treepo_mega tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
