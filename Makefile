# `make demo` and `make test` need Python 3.11 or later, git and make; they do the rest themselves.
# Another interpreter: make test PYTHON=/path/to/python3.12. Another place for the environment: make test VENV=path.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
DATA ?=
PYTEST_ARGS ?=
# One process per core, each with one compute thread: two levels of parallelism would fight for the same cores.
WORKERS ?= -n auto --maxprocesses=8 --dist loadgroup
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

# What an installation depends on; the lists of packages and versions are all in these files.
SPEC := pyproject.toml constraints.txt Makefile
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help
help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# The target is pip, which comes last: an environment that was left half-made is made again.
$(BIN)/pip:
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "e2pass needs Python 3.11 or later; '$(PYTHON)' is not that, give another with PYTHON=path" >&2; exit 1; }
	'$(PYTHON)' -m venv $(VENV)

$(VENV)/.demo-installed: $(SPEC) | $(BIN)/pip
	@echo "installing e2pass with what the demo needs into $(VENV) ..."
	@start=$$SECONDS; $(PIP_INSTALL) --editable '.[data]'; echo "installation took $$((SECONDS - start)) s"
	@touch $@

$(VENV)/.dev-installed: $(SPEC) | $(BIN)/pip
	@echo "installing e2pass with what the tests and checks need into $(VENV) ..."
	@start=$$SECONDS; \
		$(PIP_INSTALL) --editable '.[dev]'; \
		$(PIP_INSTALL) --no-deps pytorchcv; \
		echo "installation took $$((SECONDS - start)) s"
	@touch $@ $(VENV)/.demo-installed

.PHONY: demo
demo: $(VENV)/.demo-installed ## train a small ResNet plainly and transformed, side by side (DATA=path for CIFAR-10)
	@start=$$SECONDS; $(BIN)/e2pass demo $(if $(DATA),--data '$(DATA)'); echo "the demo took $$((SECONDS - start)) s"

.PHONY: test
test: $(VENV)/.dev-installed ## lint, format check, types, layers and all tests
	@start=$$SECONDS; \
		$(MAKE) --no-print-directory lint; \
		$(ONE_THREAD) $(BIN)/python -m pytest $(WORKERS) --durations=10 $(PYTEST_ARGS); \
		echo "the checks and tests took $$((SECONDS - start)) s"

.PHONY: quick
quick: $(VENV)/.dev-installed ## the tests that take less than five seconds each
	@$(ONE_THREAD) $(BIN)/python -m pytest $(WORKERS) -m 'not slow' $(PYTEST_ARGS)

.PHONY: lint
lint: $(VENV)/.dev-installed ## ruff, mypy --strict and import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: format
format: $(VENV)/.dev-installed ## apply ruff's safe fixes and its formatter
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: coverage
coverage: $(VENV)/.dev-installed ## all tests with branch coverage, written to htmlcov/
	@$(ONE_THREAD) $(BIN)/python -m pytest $(WORKERS) --cov --cov-report=term --cov-report=html $(PYTEST_ARGS)

.PHONY: clean
clean: ## remove the environment, build output and caches
	rm -rf $(VENV) build dist *.egg-info htmlcov .coverage .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
