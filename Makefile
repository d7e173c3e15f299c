# Every target installs what it needs into .venv first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
ARGS   ?=
SEEDS  ?= 10000
FIRST  ?= 0

.DEFAULT_GOAL := help
.PHONY: help install cluster test test-cpus soak lint format typecheck bench reproduce clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  make \1|/' | \
	  awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

install: $(STAMP)  ## set up .venv with everything (about 5 GB, most of it torch)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fedmq needs Python 3.11 or newer, '$(PYTHON)' is older: make PYTHON=python3.11 ..."; exit 2; }
	@echo "setting up $(VENV): about 5 GB, most of it torch; a few minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

cluster: install  ## train on the embedded MNIST subset: broker, aggregator, 4 workers, evaluator
	@$(BIN)/fedmq cluster $(ARGS)

test: install  ## run all tests (ARGS='-k name' to choose)
	@$(BIN)/python -P -m pytest -n auto --dist loadscope $(ARGS)

test-cpus: install  ## run the tests whose numbers could depend on the CPU under each of its instruction sets
	@for cpu in $$($(BIN)/python -c 'import torch; print({"AVX512": "default avx2 avx512", "AVX2": "default avx2"}.get(torch.backends.cpu.get_cpu_capability(), "default"))'); do \
	  echo "== ATEN_CPU_CAPABILITY=$$cpu"; \
	  ATEN_CPU_CAPABILITY=$$cpu $(BIN)/python -P -m pytest -q -n auto --dist loadscope $(ARGS) tests/golden tests/nodes/replay tests/codecs || exit 1; \
	done

soak: install  ## simulate SEEDS=10000 histories of crashes and bad networks, from FIRST=0
	@PYTHONPATH=. $(BIN)/python -m tests.sim.soak --first $(FIRST) --seeds $(SEEDS)

lint: install  ## ruff: lint and format check
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: install  ## let ruff format the code
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

typecheck: install  ## mypy, strict
	@$(BIN)/mypy -p fedmq

bench: install  ## the figures that the README quotes
	@for file in benchmarks/rounds.py benchmarks/broker.py benchmarks/many_nodes.py benchmarks/replay.py benchmarks/codecs.py; do echo "== $$file"; $(BIN)/python -P $$file $(ARGS) || exit 1; done

reproduce: install  ## the papers' figures beside ours, on MNIST under FEDMQ_DATA (ARGS='--only NAME')
	@$(BIN)/python -P benchmarks/reproduce.py $(ARGS)

clean:  ## remove what the other targets made, but not runs/
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
