# Two commands do everything on a fresh machine with only python3 and make: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test doctest lint docs notebooks bench bench-here bench-quick clean

demo: $(VENV)/demo.installed
	$(BIN)/ifpyro demo --out demo

# A process a core, one thread each; a file's tests share its trained flows, so they stay together.
test: $(VENV)/test.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile
	$(MAKE) doctest

# The examples of docstrings and of the pages, with their outputs.
doctest: $(VENV)/test.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:cacheprovider $(EXAMPLES)

EXAMPLES := --doctest-modules --doctest-glob='*.md' --ignore=docs/_build src/ifpyro docs README.md

lint: $(VENV)/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, into docs/_build/html. A warning, or a link that leads nowhere, is an error.
docs: $(VENV)/docs.installed
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	$(BIN)/python docs/check_links.py

notebooks: $(VENV)/docs.installed
	$(BIN)/python tutorials/run.py

# All tables of benchmarks/*.md, hours on one core, in an environment of its own. Every script also runs alone.
bench:
	$(MAKE) VENV=.venv-bench bench-here

BENCHMARKS := hierarchy density peers_density posterior peers_posterior truth_mixture numerics solvers guides throughput \
  paper images denoisers precision calibration_sbc calibration_weights calibration_latent calibration_patients

bench-here: $(VENV)/bench.installed
	for part in $(BENCHMARKS); do OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$$part.py || exit 1; done

# Under five minutes: figures free of the machine's speed, beside the committed ones.
bench-quick: $(VENV)/demo.installed
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/quick.py

$(VENV)/%.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e ".[$*]"
	touch $@

# azula declares torchvision, which no benchmark uses. Where pip takes a build for another torch (for accelerators, beside
# a torch for processors) it cannot be imported, and with it there diffusers cannot: then it is better gone.
$(VENV)/bench.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e ".[bench]"
	$(BIN)/python -c "import torchvision" 2>/dev/null || $(BIN)/python -m pip uninstall --quiet --yes torchvision
	$(BIN)/python -c "import azula.guidance, blackjax, diffusers, jax, numpyro, zuko; diffusers.UNet2DModel"
	touch $@

clean:
	rm -rf $(VENV) demo docs/_build docs/reference/generated
