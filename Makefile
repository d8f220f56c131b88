# Every target sets up what it needs and may be run twice. `make` alone lists them.
PYTHON ?= python3
JOBS ?= 2
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ritz-installed
BENCH := .venv-bench
BENCH_STAMP := $(BENCH)/.ritz-installed

# One thread per test process: the tests are many and small, so threads only get into each other's way.
RUN_TESTS := OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 MPLBACKEND=Agg $(BIN)/python -m pytest

.PHONY: help venv test test-all demo lint types doctest examples bench-env bench bench-gp bench-optim bench-curvature bench-laplace bench-pde clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP)  ## create .venv with pinned versions and an editable ritz

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "== creating $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV) || { \
	  echo "Python's venv module does not work here; install it (on Debian: python3-venv) or set PYTHON=..."; exit 1; }; }
	@echo "== installing torch (pinned in constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	@echo "== installing ritz (editable) and its development tools"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

test: $(STAMP)  ## run the tests, except those marked slow
	$(RUN_TESTS) -n $(JOBS) -m "not slow" $(PYTEST_ARGS)

test-all: $(STAMP)  ## run all tests
	$(RUN_TESTS) -n $(JOBS) $(PYTEST_ARGS)

demo: $(STAMP)  ## fit a Gaussian process to the shipped elevators set, within two minutes
	$(BIN)/ritz demo

lint: $(STAMP)  ## ruff
	$(BIN)/ruff check .

types: $(STAMP)  ## mypy
	$(BIN)/mypy

doctest: $(STAMP)  ## run the examples in the docstrings
	$(RUN_TESTS) --doctest-modules src/ritz $(PYTEST_ARGS)

examples: $(STAMP)  ## run every script in examples/ at its small size
	@set -e; for script in examples/*.py; do \
	  test -e "$$script" || { echo "no scripts in examples/"; break; }; \
	  echo "== $$script"; RITZ_SMALL=1 MPLBACKEND=Agg $(BIN)/python "$$script"; \
	done

bench-env: $(BENCH_STAMP)  ## create .venv-bench with the packages that we compare with

$(BENCH_STAMP): pyproject.toml constraints.txt benchmarks/requirements.txt
	@test -x $(BENCH)/bin/python || { echo "== creating $(BENCH)"; $(PYTHON) -m venv $(BENCH); }
	@echo "== installing torch (pinned in constraints.txt)"
	$(BENCH)/bin/python -m pip install --quiet -c constraints.txt torch
	@echo "== installing the peers and ritz (versions from benchmarks/requirements.txt)"
	$(BENCH)/bin/python -m pip install --quiet -r benchmarks/requirements.txt -e '.[all]'
	@# Some peers pull in torchvision, whose build may not match the torch above and then breaks at import.
	@$(BENCH)/bin/python -m pip uninstall --quiet --yes torchvision 2>/dev/null || true
	@touch $@

bench: $(BENCH_STAMP)  ## measure gradients against the peers
	$(BENCH)/bin/python benchmarks/gradients.py

bench-gp: $(BENCH_STAMP)  ## race exact Gaussian processes against the peers, about 40 minutes
	$(BENCH)/bin/python benchmarks/kernel_products.py
	$(BENCH)/bin/python benchmarks/gp.py

bench-optim: $(BENCH_STAMP)  ## step times and real training of the optimizers against their peers, about two hours
	$(BENCH)/bin/python benchmarks/optim_step.py
	$(BENCH)/bin/python benchmarks/optim_train.py

bench-curvature: $(BENCH_STAMP)  ## products and evidence of networks' curvature against their peers
	$(BENCH)/bin/python benchmarks/curvature_products.py
	$(BENCH)/bin/python benchmarks/curvature_evidence.py
	$(BENCH)/bin/python benchmarks/laplace_large.py

bench-laplace: $(BENCH_STAMP)  ## calibrated networks on six sets against their peers, about two hours
	$(BENCH)/bin/python benchmarks/laplace_study.py

bench-pde: $(BENCH_STAMP)  ## value and gradient through PDEs against ODE solvers, about two hours
	$(BENCH)/bin/python benchmarks/pde.py
	$(BENCH)/bin/python benchmarks/pde_gradients.py
	$(BENCH)/bin/python benchmarks/pde_train.py
	$(BENCH)/bin/python benchmarks/stencils.py

clean:  ## remove environments, caches and built files
	rm -rf $(VENV) $(BENCH) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
