# SPDX-License-Identifier: Apache-2.0
# What people and CI run. `make` alone lists the targets.

PYTHON ?= python3
# For example: make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_FLAGS ?=
# Processes that run the tests; a test takes up to 1.5 GiB.
WORKERS ?= 2
BIN := .venv/bin

# The study says how many threads a site takes; a setting from outside must not change the bits of a result.
unexport OMP_NUM_THREADS

.PHONY: help venv demo test walk lint types docs clean
help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

# Two stamps: the demo needs FedNeuro alone, everything else its development tools too. A stamp is older than
# the files it depends on exactly when the installation is out of date.
.venv/.runtime: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("FedNeuro needs Python 3.11 or newer: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e .
	@touch $@

.venv/.dev: .venv/.runtime
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e ".[dev]"
	@touch $@

venv: .venv/.dev  ## .venv with FedNeuro (editable) and its development tools

demo: .venv/.runtime  ## five synthetic hospitals, four train, one judges: out/demo/report.html
	$(BIN)/fedneuro-sim demo --out out/demo

test: .venv/.dev  ## the tests, with coverage; those that start Flower or Ray one after another
	$(BIN)/pytest -m "deployment and not walk" --cov --cov-report=
	$(BIN)/pytest -m "not deployment and not walk" -n $(WORKERS) --dist loadfile --cov --cov-append --cov-report=term:skip-covered

walk: .venv/.dev  ## what takes longest: a consortium in a browser (chromium), under attack, and bits on Ray and Flower again
	$(BIN)/pytest -m walk

lint: .venv/.dev  ## style, spelling, packaging metadata
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/codespell
	$(BIN)/validate-pyproject pyproject.toml

types: .venv/.dev  ## mypy (strict) and pyright
	$(BIN)/mypy
	$(BIN)/pyright

docs: .venv/.runtime  ## regenerate docs/study-file.md and docs/study.schema.json
	$(BIN)/python -m fedneuro.privacy.study_words docs

clean:  ## remove what make made; studies that you ran in out/ stay
	rm -rf .venv out/demo build dist fedneuro.egg-info .coverage
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find client models privacy server simulations tests -name __pycache__ -prune -exec rm -rf {} +
