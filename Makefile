# Two commands do everything on a fresh machine with only python3 and make: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint notebooks bench bench-here bench-quick clean

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

# All of benchmarks/RESULTS.md, hours on one core, in an environment of its own. Every script also runs alone.
bench:
	$(MAKE) VENV=.venv-bench bench-here

bench-here: $(VENV)/bench.installed
	for part in density peers_density posterior peers_posterior truth_mixture numerics throughput; do \
	  OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$$part.py || exit 1; \
	done

# Under five minutes: figures free of the machine's speed, beside the committed ones.
bench-quick: $(VENV)/demo.installed
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/quick.py

$(VENV)/%.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) demo
