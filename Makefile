# Everything happens in .venv. `make quickstart` and `make test` need nothing else to be set up.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help install quickstart test test-whole-runs test-deepspeed test-benchmarks test-slow lint types schema clean

help:
	@echo "make quickstart   install, then fine-tune a pretrained model on the shipped reviews (CPU, minutes)"
	@echo "make test         install, then all fast tests, minutes"
	@echo "make test-whole-runs test-deepspeed test-benchmarks test-slow"
	@echo "                  several processes, kills, a cluster; DeepSpeed; the bench with TRL, minutes; long campaigns"
	@echo "make lint types   ruff; mypy"

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) > /dev/null || { echo "no $(PYTHON) here; name a Python 3.11 or 3.12: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

quickstart: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m train configs/quickstart.yaml

SHARED_OUT := --numprocesses auto --dist loadfile --no-loadscope-reorder

test: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(SHARED_OUT)

test-whole-runs: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(SHARED_OUT) -m 'whole_run and not slow'

# By itself: where DeepSpeed is installed transformers imports it into everything, which takes seconds each time.
test-deepspeed: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[deepspeed]'
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/test_strategies.py -k zero -m 'not slow'; code=$$?; \
	$(BIN)/python -m pip uninstall --quiet --yes deepspeed; exit $$code

# The bench end to end at toy size, TRL among the peers, which is there for as long as this takes, unless it was before.
BENCH_PEERS := liger-kernel matplotlib trl
test-benchmarks: install
	before=$$($(BIN)/python -m pip freeze --disable-pip-version-check); \
	added=$$(for each in $(BENCH_PEERS); do echo "$$before" | grep -qi "^$$each==" || echo $$each; done); \
	code=0; $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[benchmarks]' || code=$$?; \
	[ $$code != 0 ] || HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/test_compare.py -m slow || code=$$?; \
	[ -z "$$added" ] || $(BIN)/python -m pip uninstall --quiet --yes $$added; exit $$code

test-slow: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

schema: install
	$(BIN)/python -m train --schema > configs/schema.json

clean:
	rm -rf $(VENV) build dist *.egg-info
