# Two commands do everything on a fresh machine with only python3 and make: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint notebooks bench clean

demo: $(VENV)/demo.installed
	$(BIN)/ifpyro demo --out demo

test: $(VENV)/test.installed
	$(BIN)/python -m pytest

lint: $(VENV)/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

notebooks: $(VENV)/docs.installed
	$(BIN)/python tutorials/run.py

bench: $(VENV)/bench.installed
	$(BIN)/python benchmarks/density.py
	$(BIN)/python benchmarks/numerics.py
	$(BIN)/python benchmarks/posterior.py

$(VENV)/%.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) demo
