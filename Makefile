# Two commands do everything on a fresh machine:  make demo   and   make test
# Choose the interpreter with PYTHON=python3.12; any version from 3.10 on works.

PYTHON ?= python3
VENV ?= .venv
OBJECTIVE ?= nft
SEED ?= 0
OUTPUT ?= runs/demo-$(OBJECTIVE)-$(SEED)

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := $(VENV)/.installed-demo
DOWNLOAD := 300 MB with the CPU build of torch, 3 GB or more with that for CUDA; a few minutes
# Only the tests' real `transformers serve` imports it, in a process of its own: on a CPU build of torch it
# fails to import, and everything that looks for it would fail with it.
SERVING := $(VENV)/serving
TORCHVISION := torchvision==0.28.0
# What make bases alone needs: diffusers and peft import both where they find them, slowly and with warnings.
QUANTIZED := $(VENV)/quantized
QUANTIZERS := bitsandbytes==0.50.2 torchao==0.18.0
QUICK := tests/flow tests/losses tests/advantages tests/objectives tests/test_old_policy.py \
	tests/testing/test_laws_of_ours.py tests/test_diagnostics.py tests/test_metrics.py tests/test_long_chains.py tests/test_survival.py tests/test_checks.py tests/test_reduce.py
# The models are tiny: threads beyond the cores only get in each other's way.
WORKERS ?= 2
WING ?= rewards

.DEFAULT_GOAL := help
.PHONY: help demo dist matrix quick test checks lint types layers pages site pytest laws support evidence findings long-chains objectives lost-rewards benchmark soak kills bases mutation mutation-of clean

help:
	@echo "Times are of two cores, once everything is installed (make demo and make test do that by themselves)."
	@echo "make demo          8 min    multi-turn RL of a tiny FLUX editor (OBJECTIVE=nft|grpo, SEED=0, OUTPUT=runs/demo-nft-0)"
	@echo "make quick         1 min    lint, types and the tests of the core on new random examples"
	@echo "make test          12 min   lint, types, import layers, pages, doctests and the whole test suite"
	@echo "make laws          minutes  thousands of cases for each law of mteditflow.testing, from a new seed"
	@echo "make checks        1 min    lint, types, import layers and pages"
	@echo "make pages         1 min    check that all pages, notebooks and docstrings parse and that references resolve"
	@echo "make site          2 min    all pages, notebooks and the API reference as a site, in build/site"
	@echo "make dist          5 min    build sdist and wheel, check them, install and use them in an empty environment"
	@echo "make matrix        30 min   test the lowest declared versions; check syntax and types of Python 3.10 to 3.14"
	@echo "make support       1 h      record, replay and train every pipeline of the table, written to docs/"
	@echo "make evidence      hours    both objectives and both families in the shapes world over three seeds, written to docs/"
	@echo "make findings      hours    the paper's comparisons on the shapes world over three seeds, written to docs/"
	@echo "make long-chains   hours    training for long chains in the world of pictures over three seeds, written to docs/"
	@echo "make objectives    hours    all objectives, credits and guards on the shapes world over three seeds, written to docs/"
	@echo "make lost-rewards  hours    training with a judge that loses answers, in the shapes world, written to docs/"
	@echo "make benchmark     1 h      speed and memory against plain implementations, written to benchmarks/"
	@echo "make soak          10 min   10,000 requests to the consistency server, written to benchmarks/"
	@echo "make kills         1 h      kill the trainer at random moments and compare with undisturbed runs; other long tests"
	@echo "make bases         10 min   train on quantized and compiled base models (installs bitsandbytes and torchao)"
	@echo "make mutation      hours    mutation testing of the core, floors 0 to 3, written to docs/"
	@echo "make mutation-of   1 h      mutation testing of a wing by 100 sampled mutants (WING=rewards, SEED=0)"

define CREATE
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "mteditflow needs Python 3.10 or newer, got " + sys.version.split()[0] + "; choose one with PYTHON=")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
endef
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

$(INSTALLED): pyproject.toml constraints.txt
	$(CREATE)
	@echo "Installing the packages of the tests into $(VENV) (once; a few minutes on a slow line)"
	@$(INSTALL) --constraint constraints.txt --editable '.[dev]'
	@$(INSTALL) --no-deps --upgrade --target $(SERVING) $(TORCHVISION)
	@touch $(DEMO) $@

