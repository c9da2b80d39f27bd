# Every target does its own set-up: `make demo` and `make test` work on a bare machine with Python 3.11+.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

# Options of the targets below, for example `make demo ROWS=1000000` or `make ui PORT=3001`.
ROWS ?=
PORT ?=
SEED ?=
WORKERS ?= 4
SERVERS ?=
ARGS ?=

# Whether there is a Chromium with its driver; how to get one.
HAS_BROWSER = $(BIN)/python -m alphapulse_encryption_tests.browser.chromium
GET_BROWSER := Debian: apt install chromium chromium-driver; macOS: brew install chromium chromedriver

.PHONY: help setup demo demo-drop rehearsal ui dg psql test quick long lint format stress wheel-check bench bench-crypto bench-lookup bench-latency bench-prediction sizing browser pooler servers versions screenshots docs docs-serve docs-reference lock audit clean distclean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create .venv with the locked dependencies (done by the other targets by themselves)

$(STAMP): requirements.lock pyproject.toml
	@command -v "$(PYTHON)" >/dev/null || { echo "No $(PYTHON) here: install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$$("$(PYTHON)" --version) is too old: Python 3.11 or newer is needed. Name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) has no venv module: install it (Debian and Ubuntu: apt install python3-venv), or name another Python: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@"$(BIN)/python" -c 'import pip' 2>/dev/null || "$(PYTHON)" -m venv --clear $(VENV)
	@echo "Installing the locked dependencies into $(VENV) (the first time this takes a minute or two) ..."
	@$(PIP) install --quiet --require-hashes -r requirements.lock
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup ## Walk the whole migration on the sample database, up to the views (ROWS=1000000 for a big one)
	@$(BIN)/python -m alphapulse_encryption.cli.demo $(if $(ROWS),--rows $(ROWS)) $(ARGS)

demo-drop: setup ## Walk through approval, drop and restore, after `make demo`
	@$(BIN)/python -m alphapulse_encryption.cli.demo --drop $(if $(ROWS),--rows $(ROWS)) $(ARGS)

rehearsal: setup ## Rehearse the migration on a clone of a staging copy of the sample (ROWS=50000)
	@$(BIN)/python -m alphapulse_encryption --rehearse $(if $(ROWS),--rows $(ROWS)) $(ARGS)

ui: setup ## Open Dagster's UI on the instance that `make demo` used (PORT=3000)
	@exec $(BIN)/python -m alphapulse_encryption.ui $(if $(PORT),--port $(PORT)) $(ARGS)

# With the instance's directory as DAGSTER_HOME, dg keeps no log of its use in the home directory.
dg: setup ## Run Dagster's dg on this project (ARGS="list defs", ARGS="scaffold defs dagster.asset assets/mine.py")
	@DAGSTER_HOME="$$($(BIN)/python -c 'from alphapulse_encryption.defs.resources.instance import *; print(prepare_dagster_home())')" \
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/dg $(ARGS)

psql: setup ## Open psql on the sample database (ARGS='-c "SELECT ..."')
	@exec $(BIN)/python -m alphapulse_encryption.sample.postgres psql $(ARGS)

# Hundreds of processes load the code: compiled once, it is kept, whatever the environment says of that.
test: lint ## Run every check and the tests, except the long ones
	@unset PYTHONDONTWRITEBYTECODE; \
	if [ -n "$${CI:-}" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then $(MAKE) browser || true; $(MAKE) pooler || true; fi; \
	chosen="not stress and not long and not versions"; \
	$(HAS_BROWSER) || { chosen="$$chosen and not browser"; \
	  echo "Left out: the browser tests, for want of a Chromium with its chromedriver ($(GET_BROWSER))."; }; \
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "$$chosen" $(ARGS)

# Each process loads the tests by itself: more of them than a laptop has cores to spare would only load.
quick: setup ## Run the tests that need neither PostgreSQL nor a browser, in less than a minute
	@unset PYTHONDONTWRITEBYTECODE; \
	$(BIN)/python -m pytest -n 2 -m "not postgres and not browser and not stress and not long" $(ARGS)

lint: setup ## Check style, types and the layers of the code
	@$(BIN)/python -m ruff check
	@$(BIN)/python -m ruff format --check
	@$(BIN)/python -m mypy
	@$(BIN)/lint-imports

format: setup ## Format the code and apply ruff's safe fixes
	@$(BIN)/python -m ruff format
	@$(BIN)/python -m ruff check --fix

# They mostly wait for processes of their own, and for the registry.
long: setup ## Run the long tests, which go once more, another way, over what quicker ones cover
	@unset PYTHONDONTWRITEBYTECODE; \
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m long $(ARGS)

stress: setup ## Kill a hundred processes, and write for a quarter of an hour (SEED=4711 to repeat it)
	@$(BIN)/python -m pytest --timeout 0 -o faulthandler_timeout=0 -m stress $(if $(SEED),--seed $(SEED)) $(ARGS)

wheel-check: setup ## Install the package from scratch, with its dependencies from the registry, and check its wheel
	@$(BIN)/python -m pytest --timeout 0 -o faulthandler_timeout=0 -m "long or not long" alphapulse_encryption_tests/test_wheel.py $(ARGS)

browser: setup ## Install Chromium for the browser tests, where there is none (as root, with apt-get)
	@if $(HAS_BROWSER); then exit 0; fi; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
	  echo "Install Chromium and its chromedriver ($(GET_BROWSER))." >&2; exit 1; fi; \
	echo "Installing Chromium for the browser tests ..."; \
	export DEBIAN_FRONTEND=noninteractive; \
	said=$$({ apt-get -qq update && apt-get -qq --yes -o DPkg::Lock::Timeout=120 install --no-install-recommends \
	  chromium chromium-driver fonts-liberation; } 2>&1) || { echo "$$said" >&2; exit 1; }; \
	$(HAS_BROWSER) || { echo "There is still no Chromium with its chromedriver ($(GET_BROWSER))." >&2; exit 1; }

# Its service is not started: the tests start one of their own.
pooler: ## Install PgBouncer for the tests of connection poolers, where there is none (as root, with apt-get)
	@if PATH="$$PATH:/usr/sbin" command -v pgbouncer >/dev/null; then exit 0; fi; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then echo "Install PgBouncer (Debian: apt install pgbouncer)." >&2; exit 1; fi; \
	echo "Installing PgBouncer for the tests of connection poolers ..."; \
	export DEBIAN_FRONTEND=noninteractive; \
	said=$$({ apt-get -qq update && apt-get -qq --yes -o DPkg::Lock::Timeout=120 install --no-install-recommends pgbouncer; } 2>&1) \
	|| { echo "$$said" >&2; exit 1; }

servers: setup ## Download servers of PostgreSQL's older versions into .venv, by npm (SERVERS="14 17", all if not given)
	@$(BIN)/python -m alphapulse_encryption_tests.versions.servers $(SERVERS)

versions: servers ## Go the whole way on each version of PostgreSQL (SERVERS="14 17", SERVERS=ends for oldest and newest)
	@unset PYTHONDONTWRITEBYTECODE; \
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m versions --servers "$(SERVERS)" alphapulse_encryption_tests/versions $(ARGS)

screenshots: setup ## Take the pictures in docs/images, on a demo of their own
	@$(BIN)/python -m alphapulse_encryption_tests.browser.screenshots docs/images

docs: setup ## Build the operator's manual into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

docs-serve: setup ## Show the operator's manual, as it is being written (PORT=8000)
	@NO_MKDOCS_2_WARNING=1 exec $(BIN)/python -m mkdocs serve --strict --dev-addr 127.0.0.1:$(or $(PORT),8000)

docs-reference: setup ## Write the manual's lists of options and settings anew, from the code
	@$(BIN)/python -m alphapulse_encryption_tests.docs.reference

bench: setup ## Measure the backfill against the machine's limit (ROWS="200000 1000000", ARGS=--check)
	@$(BIN)/python benchmarks/backfill.py $(if $(ROWS),--rows $(ROWS)) $(ARGS)

bench-crypto: setup ## Measure the ciphers against the bare primitives, and their import (ARGS=--check)
	@$(BIN)/python benchmarks/crypto.py $(ARGS)

bench-lookup: setup ## Measure a lookup by e-mail on ciphertext against one on plaintext (ROWS=1000000, ARGS=--check)
	@$(BIN)/python benchmarks/lookup.py $(if $(ROWS),--rows $(ROWS)) $(ARGS)

bench-prediction: setup ## Predict a migration of 500,000 rows from a rehearsal on 50,000, then run it (ROWS=50000, ARGS=--check)
	@$(BIN)/python benchmarks/prediction.py $(if $(ROWS),--rows $(ROWS)) $(ARGS)

sizing: setup ## Compute how long tables of a million to ten billion rows take, and what bounds them (ARGS="--results FILE")
	@$(BIN)/python benchmarks/sizing.py $(ARGS)

bench-latency: setup ## Measure what the application notices of a backfill: p99 before, during, after (ARGS=--check)
	@$(BIN)/python benchmarks/latency.py $(if $(ROWS),--rows $(ROWS)) $(ARGS)

lock: setup ## Resolve requirements.lock and the image's locks again (UPGRADE=1 to take newer versions)
	@uv=$$(command -v uv || command -v $(BIN)/uv) || { echo "No uv here: $(BIN)/python -m pip install uv" >&2; exit 1; }; \
	resolve() { "$$uv" pip compile --quiet --universal --generate-hashes --no-strip-extras --no-emit-index-url \
	  --no-emit-find-links --no-annotate --custom-compile-command "make lock" "$$@"; }; \
	resolve --python-version 3.11 --extra s3 --extra aws --extra vault --extra application --extra celery \
	  --extra kubernetes --group dev --group benchmarks --group docs $(if $(UPGRADE),--upgrade) pyproject.toml --output-file requirements.lock; \
	resolve --python-version 3.11 --extra s3 --extra aws --extra vault --extra celery --extra kubernetes \
	  --constraint requirements.lock pyproject.toml --output-file deploy/docker/requirements.lock; \
	echo hatchling | resolve --python-version 3.11 --constraint requirements.lock - --output-file deploy/docker/build.lock

audit: setup ## Look the locked dependencies up among known faults, or list their versions and dates
	@[ -x $(BIN)/../audit/bin/pip-audit ] || { $(BIN)/python -m venv $(BIN)/../audit && \
	  $(BIN)/../audit/bin/python -m pip install --quiet "pip-audit>=2.9,<3"; }
	@$(BIN)/../audit/bin/python alphapulse_encryption_tests/audit.py

clean: ## Stop the embedded PostgreSQL and remove its data, backups, logs and caches
	@if [ -x $(BIN)/python ] && [ -d .alphapulse ]; then $(BIN)/python -m alphapulse_encryption.sample.postgres stop; fi
	@rm -rf .alphapulse logs/migration .tmp_dagster_home_* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist site
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## The same, and remove .venv
	@rm -rf $(VENV)
