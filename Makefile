# make demo    train a small GPT plain and with Rekindle, and compare
# make test    everything that must pass: tests, linter, type checker
# make test-full  the same, with every sample of PyTorch's operator database and every architecture of the model zoo;
#              writes docs/op-database.md, docs/model-zoo.md and docs/full-run.md
# make smoke   the tests that take seconds
# make lint    linter and type checker
# make clean   remove what the others made
#
# PYTHON names the interpreter that .venv is made with: make demo PYTHON=python3.12
# WORKERS is how many processes run the tests side by side, each on one thread: make test WORKERS=8

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

# The profiler library otherwise writes its own progress to stderr; it reads this when torch is loaded.
export KINETO_LOG_LEVEL := 6

.PHONY: demo test test-full smoke lint clean

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/smoke
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --ignore=tests/smoke --numprocesses=$(WORKERS) --dist=loadfile
	@$(MAKE) --no-print-directory lint

test-full: export REKINDLE_TESTS := full
test-full: test

smoke: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/smoke

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find examples src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# Some Linux distributions ship Python without ensurepip; their own pip then installs pip into the environment.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Rekindle needs Python 3.11 or newer, but $(PYTHON) is not. Say which one is: make PYTHON=python3.12 ..." >&2; \
		exit 1; }
	$(PYTHON) -m venv $(VENV) || { \
		$(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV); the first time this downloads torch, about 200 MB."
	$(INSTALL) .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV), with what the tests need; the first time this downloads torch, about 200 MB."
	$(INSTALL) ".[test,lint]"
	@touch $(VENV)/.installed $@
