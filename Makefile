PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

INTEROP := .venv-interop

.PHONY: demo check test test-all interop bench clean

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@

## The main job on real input: train a small model that recites fourteen works, take some of them out again.
demo: $(STAMP)
	$(BIN)/python -m flows.demo

## Lint and types.
check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile

## Lint, types, and the tests that are not marked slow.
test: check
	$(PYTEST) -m 'not slow'

## Lint, types, and every test, as CI runs them: some 25 minutes on two cores.
test-all: check
	$(PYTEST)

## Signed model folders against the public OpenSSF tool, in an environment of its own.
interop: $(STAMP)
	test -d $(INTEROP) || $(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/pip install --quiet 'model-signing==1.1.1' pyOpenSSL
	TAKEDOWN_MODEL_SIGNING=$(CURDIR)/$(INTEROP)/bin/python $(BIN)/pytest tests/test_oms.py -k tool -rs

## Bytes, time and memory of the version store, side by side with what people use today (some minutes).
bench: $(STAMP)
	$(BIN)/python -m tests.benchmarks.store

clean:
	rm -rf $(VENV) $(INTEROP) .demo build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
