# Everything a newcomer types. Each target sets up .venv first, which takes minutes once and nothing afterwards.
#
#   make demo [TP=2 PP=1]   train the tiny model that ships with the project, on this machine, without a GPU (DP 2)
#   make demo-agent         train a tiny policy that asks a tool over several turns
#   make demo-moe           the same with a mixture of experts, two of its four experts a rank
#   make test               the test suite, without the slow lane; says what it skipped and why
#   make test-versions PYTHON=python3.12  the part of `make test` that another Megatron-Core could break
#   make test-slow [SHARD=1/3]  the slow lane, or a part of it
#   make test-cuda-profile  the engine's tests on the scheduler and model runner that CUDA gets, without a GPU
#   make test-gpu [ARGS="--budget-minutes 25"]  what only a GPU can show, in order; ARGS=--list prints the plan
#   make test-curves        one short demo, held against recorded curves: for the night
#   make coverage           the lines that `make test` runs, as a table and as pages in build/coverage
#   make test-matrix        what the slow lane leaves out of its full product of layouts: for the night
#   make lint               ruff, mypy, import contracts, the share of typed lines, the figures of style
#   make docs               the documentation site, into build/site
#   make clean              remove caches and build leftovers (runs/ and .venv stay)
#   make test PYTHON=python3.12     any of these on another Python, in .venv-3.12, with the Megatron-Core of that Python

TP ?= 1
PP ?= 1
# The first interpreter found; tools/setup_env.py refuses one that is too old or too new.
FOUND_PYTHON := $(firstword $(foreach p,python3.11 python3.12 python3,$(shell command -v $(p) 2>/dev/null)))
PYTHON ?= $(FOUND_PYTHON)
# Another version of Python than the one found has an environment of its own beside .venv.
VERSION = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
ifneq ($(PYTHON),$(FOUND_PYTHON))
OTHER_VERSION := $(filter-out $(call VERSION,$(FOUND_PYTHON)),$(call VERSION,$(PYTHON)))
endif
VENV ?= .venv$(addprefix -,$(OTHER_VERSION))
BIN := $(VENV)/bin
# Test processes. Tests that share an engine or ranks stay together (tests/groups.py). ARGS="-n 0" is one process.
WORKERS ?= 2
PYTEST = $(BIN)/pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder -rs --durations=20

# One thread a process: several processes share the cores, and idle OpenMP threads would spin on them.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-agent demo-moe test test-versions test-slow test-cuda-profile test-gpu test-matrix test-curves coverage lint docs clean

help:
	@sed -n 's/^#   //p' Makefile

setup:
	@test -n "$(PYTHON)" || { echo "no python3 found: install Python 3.11 or 3.12, or run make PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) -c "" || { echo "$(PYTHON) does not run: name an interpreter, make PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) tools/setup_env.py --venv $(VENV)

demo: setup
	$(BIN)/python tools/demo.py --tp $(TP) --pp $(PP) $(ARGS)

demo-agent: setup
	$(BIN)/python tools/demo_agent.py $(ARGS)

demo-moe: setup
	$(BIN)/python tools/demo.py --model moe $(ARGS)

test: setup
	$(PYTEST) -m "not slow and not matrix" $(ARGS)

# What another Megatron-Core could break, for a second lane: `make test-versions PYTHON=python3.12`.
VERSION_TESTS = tests/runtime/test_megatron_versions.py tests/test_setup.py tests/checkpoint/test_versions.py tests/checkpoint/test_megatron_lm.py tests/engine/test_engine.py
test-versions: setup
	$(PYTEST) $(VERSION_TESTS) -m "not slow and not matrix" $(ARGS)

test-slow: setup
	$(PYTEST) -m slow $(if $(SHARD),--shard $(SHARD)) $(ARGS)

# Async scheduling on both; model runner V2 runs in Triton's interpreter, too slow for the generator's tests.
test-cuda-profile: setup
	TREEPO_ENGINE_PROFILE=cuda $(BIN)/pytest tests/engine/test_engine.py tests/engine/test_branch_cache.py tests/rollout/test_eval.py -rs $(ARGS)
	TREEPO_ENGINE_PROFILE=async $(BIN)/pytest tests/rollout/test_generator.py tests/rollout/test_eval.py \
	    tests/rollout/test_ranks.py tests/sync/test_refit.py -rs $(ARGS)

# Without `setup`, which installs the CPU builds: the Python that has CUDA's torch, from .venv if that is there.
GPU_PYTHON ?= $(firstword $(wildcard $(BIN)/python) $(PYTHON))
test-gpu:
	@$(GPU_PYTHON) tools/gpu/check.py $(ARGS)

test-matrix: setup
	$(PYTEST) -m matrix $(ARGS)

test-curves: setup
	$(BIN)/python tools/curve_gate.py $(ARGS)

# Apart from `make test`: Python 3.11 traces every line for it, which takes pure-Python tests nearly twice the time.
coverage: setup
	$(PYTEST) -m "not slow and not matrix" --cov --cov-report=term:skip-covered --cov-report=html:build/coverage $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/lint/typed_share.py
	$(BIN)/python tools/lint/style_report.py

# The site's tools come with the first `make docs`; nothing else needs them.
docs: setup
	@$(BIN)/python -c "import material, mkdocstrings_handlers.python" 2>/dev/null || $(BIN)/pip install --quiet -e ".[docs]"
	$(BIN)/python tools/docs/generate.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	find treepo_mega tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
