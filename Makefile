# Every target works first on a fresh machine: it installs what it needs into .venv before it runs.
PYTHON ?= python3
VENV ?= .venv
IMAGE ?= samples/key.png

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Stamps: installed again only when the lists of packages change.
RUNTIME := $(VENV)/.installed-runtime
DEV := $(VENV)/.installed-dev

.PHONY: help install test lint caption tiny bench

help:  ## Show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 12

install: $(DEV)  ## Create .venv with everything for use, training, tests

test: lint  ## Lint, type check and run all tests
	$(BIN)/python -m pytest

lint: $(DEV)  ## Lint and type check
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

caption: $(RUNTIME)  ## Caption an image: make caption IMAGE=photo.png
	@$(BIN)/libra caption "$(IMAGE)"

tiny: $(DEV)  ## Train libra-tiny from nothing; stages that are done are kept
	$(BIN)/python -m training.tiny

bench: $(RUNTIME)  ## Measure time and memory beside the bare language model
	@$(BIN)/libra bench

$(RUNTIME): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (once; a few minutes) ..."
	@$(INSTALL) -e .
	@touch $@

$(DEV): $(RUNTIME)
	@echo "Installing the tools for training and tests into $(VENV) ..."
	@$(INSTALL) -e '.[dev]'
	@touch $@
