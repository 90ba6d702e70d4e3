# Two commands matter: `make demo` and `make test`. Each sets everything up from nothing, in any order, and needs no
# network the second time. What they install lies in .venv; the system's Python is not touched.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

# May be given on the command line:
PYTHON ?=
TORCH ?= torch==2.13.0
TEST_PROCESSES ?= 2
NAME ?=
ARGS ?=

BIN := .venv/bin
STAGE := tools/stage.sh
PYTEST := $(BIN)/python -m pytest -q
# Two of Ray's clusters on a machine find each other, and one process has only one of its security modes.
RAY_TESTS := $(wildcard tests/unit/test_*ray*.py tests/unit/test_train_distributed.py tests/unit/test_train_sharding.py)
export PYTHON TORCH
# One thread a process unless asked for: two processes of PyTorch on two cores hinder each other otherwise.
export OMP_NUM_THREADS ?= 1
# Environments of simulators that have one of their own: vla-rl env install NAME.
export VLA_RL_ENVS ?= $(CURDIR)/runs/envs
# A ROS or conda shell puts foreign packages before those of .venv; images of containers forbid Python to keep what it
# compiled, and then each process compiles the project again.
unexport PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE

.PHONY: help setup setup-dev sims vulkan browser demo demo-control check lint format types test unit wheel smoke test-slow test-gpu bench experiment \
        reference docs clean distclean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)$$/  make \1\t\2/p' Makefile | expand -t 24
	@echo "  options: PYTHON=python3.12  TORCH=torch==X.Y  ARGS=\"...\" (more arguments for the command)"

demo: setup ## the main job: demonstrations, fine-tuning, reinforcement learning, report in runs/demo
	@$(STAGE) "main job: vla-rl run demo" $(BIN)/vla-rl run demo --run-dir runs/demo \
	    $(if $(wildcard runs/demo/summary.json),,--resume) $(ARGS)

demo-control: setup ## the demo's negative control too: the same RL on shuffled advantages, added to runs/demo
	@$(STAGE) "control: vla-rl run demo --control" $(BIN)/vla-rl run demo --run-dir runs/demo --resume --control $(ARGS)

# Simulators are installed while the types are checked: pip and pyright have one core each.
test: setup-dev ## everything that must hold: check, tests, the wheel, the short main job
	@$(MAKE) --no-print-directory sims & sims=$$!; trap 'kill $$sims 2>/dev/null || true' EXIT; \
	    $(MAKE) --no-print-directory check; wait $$sims
	@$(MAKE) --no-print-directory unit wheel smoke

check: setup-dev lint format types ## lint, format and types; changes nothing

bench: setup-dev ## run one benchmark: make bench NAME=...; the last line is its result as JSON
	@tools/run_named.sh benchmarks "$(NAME)" $(ARGS)

experiment: setup-dev ## run one learning experiment: make experiment NAME=...; see runs/experiments
	@tools/run_named.sh experiments "$(NAME)" $(ARGS)

test-slow: setup-dev ## the tests that take minutes
	@$(STAGE) "slow tests" $(PYTEST) -n $(TEST_PROCESSES) -m "slow and not gpu" $(ARGS)

test-gpu: setup-dev ## the tests that need a CUDA device
	@$(STAGE) "tests on the GPU" $(PYTEST) -m gpu $(ARGS)

reference: setup-dev ## write the pages of docs that are made of code (metrics, configs)
	@$(STAGE) "reference: docs/metrics.md, docs/configs.md" $(BIN)/python tools/make_reference.py

docs: reference ## build the documentation site into build/site; any broken link fails
	@NO_MKDOCS_2_WARNING=1 $(STAGE) "site: build/site/index.html" $(BIN)/python -m mkdocs build --strict --quiet

setup: ## make .venv with what the main job needs (done by make demo)
	@tools/setup.sh demo

setup-dev: ## make .venv with the test tools too (done by make test)
	@tools/setup.sh dev

sims: setup ## install the simulators that have environments of their own (NAME=robosuite: that one)
	@$(STAGE) "simulators" $(BIN)/vla-rl env install $(or $(NAME),robosuite libero metaworld maniskill)
	@$(if $(filter maniskill,$(or $(NAME),maniskill)),$(STAGE) "a Vulkan driver for ManiSkill" tools/fetch_vulkan.sh \
	    || echo "without one ManiSkill does not run; its tests are skipped")

vulkan: ## put a Vulkan driver that ManiSkill takes into runs/vulkan (Debian; no root)
	@tools/fetch_vulkan.sh

browser: ## install Chromium for the tests of pages, where it is missing (Debian; as root)
	@$(STAGE) "a browser for the tests of pages" tools/install_chromium.sh

# The stages of `make check` and `make test`.
lint format types unit wheel smoke: setup-dev
unit: sims browser

lint:
	@$(STAGE) "lint: ruff check" $(BIN)/ruff check --quiet .

format:
	@$(STAGE) "format: ruff format --check" $(BIN)/ruff format --quiet --check .

types:
	@$(BIN)/python tools/link_tree.py
	@$(STAGE) "types: pyright" $(BIN)/python -m pyright

# A file's tests share what its fixtures made, so they stay in one process.
unit:
	@$(STAGE) "tests: pytest in $(TEST_PROCESSES) processes" \
	    $(PYTEST) -n $(TEST_PROCESSES) --dist loadfile -m "not slow and not gpu" --durations 20 $(addprefix --ignore=,$(RAY_TESTS)) $(ARGS)
	$(if $(ARGS),,@for file in $(RAY_TESTS); do \
	    $(STAGE) "tests with Ray: $$file" $(PYTEST) -m "not slow and not gpu" --durations 3 $$file; done)

wheel:
	@$(STAGE) "wheel: built, installed apart, every module imported" $(BIN)/python tools/check_wheel.py

smoke:
	@rm -rf runs/demo_smoke
	@$(STAGE) "main job in its shortest form" $(BIN)/vla-rl run demo_smoke --run-dir runs/demo_smoke

clean: ## remove what checks and builds leave; keeps .venv and runs
	@rm -rf build dist ./*.egg-info .pytest_cache .ruff_cache .hypothesis MUJOCO_LOG.TXT
	@find . \( -name .venv -o -name runs -o -name .git \) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## also remove .venv
	@rm -rf .venv
