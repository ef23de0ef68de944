# `make demo` and `make test` do all the set-up themselves; all they need is Python 3.11+ and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test lint check paper clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/demo.stamp  ## a dozen methods side by side on real photographs, in out/demo
	$(BIN)/attrbox demo --out out/demo

test: $(VENV)/test.stamp  ## run the tests
	$(BIN)/python -m pytest -n $(WORKERS)

lint: $(VENV)/test.stamp  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test  ## format, lint, types and tests

paper: $(VENV)/demo.stamp  ## the paper's experiments, in results/paper: make paper PAPER='--mnist FILE --only fig5'
	$(BIN)/python benchmarks/paper --out results/paper $(PAPER)

clean:  ## remove what the other targets made
	rm -rf $(VENV) out .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

$(VENV)/python.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "attrbox needs Python 3.11 or newer; choose one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

$(VENV)/demo.stamp: pyproject.toml $(VENV)/python.stamp
	$(BIN)/python -m pip install --quiet -e '.[demo]'
	touch $@

$(VENV)/test.stamp: pyproject.toml $(VENV)/python.stamp
	$(BIN)/python -m pip install --quiet -e '.[demo,peers,dev]'
	touch $@ $(VENV)/demo.stamp
