# `make demo` and `make test` each set everything up by themselves.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/ready

.PHONY: help setup demo ui test test-fast check docs

help:  ## Show this list.
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

setup: $(READY)  ## Make .venv with everything that the project needs.

$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(READY)  ## Train on samples/subjects/mug, generate images and measure; a few minutes.
	$(BIN)/atomdiff demo

ui: $(READY)  ## Open a page in the browser to train, try and keep concepts of the embedded model.
	$(BIN)/atomdiff ui --pretrained_model_name_or_path samples/toybox-sd --train_config configs/demo.yaml

test: $(READY)  ## Run all tests.
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test-fast: $(READY)  ## Run the tests that take no longer than half a second or so.
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal -m "not slow"

docs: $(READY)  ## Build the documentation in site/; a broken link or a missing name is an error.
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

check: $(READY) docs  ## Check style, format, types and imports, and that the documentation builds.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
