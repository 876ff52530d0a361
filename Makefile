# Every target sets up what it needs: `make demo` and `make test` work from a clean clone.
# Needs Python 3.11 or newer with venv. Another interpreter: make PYTHON=python3.12 install

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.nvvl-installed

# Two test processes with one thread each beat one process with two threads on a 2-core machine.
TEST_WORKERS ?= 2

.PHONY: install demo test lint bench wheel-test clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("nvvl needs Python 3.11 or newer, got " + sys.version.split()[0] + "; say: make PYTHON=/path/to/python3.12 install")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: install
	$(BIN)/nvvl demo

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_WORKERS)

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	VENV=$(VENV) tools/check_types.sh
	$(BIN)/codespell

bench: install
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/kernels.py
	OMP_NUM_THREADS=2 $(BIN)/python benchmarks/forward.py

wheel-test: install
	$(BIN)/python tools/wheel_test.py

clean:
	rm -rf build dist demo nvvl.egg-info .pytest_cache .mypy_cache .ruff_cache
