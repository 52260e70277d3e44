# `make demo` and `make test` do all their set-up: a virtual environment and the pinned packages.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test test-lowest lint format clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/  /'

demo: .venv/installed ## from an empty folder to a scored submission, in demo/
	$(BIN)/lightning-radam demo

test: lint ## lint, types and every test
	$(BIN)/python -m pytest

test-lowest: .venv-lowest/installed ## every test with the oldest versions that are allowed
	.venv-lowest/bin/python -m pytest -o filterwarnings=default # old versions warn of each other

lint: .venv/installed ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and what tools left
	rm -rf .venv .venv-lowest build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[all,dev]"
	touch $@

.venv-lowest/installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --constraint constraints-lowest.txt \
	  --editable ".[wandb,competition]" "pytest>=9" "hypothesis>=6.150" ruff
	touch $@
