# RLHF in three stages. `make` lists what there is; README.md explains it.
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup lock check test test-quick test-oldest test-latest test-readme test-slow test-browser sft rm ppo methods base clean

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
LOCK   := requirements.lock
# What `make setup` installs: "locked" (what was tested), "latest" or "oldest" inside the bounds.
# The other targets take what it has installed.
INSTALLED := $(patsubst $(VENV)/.ready-%,%,$(wildcard $(VENV)/.ready-*))
VERSIONS ?= $(or $(if $(LATEST),latest),$(if $(filter setup,$(MAKECMDGOALS)),locked),$(INSTALLED),locked)
TORCH  ?= $(TORCH_$(VERSIONS))
TORCH_locked := $(shell sed -n 's/^\# first: //p' $(LOCK))
TORCH_latest := $(shell sed -n 's/^ *"\(torch>[^"]*\)".*/\1/p' pyproject.toml)
TORCH_oldest := $(shell sed -n 's/^ *"torch>=\([0-9.]*\).*/torch==\1.*/p' pyproject.toml)
READY  := $(VENV)/.ready-$(VERSIONS)
PIP    := $(BIN)/python -m pip --disable-pip-version-check install

RUN    ?= tiny
NPROC  ?= 1
# Processes that run tests, each a whole file at a time.
WORKERS ?= 2
STAGE   = NPROC=$(NPROC) $(BIN)/python stages

help: ## list the targets and dials
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  dials: RUN=$(RUN)  SFT_ARGS= RM_ARGS= PPO_ARGS= (Hydra overrides)  NPROC=$(NPROC)  LATEST=1 TORCH= PYTHON= VENV= (setup)  WORKERS=$(WORKERS) (tests)"
	@echo "  e.g.   make sft rm ppo RUN=a PPO_ARGS='seed=1 ppo.kl_coef=0.1'"

setup: $(READY) ## make .venv and install what was tested (LATEST=1: the newest that is allowed)

# torch first and by its version alone: pip then takes the build that fits this machine, CUDA where
# PyPI has it. All else to the byte, and nothing beside it.
$(READY): pyproject.toml $(LOCK) rlhf/__init__.py
	@$(PYTHON) -c 'import sys; v = sys.version_info; v[:2] in ((3, 11), (3, 12), (3, 13)) or sys.exit( \
		"refused: PYTHON=$(PYTHON) is Python %d.%d, and this project runs on 3.11, 3.12 and 3.13. " \
		"Name another one: make setup PYTHON=python3.12" % v[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/.ready-*
	$(PIP) '$(TORCH)'
	$(MAKE) --no-print-directory install-$(VERSIONS)
	@touch $@

.PHONY: install-locked install-latest install-oldest
install-locked:
	$(PIP) --require-hashes --no-deps -r $(LOCK)
	$(PIP) --no-deps --no-build-isolation -e .

install-latest:
	$(PIP) --upgrade --upgrade-strategy eager '$(TORCH)' -e '.[dev]'

COMPILE := uv pip compile pyproject.toml --quiet
PLAIN   := $(COMPILE) --no-config --no-header --no-annotate --extra dev
install-oldest:
	$(PIP) uv setuptools
	$(BIN)/$(PLAIN) --resolution lowest-direct --python $(BIN)/python | \
		grep -vE '^(torch|triton|nvidia|cuda)[-=]' > $(VENV)/oldest.txt
	$(PIP) --no-deps -r $(VENV)/oldest.txt
	$(PIP) --no-deps --no-build-isolation -e .

lock: setup ## resolve all versions anew: the newest inside the bounds of pyproject.toml
	$(BIN)/$(COMPILE) --upgrade --custom-compile-command 'make lock' -o $(LOCK)
	@torch=$$($(BIN)/$(PLAIN) --universal --python-version 3.11 | grep '^torch==') && \
		{ echo "# first: $$torch"; cat $(LOCK); } > $(LOCK).new && mv $(LOCK).new $(LOCK)

check: setup ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: setup ## tests, no network and no GPU
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --durations=20 -m "not slow and not gpu and not browser and not readme"

# What touches an outside library, a file of tests for each of its homes, and the three stages.
QUICK := $(addprefix tests/test_,$(addsuffix .py,libraries compatibility engine models supervised text \
	rollout lora_family tokens soft own bottleneck unipelt launch tracking dashboard console cli \
	report versus stages))

test-quick: setup ## tests of what touches other libraries; prints a row for docs/compatibility.md
	$(BIN)/python .ci/compatibility.py -n $(WORKERS) --dist loadfile -m "not slow and not gpu and not browser" $(QUICK)

test-oldest: ## test-quick with the oldest versions that are allowed, in .venv-oldest
	$(MAKE) test-quick VENV=.venv-oldest VERSIONS=oldest

test-latest: ## test-quick with the newest versions that are allowed, in .venv-latest
	$(MAKE) test-quick VENV=.venv-latest VERSIONS=latest

test-readme: setup ## the README's two commands on a fresh clone in an environment of its own
	$(BIN)/python -m pytest -m readme

test-slow: setup ## every test that this machine can run
	$(BIN)/python -m pytest -m "not browser and not readme"

test-browser: setup ## reports opened in headless Chromium (apt install chromium)
	$(BIN)/python -m pytest -m browser

sft: setup ## stage 1: supervised fine-tuning
	$(STAGE)/sft.py run=$(RUN) $(SFT_ARGS)

rm: setup ## stage 2: the reward model
	$(STAGE)/rm.py run=$(RUN) $(RM_ARGS)

ppo: setup ## stage 3: PPO
	$(STAGE)/ppo.py run=$(RUN) $(PPO_ARGS)

methods: setup ## SFT by every fine-tuning method under one budget: a table and a plot
	$(BIN)/python benchmarks/methods.py $(METHODS_ARGS)

base: setup ## rebuild the tiny base model and its world (minutes)
	$(BIN)/python data/tiny/pretrain.py
	$(BIN)/python data/tiny/world.py

clean: ## remove caches and builds; runs/ stays
	rm -rf build dist *.egg-info .ruff_cache .mypy_cache .pytest_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
