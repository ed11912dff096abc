# Contentfactory. `make` alone prints this help; `make run` is the whole tour.
SHELL := /bin/sh
.DEFAULT_GOAL := help
VENV ?= .venv
BIN := $(VENV)/bin
export VENV TORCH TORCH_INDEX EXTRAS PYTHON

# A worker computes with one thread: on a small machine more of them fight each other (docs/install.md).
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup run test simulate chaos lint format types bench up down docs clean

help: ## print this help
	@echo "make TARGET"
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## */\1\t/' | awk -F'\t' '{printf "  %-8s %s\n", $$1, $$2}'
	@echo "Options: TORCH=auto|cpu|cuda  PYTHON=/path/to/python3.11  (see docs/install.md)"

setup: ## make or update .venv (idempotent; no root, no questions)
	@sh scripts/setup.sh

run: setup ## the main job: texts, speech, pictures, cards and clips of examples/facts.yaml into delivery/
	@$(BIN)/factory run examples/facts.yaml --deliver delivery

test: setup ## all tests
	@$(BIN)/python scripts/browser.py
	@$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile $(ARGS)

simulate: setup ## play simulated histories of the lifecycle; HISTORIES=10000 SEED=17 PLANTED=1 (docs/simulation.md)
	@$(BIN)/python tests/simulation/simulate.py $(if $(PLANTED),--planted,$(if $(SEED),--seed $(SEED),$(if $(HISTORIES),--histories $(HISTORIES))))

chaos: setup ## faults 1 to 17 against real services; FAULT=3,4 SEED=7 JOBS=2000 (docs/chaos.md)
	@$(BIN)/python tests/chaos/run.py $(if $(FAULT),--fault $(FAULT)) $(if $(SEED),--seed $(SEED)) $(if $(JOBS),--jobs $(JOBS))

lint: setup ## ruff
	@$(BIN)/ruff check .

format: setup ## sort imports and mend what ruff can mend by itself
	@$(BIN)/ruff check --fix .

types: setup ## mypy, strict on contentfactory, db, storage, producer
	@$(BIN)/mypy

bench: setup ## speed of this machine beside other queues and bare libraries; ONLY=queues,accept SIZE=smoke|short|full
	@$(BIN)/python -m benchmarks --size $(or $(SIZE),short) $(if $(ONLY),--only $(ONLY)) $(ARGS)

up: setup ## start broker, workers, timer and Flower, and stay with them until Ctrl-C
	@$(BIN)/factory up

down: ## stop what `make up` started
	@$(BIN)/factory down

docs: setup ## write the reference of all kinds, settings and commands into docs/reference
	@$(BIN)/python scripts/reference.py

clean: ## delete caches and build output; .venv, .factory (state) and delivery stay
	@rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
