# RLHF in three stages. `make` lists what there is; README.md explains it.
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup check test test-slow test-browser sft rm ppo methods base clean

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TORCH  ?= torch==2.13.*

RUN    ?= tiny
NPROC  ?= 1
# Processes that run tests, each a whole file at a time.
WORKERS ?= 2
STAGE   = NPROC=$(NPROC) $(BIN)/python stages

help: ## list the targets and dials
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  dials: RUN=$(RUN)  SFT_ARGS= RM_ARGS= PPO_ARGS= (Hydra overrides)  NPROC=$(NPROC)  TORCH='$(TORCH)'  WORKERS=$(WORKERS) (tests)"
	@echo "  e.g.   make sft rm ppo RUN=a PPO_ARGS='seed=1 ppo.kl_coef=0.1'"

setup: $(VENV)/.ready ## make .venv and install everything (a second time: nothing to do)

# torch first and by itself: pip then takes the build that fits this machine, CUDA where PyPI has it.
$(VENV)/.ready: pyproject.toml rlhf/__init__.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install '$(TORCH)'
	$(BIN)/pip install -e '.[dev]'
	@touch $@

check: setup ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: setup ## tests, about ten minutes, no network and no GPU
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow and not gpu and not browser"

test-slow: setup ## every test that this machine can run
	$(BIN)/python -m pytest -m "not browser"

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