# The packages of the tests include those of the demo: after `make test` nothing is installed here.
$(DEMO): pyproject.toml constraints.txt
	$(CREATE)
	@echo "Installing the packages of the demo into $(VENV) (once): $(DOWNLOAD)"
	@$(INSTALL) --constraint constraints.txt --editable '.[train]'
	@touch $@

demo: $(DEMO)
	@echo "Training: about 8 minutes on two cores; Ctrl-C stops it, and the same command resumes"
	@$(BIN)/python examples/demo.py --objective $(OBJECTIVE) --seed $(SEED) --output $(OUTPUT)

dist: $(INSTALLED)
	$(BIN)/python -m release.dist $(TAG)

matrix: $(INSTALLED)
	$(BIN)/python -m release.matrix

# The same tools and the tests of the core alone, on new examples in random order: under a minute.
quick: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	HYPOTHESIS_PROFILE=random OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -p randomly --numprocesses $(WORKERS) \
		-m "not long and not bases and not slow and not compile" $(QUICK)

checks: lint types layers pages

# The checks share the cores; pytest takes them all.
test: $(INSTALLED)
	@$(MAKE) --no-print-directory --jobs $(WORKERS) --output-sync=target checks
	@$(MAKE) --no-print-directory pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell README.md CONTRIBUTING.md CHANGELOG.md docs mteditflow examples benchmarks tests release containers Makefile
	$(BIN)/python -m docs.check_prose

types: $(INSTALLED)
	$(BIN)/mypy

layers: $(INSTALLED)
	$(BIN)/lint-imports

# Parse every page and docstring and resolve every reference; nothing is written.
pages: $(INSTALLED)
	$(BIN)/python -m sphinx -q -W -n -E -b dummy docs build/pages

site: $(INSTALLED)
	$(BIN)/python -m sphinx -q -W -n -E -b html docs build/site

pytest: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal --durations 10 -m "not long and not bases"

laws: $(INSTALLED)
	MTEDITFLOW_LAWS=thousands HYPOTHESIS_PROFILE=random OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -p randomly \
		--numprocesses $(WORKERS) --dist worksteal tests/testing/test_laws_of_ours.py

kills: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) -m long
	$(BIN)/python -m tests.flux.killing --objective nft --kills 20 --seed 0
	$(BIN)/python -m tests.flux.killing --objective grpo --kills 20 --seed 0

$(QUANTIZED)/.installed: Makefile | $(INSTALLED)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(QUANTIZED) $(QUANTIZERS)
	@touch $@

bases: $(INSTALLED) $(QUANTIZED)/.installed
	PYTHONPATH=$(QUANTIZED) OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) -m bases tests/pipelines tests/flux

evidence: $(INSTALLED)
	$(BIN)/python examples/evidence.py

findings: $(INSTALLED)
	$(BIN)/python examples/ablations.py findings --workers $(WORKERS)

long-chains: $(INSTALLED)
	$(BIN)/python examples/ablations.py long_chains --workers $(WORKERS)
	$(BIN)/python examples/ablations.py competent_start --workers $(WORKERS)

objectives: $(INSTALLED)
	$(BIN)/python examples/ablations.py objectives --workers $(WORKERS)

support: $(INSTALLED)
	$(BIN)/python -m docs.render_support

lost-rewards: $(INSTALLED)
	$(BIN)/python examples/lost_rewards.py

benchmark: $(INSTALLED)
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.trainer
	$(BIN)/python -m benchmarks.judge_client
	$(BIN)/python -m benchmarks.recording

soak: $(INSTALLED)
	$(BIN)/python -m benchmarks.consistency_server

mutation: $(INSTALLED)
	$(BIN)/python -m docs.mutation --processes $(WORKERS)

mutation-of: $(INSTALLED)
	$(BIN)/python -m docs.mutation_wings $(WING) --seed $(SEED) --processes $(WORKERS)

clean:
	rm -rf $(VENV) build dist runs mutants .pytest_cache .mypy_cache .ruff_cache .hypothesis
