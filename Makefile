# Each target sets up what it needs by itself, in .venv; nothing but Python 3.11+ and make is expected.
# Arguments: make test ARGS="--db=sqlite -k timers", make matrix ARGS="py3.12 dj6.1", make demo PYTHON=python3.13

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo serve test check docs matrix bench clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.demo ## See a checkout survive crashes, in the terminal
	@$(RUN) testproject/demo.py $(ARGS)

serve: $(VENV)/.demo ## Run the ticket shop with its admin and a worker
	@$(RUN) testproject/serve.py $(ARGS)

test: $(VENV)/.test ## Run the tests on SQLite and on PostgreSQL
	@$(RUN) -m pytest $(ARGS)

check: $(VENV)/.dev ## Style, types, migrations and docs
	@echo "ruff: style and likely mistakes";       $(RUN) -m ruff check --quiet .
	@echo "ruff: format";                          $(RUN) -m ruff format --check . || \
		{ echo "Some files are not formatted: run $(RUN) -m ruff format ."; exit 1; }
	@echo "mypy: types";                           $(RUN) -m mypy --no-error-summary
	@echo "django: models and migrations agree";   DJANGO_SETTINGS_MODULE=tests.settings \
		$(RUN) -m django makemigrations django_durable --check --dry-run
	@$(MAKE) --no-print-directory docs

docs: $(VENV)/.dev ## Build the documentation; a warning is an error
	@echo "sphinx: documentation"
	@$(RUN) -m sphinx --quiet --fail-on-warning --keep-going -d docs/_build/doctrees docs docs/_build/html
	@echo "Built docs/_build/html/index.html"

matrix: $(VENV)/.python ## Run the tests on every Python and Django that is supported and here
	@$(RUN) scripts/matrix.py $(ARGS)

bench: $(VENV)/.test ## Measure, beside the raw database
	@$(RUN) benchmarks/run.py $(ARGS)

clean: ## Remove what these targets made
	rm -rf $(VENV) .matrix docs/_build dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The stamps. Each says what has been installed, so that the next call has nothing to do.

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Python 3.11 or newer is needed, and '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo not here)."; \
		echo "If there is another one, name it: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "Setting up $(VENV) with $$($(PYTHON) --version) ..."
	@$(PYTHON) -m venv --clear $(VENV) || { \
		echo "Python could not make a virtual environment. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@$(RUN) -m pip install -qq "pip>=25.1" # the first pip that knows dependency groups
	@touch $@

$(VENV)/.demo: what := the package and what the demo needs
$(VENV)/.test: what := what the tests need, with a PostgreSQL server (a minute at most)
$(VENV)/.dev: what := what the checks and the documentation need

$(VENV)/.demo $(VENV)/.test $(VENV)/.dev: $(VENV)/.%: pyproject.toml | $(VENV)/.python
	@echo "Installing $(what) into $(VENV) ..."
	@$(RUN) -m pip install -qq --editable . --group $*
	@touch $@
