# One command runs the main job, one passes the tests; both make the environment from the lock file first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# What `make bench` reads: models (fusellm model fetch) and the folder of reference inputs.
ROOT ?= work
SHARED ?= ../shared
DEEPSPEED := deepspeed==0.19.8

.PHONY: help setup quickstart control rehearsal toolchains test test-fast bench lint docs format lock clean

help:
	@echo 'make quickstart  the main job on tiny models: environment, then about four minutes on two cores'
	@echo 'make control     whether fusion teaches what the sources know, on three seeds of the quickstart'
	@echo 'make rehearsal   the paper'"'"'s run in small: every table by two ranks under ZeRO-2, killed twice on the way'
	@echo 'make toolchains  on Debian: bubblewrap, the compilers of the ten languages of MultiPL-E, Chromium for tests'
	@echo 'make test        environment, then all tests'
	@echo 'make test-fast   environment, then the tests that are not marked slow: two minutes'
	@echo 'make bench       speed and memory, on a machine that does nothing else: docs/results/bench/README.md'
	@echo 'make setup       the environment: exact versions, every extra'
	@echo 'make lint        ruff, mypy, import-linter, deptry'
	@echo 'make docs        the pages below docs/, into build/docs: strict, so that no link is broken'
	@echo 'make lock        new exact versions from the ranges in pyproject.toml'

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements.lock
	# Its source distribution imports torch, so it is built in this environment; its kernels are compiled at first use.
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --no-build-isolation --no-deps $(DEEPSPEED)
	$(BIN)/python -m pip install --no-build-isolation --no-deps -e .
	$(BIN)/python -m pip check
	touch $(READY)

quickstart: $(READY)
	$(BIN)/fusellm quickstart

control: $(READY)
	FUSELLM_CONTROL_SEEDS=3 $(BIN)/python -m pytest tests/harness/experiment/test_control.py

rehearsal: $(READY)
	$(BIN)/python -m benchmarks.rehearsal --root $(ROOT)/rehearsal --output docs/results/rehearsal/README.md

toolchains:
	.ci/toolchains

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist loadfile

test-fast: $(READY)
	$(BIN)/python -m pytest -n auto --dist loadfile -m 'not slow'

bench: $(READY)
	$(BIN)/python -m benchmarks --root $(ROOT) --shared $(SHARED) --output docs/results/bench/README.md

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry .

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock:
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install torch==2.13.0 setuptools
	build/lock/bin/python -m pip install --no-build-isolation -e '.[all,dev,deepspeed]'
	build/lock/bin/python -m pip freeze --exclude-editable | sed -e 's/+cpu//' -e '/^deepspeed==/d' > requirements.lock

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
