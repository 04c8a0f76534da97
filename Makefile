# GNU make 3.81 or later, as Debian and macOS have it. `make` alone lists the targets.
#   PYTHON=…   the interpreter for .venv (default: the newest suitable one)
#   ARGS=…     handed on, as in: make test ARGS="tests/core -k turn"
PYTHON ?=
ARGS ?=
RUN := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup demo test chaos mutate bench lint lock clean

help: # The list.
	@awk -F ': [a-z ]*## ' '/^[a-z]+: [a-z ]*## / { printf "  make %-6s  %s\n", $$1, $$2 }' Makefile

demo: setup ## See it: RabbitMQ, simulator, worker and a chatbot, set up and running
	@$(RUN) -m worker demo $(ARGS)

test: setup ## The whole test suite, on a RabbitMQ of its own
	@$(RUN) -m pytest $(ARGS)

chaos: setup ## Break everything at random, and see that every promise is kept (an hour; ARGS=--quick: 3 minutes)
	@$(RUN) -m tests.chaos $(ARGS)

mutate: setup ## Break each law on purpose, and see that the tests notice
	@$(RUN) -m tests.mutations $(ARGS)

bench: setup ## Measure who slows whom: a hang, an outage, a listener, 20,000 commands before an interrupt, a restart
	@for run in blocked listeners outage interrupts rolling; do $(RUN) -m benchmarks.$$run $(ARGS) || exit; done

lint: setup ## Style, types, licences
	@$(RUN) -m ruff check
	@$(RUN) -m ruff format --check
	@$(RUN) -m mypy
	@$(RUN) tools/check_licences.py

setup: ## Only .venv, with the locked dependencies
	@PYTHON="$(PYTHON)" sh tools/setup.sh

# The lock files name neither an index nor a path: they are the same wherever they are made.
COMPILE := .venv/lock/bin/uv --quiet pip compile --universal --python-version 3.11 --generate-hashes --no-header $(ARGS)

lock: setup ## Resolve the dependencies again (all to their newest: ARGS=--upgrade)
	@$(RUN) -m venv .venv/lock
	@.venv/lock/bin/python -m pip -qq install uv==0.13.9
	$(COMPILE) pyproject.toml --extra postgres -o requirements.lock
	$(COMPILE) pyproject.toml --group dev -c requirements.lock -o requirements-dev.lock
	$(COMPILE) --group build -c requirements-dev.lock -o requirements-build.lock

clean: ## Remove what was generated, .venv too
	@rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
