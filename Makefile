# Two commands that need nothing but Python and make: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
DEMO := .venv-demo
RUN := $(VENV)/bin/python -m

.PHONY: demo test test-full lint docs clean

demo: $(DEMO)/ready
	$(DEMO)/bin/python docs/demo.py

test: $(VENV)/ready lint docs
	$(RUN) pytest -n 2 -m "not full"

test-full: $(VENV)/ready
	$(RUN) pytest -n 2

lint: $(VENV)/ready
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

docs: $(VENV)/ready
	$(RUN) sphinx -W --keep-going -q -b html docs docs/_build/html

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

clean:
	rm -rf $(VENV) $(DEMO) docs/_build
