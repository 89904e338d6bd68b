# Each target sets up what it needs in .venv, once; nothing has to be activated or installed before.
#   make demo    three phantom hospitals federate on this machine; results and report in demo/
#   make test    the tests, and the wheel in a clean environment
#   make check   formatting, lint, types, import contracts
#   make bench   benchmarks
#   make soak    the fault tests at length: hours; SOAK="--only kills --kills 100" for less
#   make wheel   dist/fedoap-*.whl and .tar.gz
# Another Python than python3:  make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# the oldest Triton that kernels are compiled with, beside the installed one
OTHER := $(VENV)/triton-3.6.0
# a test process for each core; whoever is done takes tests from the others. A benchmark would not run beside others
SIDE_BY_SIDE ?= --numprocesses logical --maxprocesses 8 --dist worksteal --benchmark-disable --quiet

.PHONY: demo test check bench soak wheel setup clean

demo: $(READY)
	$(BIN)/fedoap demo --out demo --overwrite

test: $(READY) $(OTHER)/.ready
	FEDOAP_OTHER_TRITON=$(abspath $(OTHER)) $(BIN)/python -Im pytest $(SIDE_BY_SIDE)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)
	$(BIN)/python -Im pytest benchmarks --benchmark-only
	PYTHONPATH=. $(BIN)/python benchmarks/rounds.py
	PYTHONPATH=. $(BIN)/python benchmarks/scale.py
	PYTHONPATH=. $(BIN)/python benchmarks/packing.py

soak: $(READY)
	$(BIN)/python benchmarks/soak.py $(SOAK)

wheel: $(READY)
	$(BIN)/python -m build --outdir dist .

setup: $(READY)

# The stamp is younger than what it was made from, so pip runs again only when a pin or the project's table changes.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fedoap needs Python 3.11 or newer, but $(PYTHON) is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[node]" --group dev
	touch $@

$(OTHER)/.ready: Makefile $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(OTHER) triton==3.6.0
	touch $@

clean:
	rm -rf $(VENV) dist demo
