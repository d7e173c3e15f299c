# Every target installs what it needs into .venv first: INSTALLED is the project alone,
# INSTALLED_DEV adds the tools that only tests and benchmarks need.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
INSTALLED     := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
PYTEST := $(BIN)/python -P -m pytest -n auto --dist loadscope
ARGS   ?=
SEEDS  ?= 10000
FIRST  ?= 0

.DEFAULT_GOAL := help
.PHONY: help install install-dev cluster check test test-cpus soak lint format typecheck bench reproduce clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  make \1|/' | \
	  awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

install: $(INSTALLED)  ## set up .venv with fedmq (about 5 GB, most of it torch)

install-dev: $(INSTALLED_DEV)  ## set up .venv with fedmq and the tools for its tests

# A stamp is touched last, so an install that failed half-way runs again.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fedmq needs Python 3.11 or newer; '$(PYTHON)' is older. Run make PYTHON=python3.11 ..."; exit 2; }
	@echo "setting up $(VENV): about 5 GB, most of it torch; this takes a few minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --editable .
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	@echo "adding the tools for tests and benchmarks to $(VENV)"
	@$(PIP) --editable '.[dev]'
	@touch $@

cluster: install  ## train on the embedded MNIST subset: broker, aggregator, 4 workers, evaluator
	@$(BIN)/fedmq cluster $(ARGS)

check: install-dev  ## run ruff and the fast tests, in about 30 s; before each commit
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(PYTEST) -q -m 'not slow and not end_to_end and not soak' $(ARGS)

test: install-dev  ## run all tests (ARGS='-k NAME' to choose)
	@$(PYTEST) $(ARGS)

test-cpus: install-dev  ## run the tests whose numbers could depend on the CPU under each of its instruction sets
	@for cpu in $$($(BIN)/python -c 'import torch; print({"AVX512": "default avx2 avx512", "AVX2": "default avx2"}.get(torch.backends.cpu.get_cpu_capability(), "default"))'); do \
	  echo "== ATEN_CPU_CAPABILITY=$$cpu"; \
	  ATEN_CPU_CAPABILITY=$$cpu $(PYTEST) -q $(ARGS) tests/golden tests/nodes/replay tests/codecs || exit 1; \
	done

soak: install-dev  ## simulate SEEDS=10000 histories with faults, from FIRST=0
	@PYTHONPATH=. $(BIN)/python -m tests.sim.soak --first $(FIRST) --seeds $(SEEDS)

lint: install-dev  ## run ruff: rules and format
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: install-dev  ## fix what ruff can fix, and format the code
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

typecheck: install-dev  ## run mypy, strict
	@$(BIN)/mypy -p fedmq

bench: install-dev  ## measure the figures that the docs quote
	@for file in benchmarks/rounds.py benchmarks/broker.py benchmarks/many_nodes.py benchmarks/replay.py benchmarks/codecs.py benchmarks/simulate.py; do echo "== $$file"; $(BIN)/python -P $$file $(ARGS) || exit 1; done

reproduce: install  ## compare the papers' figures with ours, on MNIST under FEDMQ_DATA (ARGS='--only NAME')
	@$(BIN)/python -P benchmarks/reproduce.py $(ARGS)

clean:  ## remove what the other targets made, but not runs/
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
