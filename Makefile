# Commands that need nothing but Python and make. `make` alone lists them.

PYTHON ?= python3
VENV := .venv
DEMO := .venv-demo
BENCH := .venv-bench
EXPERIMENTS := .venv-experiments
LOWEST := .venv-lowest
LATEST := .venv-latest
PACKAGE := .venv-package
RUN := $(VENV)/bin/python -m
# pip says what it downloads and installs, line by line, with or without a terminal.
INSTALL := -m pip install --progress-bar off --disable-pip-version-check
FILE ?=
PROBLEMS ?= 1e7

# What `make quick` runs: values and derivatives on NumPy, PyTorch and JAX without jit, identities, and the rules of the code.
# It runs the reference, because kernels would be compiled first.
QUICK_FILES := tests/test_contract.py tests/test_identities.py tests/test_house.py
QUICK := test_mask or test_threshold or test_derivatives_of_every_slice or independent or test_identities or test_house

# What `make lowest` and `make latest` run: every library, with other versions than the pinned ones.
VERSION_FILES := tests/test_contract.py tests/test_derivatives.py tests/test_autograd.py tests/test_dask.py tests/test_mlx.py \
	tests/test_ndonnx.py tests/test_torch_func.py tests/test_jax_transforms.py tests/test_sklearn.py tests/test_self_check.py

.DEFAULT_GOAL := help
.PHONY: help demo knn beam rank prune quick test test-full reference fuzz lint docs lowest latest package bench bench-history clean

help: ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do \
		printf '  make %-14s %s\n' "$$name" "$$text"; done

demo: $(DEMO)/ready ## learn an embedding of digits, and a router, with NumPy only
	$(DEMO)/bin/python docs/demo.py

knn: $(EXPERIMENTS)/ready ## the experiment with nearest neighbors
	OMP_NUM_THREADS=1 $(EXPERIMENTS)/bin/python docs/experiments/knn.py

beam: $(EXPERIMENTS)/ready ## the experiment with beam search
	OMP_NUM_THREADS=1 $(EXPERIMENTS)/bin/python docs/experiments/beam.py

rank: $(EXPERIMENTS)/ready ## the experiment with ranking losses
	OMP_NUM_THREADS=1 $(EXPERIMENTS)/bin/python docs/experiments/rank.py

prune: $(EXPERIMENTS)/ready ## the experiment with pruning
	OMP_NUM_THREADS=1 $(EXPERIMENTS)/bin/python docs/experiments/prune.py

quick: $(VENV)/ready ## values and derivatives on NumPy, PyTorch and JAX, and the rules of the code, in a minute
	SOFTK_KERNELS=none OMP_NUM_THREADS=1 $(RUN) pytest -n 2 --dist worksteal -m "not full" \
		--libraries numpy,torch,jax -k "$(QUICK)" $(QUICK_FILES)

ifeq ($(FILE),)
test: $(VENV)/ready ## linter, types, documentation and all tests; FILE=tests/test_x.py runs that file only
	@echo "== 1 of 3: linter and types"
	@$(MAKE) --no-print-directory lint
	@echo "== 2 of 3: documentation"
	@$(MAKE) --no-print-directory docs
	@echo "== 3 of 3: tests, in two processes"
	$(RUN) pytest -n 2 --dist worksteal -m "not full"
else
test: $(VENV)/ready
	$(RUN) pytest -m "not full" $(FILE)
endif

test-full: $(VENV)/ready ## all tests, with the larger grids
	$(RUN) pytest -n 2 $(FILE)

reference: docs ## all tests of `make test` without kernels
	SOFTK_KERNELS=none $(RUN) pytest -n 2 --dist worksteal -m "not full" $(FILE)

fuzz: $(VENV)/ready ## ten million random problems against a root in a higher precision; PROBLEMS=1e5 for fewer
	SOFTK_QUIET=1 $(RUN) tests.fuzz --problems $(PROBLEMS)

lint: $(VENV)/ready ## ruff and mypy
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

docs: $(VENV)/ready ## the documentation, in docs/_build/html
	rm -rf docs/generated
	$(RUN) sphinx -W --keep-going -q -b html docs docs/_build/html

lowest: $(LOWEST)/ready ## the tests with the lowest versions of all libraries (a download of 3 GB)
	SCIPY_ARRAY_API=1 $(LOWEST)/bin/python -m pytest -n 2 --dist worksteal -m "not full" $(VERSION_FILES)

latest: $(LATEST)/ready ## the tests with the latest versions of all libraries (a download of 3 GB)
	SCIPY_ARRAY_API=1 $(LATEST)/bin/python -m pytest -n 2 --dist worksteal -m "not full" $(VERSION_FILES)

package: $(PACKAGE)/ready ## build wheel and sdist, and try the wheel in an empty environment; nothing is published
	rm -rf dist
	$(PACKAGE)/bin/python -m build --outdir dist .
	$(PACKAGE)/bin/python -m twine check --strict dist/*
	$(PACKAGE)/bin/python tests/try_package.py dist

bench: $(BENCH)/ready ## times, errors and memory beside other libraries
	$(BENCH)/bin/python -m benchmarks

bench-history: $(BENCH)/ready ## times beside those of earlier runs
	$(BENCH)/bin/python -m pytest benchmarks/test_speed.py --benchmark-autosave --benchmark-compare

# An environment of its own for each kind of command. Dependency groups need pip 25.1.
define environment
	@echo "== making the virtual environment $(1), once; then pip installs $(2)"
	@$(PYTHON) -m venv $(1)
	@$(1)/bin/python $(INSTALL) --upgrade "pip>=25.1"
	$(1)/bin/python $(INSTALL) $(2)
endef

# allrank, which tests and benchmarks compare with, asks for a PyTorch of 2021. It is installed without what it asks for.
$(VENV)/ready: pyproject.toml
	$(call environment,$(VENV),-e . --group test --group docs)
	-@$(VENV)/bin/python $(INSTALL) --quiet --no-deps allrank==1.4.3
	@touch $@

$(DEMO)/ready: pyproject.toml
	$(call environment,$(DEMO),-e . --group demo)
	@touch $@

$(EXPERIMENTS)/ready: pyproject.toml
	$(call environment,$(EXPERIMENTS),-e . --group experiments)
	@touch $@

$(LOWEST)/ready: pyproject.toml
	$(call environment,$(LOWEST),-e . --group lowest)
	@touch $@

$(LATEST)/ready: pyproject.toml
	$(call environment,$(LATEST),-e . --only-binary=:all: --group latest)
	@touch $@

$(PACKAGE)/ready: pyproject.toml
	$(call environment,$(PACKAGE),--group package)
	@touch $@

# torchsort has no wheels and is built here, its C++ part only: an nvcc on the path would make it want all of CUDA. Where
# that fails, the tables say so.
$(BENCH)/ready: pyproject.toml
	$(call environment,$(BENCH),-e . --group bench)
	-PATH="$(CURDIR)/$(BENCH)/bin:/usr/bin:/bin" $(BENCH)/bin/python -m pip install --quiet --no-build-isolation \
		torchsort==0.1.10 > $(BENCH)/torchsort.log 2>&1
	-@$(BENCH)/bin/python $(INSTALL) --quiet --no-deps allrank==1.4.3
	@touch $@

clean: ## remove all environments and what was built
	rm -rf $(VENV) $(DEMO) $(BENCH) $(EXPERIMENTS) $(LOWEST) $(LATEST) $(PACKAGE) dist docs/_build docs/generated
