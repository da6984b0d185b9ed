# mqtt-bridge. `make` alone prints this list; `make demo` shows the bridge at work; `make test` runs every test.
# Everything is installed into .venv; nothing else on the machine changes.

SHELL := /bin/bash

# The first Python that is new enough. Another one: make PYTHON=/path/to/python3.12 ...
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.14; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$python" && break; done)
VENV := .venv
BIN := $(VENV)/bin
DEMO_ARGS ?=
RUN_ARGS ?=
TEST_ARGS ?=
# Tests that run side by side, each process with servers of its own; 0 runs all in one, as --pdb needs it.
TEST_JOBS ?= auto
CHAOS_ARGS ?=
BENCH_ARGS ?=
PROFILE_ARGS ?=

# One stamp for each set of extras, newer than the metadata it was installed from. Larger sets contain the smaller:
# after `make test`, `make demo` installs nothing.
CORE := $(VENV)/.installed-core
DEMO := $(VENV)/.installed-demo
TEST := $(VENV)/.installed-test
DEV := $(VENV)/.installed-dev
BENCH := $(VENV)/.installed-bench

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export PIP_ROOT_USER_ACTION := ignore

.DEFAULT_GOAL := help
.PHONY: help install demo run test chaos bench profile lint types format ci clean

help: ## this list
	@echo "mqtt-bridge moves MQTT messages into PostgreSQL. Targets:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(CORE) ## the bridge itself, into .venv
	@echo "mqtt-bridge is installed: $(BIN)/mqtt-bridge"

demo: $(DEMO) ## broker, database, 200 devices and the bridge, here and now (DEMO_ARGS="--duration 20")
	@$(BIN)/mqtt-bridge demo $(DEMO_ARGS)

run: $(CORE) ## the bridge, configured by environment and .env (RUN_ARGS=...)
	@$(BIN)/mqtt-bridge run $(RUN_ARGS)

test: $(TEST) ## every test (TEST_ARGS="-k tape -x")
	@$(BIN)/python -m pytest -n $(TEST_JOBS) --dist worksteal $(TEST_ARGS)

chaos: $(TEST) ## the bridge under kills, crashes and cuts, compared message by message (CHAOS_ARGS="--help")
	@$(BIN)/python -m tests.chaos $(CHAOS_ARGS)

bench: $(BENCH) ## CPU, throughput, latency, memory, beside other systems (BENCH_ARGS="--quick", BENCH_ARGS=report)
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

profile: $(BENCH) ## where the bridge's time goes under full load: a flame graph, and a summary (PROFILE_ARGS="--gil")
	@$(BIN)/python -m benchmarks profile $(PROFILE_ARGS)

lint: $(DEV) ## ruff: rules and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(DEV) ## mypy, strict, over the package
	@$(BIN)/mypy

format: $(DEV) ## rewrites the code as ruff formats it
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

ci: $(DEV) ## what has to pass before a change goes in: lint, types, and what `make test` runs
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory types
	@$(MAKE) --no-print-directory test

clean: ## removes .venv and everything that tools left behind
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@[ -n "$(PYTHON)" ] && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "mqtt-bridge needs Python 3.11 or newer; found: $$("$(or $(PYTHON),python3)" --version 2>&1)." \
			"Install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "Making $(VENV) with $$("$(PYTHON)" --version)"
	@# Debian keeps what venv needs (ensurepip) in a package of its own: try what else may be there.
	@"$(PYTHON)" -m venv $(VENV) >/dev/null 2>&1 || $(call instead,"$(PYTHON)" -m virtualenv -q $(VENV)) \
		|| $(call instead,virtualenv -q -p "$(PYTHON)" $(VENV)) \
		|| $(call instead,"$(PYTHON)" -m venv --without-pip $(VENV) \
			&& "$(PYTHON)" -m pip -q --python $(BIN)/python install pip) \
		|| { rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment: it has no ensurepip, and there is" \
			"no virtualenv. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

instead = { rm -rf $(VENV); $(1); } >/dev/null 2>&1

# pip names each package it fetches, for the impatient; its errors go to standard error.
define pip-install
	@echo "Installing mqtt-bridge$(1) into $(VENV) (up to a minute):"
	@set -o pipefail; $(BIN)/python -m pip install --progress-bar off -e '.$(1)' \
		| sed -n 's/^Collecting \([A-Za-z0-9._-]*\).*/  \1/p'
	@touch $(2)
endef

$(CORE): setup.cfg setup.py | $(BIN)/python
	$(call pip-install,,$(CORE))

$(DEMO): setup.cfg setup.py | $(BIN)/python
	$(call pip-install,[demo],$(CORE) $(DEMO))

$(TEST): setup.cfg setup.py | $(BIN)/python
	$(call pip-install,[test],$(CORE) $(DEMO) $(TEST))

$(DEV): setup.cfg setup.py | $(BIN)/python
	$(call pip-install,[dev],$(CORE) $(DEMO) $(TEST) $(DEV))

$(BENCH): setup.cfg setup.py | $(BIN)/python
	$(call pip-install,[bench],$(CORE) $(DEMO) $(BENCH))
