# `make demo` and `make test` do all their set-up: a virtual environment and the pinned packages.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test lint format clean

help:
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/  /'

demo: .venv/installed ## from an empty folder to a scored submission, in demo/
	$(BIN)/lightning-radam demo

test: lint ## lint, types and every test
	$(BIN)/python -m pytest

lint: .venv/installed ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and what tools left
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[all,dev]"
	touch $@
