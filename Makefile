# make demo | test | check | bench. Needs Python >= 3.11 and make; everything else goes into $(VENV).

PYTHON ?= python3
VENV ?= .venv
# Named first and exactly, so that pip takes the build it finds for this machine and never a newer one.
# Without a GPU, save gigabytes: give pip the index of CPU builds that pytorch.org names,
#   make demo TORCH="torch==2.13.0 --index-url ..."
TORCH ?= torch==2.13.0
# The full suite runs on the newest transformers of the range, the model-level tests on the oldest too.
OLDEST_TRANSFORMERS := 5.17.0
MODEL ?= models/emo-tiny
PYTEST_ARGS ?=

BIN := $(VENV)/bin
# One thread for the tests' own models: they are small, and workers that run beside them want the other core.
RUN_TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
INSTALLED := $(VENV)/.installed
OLDEST := $(VENV)/transformers-$(OLDEST_TRANSFORMERS)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-oldest check bench redis proto clean

help:
	@echo "make demo    start the service on $(MODEL), ask it six prompts, stop it"
	@echo "make test    run all tests, then the model-level ones on transformers $(OLDEST_TRANSFORMERS)"
	@echo "make check   ruff, mypy, import-linter"
	@echo "make bench   measure on this machine; writes benchmarks/results/"
	@echo "make install only make $(VENV); later: $(BIN)/expert-pager --help"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11; run: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[serve,dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python -m demo $(MODEL)

test: test-all test-oldest
	@echo "make test: all passed"

test-all: $(INSTALLED) redis
	$(RUN_TESTS) $(PYTEST_ARGS)

test-oldest: $(INSTALLED) $(OLDEST)
	PYTHONPATH=$(OLDEST) $(RUN_TESTS) tests/models tests/engine tests/library $(PYTEST_ARGS)

# With what it needs, but without torch: it goes in front of the environment's own.
$(OLDEST): $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check --target $@.part transformers==$(OLDEST_TRANSFORMERS)
	mv $@.part $@

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.exactness tests/data/golden/ckpt_emo_tiny
	$(BIN)/python -m benchmarks.exactness $(MODEL)
	$(BIN)/python -m benchmarks.token_transport
	$(BIN)/python -m benchmarks.residency $(MODEL)

redis:
	@command -v redis-server >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		{ apt-get install -y -qq redis-server >/dev/null || \
		{ apt-get update -qq && apt-get install -y -qq redis-server >/dev/null; }; }; } || \
		{ echo "the tests start a real Redis: install redis-server, then run make test again"; exit 1; }

proto: $(INSTALLED)
	$(BIN)/python protos/generate.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
