# Commands that need nothing but Python and make: `make demo`, `make test`, `make knn`, `make beam` and `make bench`.

PYTHON ?= python3
VENV := .venv
DEMO := .venv-demo
BENCH := .venv-bench
EXPERIMENTS := .venv-experiments
RUN := $(VENV)/bin/python -m

.PHONY: demo knn beam test test-full lint docs bench bench-history clean

demo: $(DEMO)/ready
	$(DEMO)/bin/python docs/demo.py

knn: $(EXPERIMENTS)/ready
	OMP_NUM_THREADS=1 $(EXPERIMENTS)/bin/python docs/experiments/knn.py

beam: $(EXPERIMENTS)/ready
	OMP_NUM_THREADS=1 $(EXPERIMENTS)/bin/python docs/experiments/beam.py

test: $(VENV)/ready lint docs
	$(RUN) pytest -n 2 --dist worksteal -m "not full"

test-full: $(VENV)/ready
	$(RUN) pytest -n 2

lint: $(VENV)/ready
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

docs: $(VENV)/ready
	$(RUN) sphinx -W --keep-going -q -b html docs docs/_build/html

bench: $(BENCH)/ready
	$(BENCH)/bin/python -m benchmarks

bench-history: $(BENCH)/ready
	$(BENCH)/bin/python -m pytest benchmarks/test_speed.py --benchmark-autosave --benchmark-compare

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --progress-bar off -e ".[test,docs]"
	touch $@

$(DEMO)/ready: pyproject.toml
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/python -m pip install --quiet --upgrade pip
	$(DEMO)/bin/python -m pip install --quiet -e ".[demo]"
	touch $@

$(EXPERIMENTS)/ready: pyproject.toml
	$(PYTHON) -m venv $(EXPERIMENTS)
	$(EXPERIMENTS)/bin/python -m pip install --quiet --upgrade pip
	$(EXPERIMENTS)/bin/python -m pip install --quiet --progress-bar off -e ".[experiments]"
	touch $@

# torchsort has no wheels and is built here, its C++ part only: an nvcc on the path would make it want all of CUDA. Where
# that fails, the tables say so.
$(BENCH)/ready: pyproject.toml
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --upgrade pip
	$(BENCH)/bin/python -m pip install --quiet --progress-bar off -e ".[bench]"
	-PATH="$(CURDIR)/$(BENCH)/bin:/usr/bin:/bin" $(BENCH)/bin/python -m pip install --quiet --no-build-isolation \
		torchsort==0.1.10 > $(BENCH)/torchsort.log 2>&1
	touch $@

clean:
	rm -rf $(VENV) $(DEMO) $(BENCH) $(EXPERIMENTS) docs/_build
