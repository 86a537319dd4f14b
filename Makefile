# `make` shows what there is. All of it needs git, make and Python 3.11 or newer with pip, and nothing else.
# Nothing is written outside of this directory but caches under HOME; where there is no HOME to write to, they are here too.

.DELETE_ON_ERROR:
.SUFFIXES:
.DEFAULT_GOAL := help

BIN := .venv/bin
UV := .tools/bin/uv
# The first of them that is new enough; another one by name: make setup PYTHON=/usr/bin/python3.12
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v $$python && break; done)

# No Python but the one of this machine.
export UV_PYTHON_DOWNLOADS := never
export UV_NO_PROGRESS ?= 1
# Some machines have Python keep nothing of what it compiles: hundreds of processes would compile all that they import.
export PYTHONDONTWRITEBYTECODE :=
# The certificates of this machine: behind a company's proxy those that uv brings know no issuer. By both names that uv
# has had for it.
export UV_SYSTEM_CERTS ?= 1
export UV_NATIVE_TLS ?= 1
ifneq ($(shell test -n "$$HOME" -a -w "$$HOME" && echo yes),yes)
export UV_CACHE_DIR ?= $(CURDIR)/.tools/cache
export PIP_NO_CACHE_DIR ?= 1
endif

.PHONY: help setup lock check test test-all counterparts demo bench clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' Makefile

setup: .venv/.done ## everything that the other targets need, in .venv
	@:

$(UV): .ci/uv.py
	@test -n "$(PYTHON)" || { echo "ferrum needs Python 3.11 or newer: apt install python3" >&2; exit 1; }
	@$(PYTHON) .ci/uv.py $@

.venv/.done: $(UV) requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "ferrum needs Python 3.11 or newer: apt install python3" >&2; exit 1; }
	@test -x $(BIN)/python && $(BIN)/python -c '' || $(UV) venv --quiet --clear --python "$(PYTHON)" .venv
	@$(UV) pip sync --quiet --python $(BIN)/python --require-hashes requirements.lock
	@$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

lock: $(UV) ## pin what pyproject.toml asks for; UPGRADE=1 to take the newest of everything
	@$(UV) pip compile pyproject.toml --quiet --output-file requirements.lock --universal --python-version 3.11 \
		--all-extras --group dev --generate-hashes --no-header --no-emit-index-url --no-emit-find-links $(if $(UPGRADE),--upgrade)
	@printf 'numpy\npandas\nmatplotlib\n' | $(UV) pip compile - --constraint requirements.lock --quiet --universal --python-version 3.11 \
		--generate-hashes --no-header --no-annotate --no-emit-index-url --no-emit-find-links \
		--output-file ferrum/sandbox/python-data.txt

check: setup ## style, types, the order of the rooms, the lock
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy --strict -p ferrum -p tasks
	@$(BIN)/lint-imports
	@$(BIN)/pytest -q -p no:cacheprovider tests/test_packaging.py -k lock

test: setup ## all tests, in parallel; of long chaos, fuzz and attack suites a fair sample
	@$(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder --durations=10 $(MEASURED) $(ARGS)

test-all: export FERRUM_TEST_SIZE ?= 11
test-all: MEASURED := --cov --cov-report=term --cov-fail-under=90
test-all: test ## the same, and the long suites whole; fails below 90 % coverage

counterparts: $(UV) ## programs of others that tests may use, in .tools; says what cannot be had
	@$(PYTHON) .ci/counterparts.py

demo: setup ## an agent as a durable workflow, on the repository it stands in
	@$(BIN)/python examples/demo.py

bench: setup ## how fast it is here
	@$(BIN)/python -m bench

clean: ## forget everything that was made here
	@rm -rf .venv .tools .state .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist build
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
