# Everything runs in a virtual environment of its own, made on first use.
PYTHON ?= python3
BACKEND ?= tensorflow
VENV := .venv
BIN := $(VENV)/bin
BACKENDS := tensorflow jax torch
# Tests on JAX wait for XLA to compile; flags that the pinned versions know make that quick.
QUICK_XLA := --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false \
	--xla_cpu_parallel_codegen_split_count=1
# Two processes, each with the files of tests it has begun, which share shapes, and one thread.
PYTEST := OMP_NUM_THREADS=1 XLA_FLAGS="$(QUICK_XLA)" \
	$(BIN)/python -m pytest -n 2 --dist loadfile -q

.PHONY: help demo test test-family test-slow $(BACKENDS:%=test-%) lint bench docs clean

help:  ## Lists the targets.
	@grep -hE '^[a-z%-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/'

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed  ## Trains the members on JapaneseVowels; BACKEND=jax switches.
	KERAS_BACKEND=$(BACKEND) $(BIN)/python examples/japanese_vowels.py

test: $(BACKENDS:%=test-%)  ## Runs the tests on every backend.

$(BACKENDS:%=test-%): test-%: $(VENV)/.installed
	KERAS_BACKEND=$* $(PYTEST)

test-slow: $(VENV)/.installed  ## Runs the thorough tests on every backend; takes hours.
	for backend in $(BACKENDS); do \
		KERAS_BACKEND=$$backend HYPOTHESIS_PROFILE=thorough $(PYTEST) --timeout 0 -m 'slow or not slow' || exit 1; \
	done

test-family: $(VENV)/.installed  ## Runs the laws of every combination on every backend; takes 40 minutes.
	for backend in $(BACKENDS); do \
		KERAS_BACKEND=$$backend $(PYTEST) -m 'slow or not slow' tests/test_family.py || exit 1; \
	done

lint: $(VENV)/.installed  ## Checks style.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.installed  ## Measures time and memory, for an hour; BACKEND=jax switches.
	KERAS_BACKEND=$(BACKEND) $(BIN)/python -m benchmarks

docs: $(VENV)/.installed  ## Builds the documentation into site/, warnings being errors.
	KERAS_BACKEND=$(BACKEND) $(BIN)/mkdocs build --strict --quiet

clean:  ## Removes what the targets made.
	rm -rf $(VENV) site outputs .pytest_cache .hypothesis .ruff_cache
