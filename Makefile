# Each verb does its own set-up in .venv: make demo, make test, make test-slow, make check; make docs redraws the
# documents' charts, make site builds their pages, make bench writes docs/benchmarks.md. make test-oldest has a .venv-oldest of its own.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CONSTRAINTS := constraints/tested.txt

.PHONY: demo test test-slow test-oldest test-gpu check docs site bench pins clean

demo: $(VENV)/.setup-examples
	$(BIN)/python examples/train_dino.py --config configs/dino_tiny_cpu.yaml

# Three processes on two cores: many tests wait for other processes. One thread each, or they get in each other's way.
RUN_TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist loadfile

# Every promise by some of its cases: what a change should pass before it is pushed.
test: $(VENV)/.setup-dev
	$(RUN_TESTS) -m "not slow" --junitxml build/test.xml $(PYTEST)

# The other cases: sweeps over models, seeds and failures, and runs of many seconds. CI runs both.
test-slow: $(VENV)/.setup-dev
	$(RUN_TESTS) -m slow --junitxml build/test-slow.xml $(PYTEST)

# The same as `make test` on the oldest releases that pyproject.toml promises.
test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints/oldest.txt PYTEST="--junitxml build/test-oldest.xml $(PYTEST)"

# What only a GPU can show; kernels of flash-attn and xFormers where they are installed. The figures are printed.
test-gpu: $(VENV)/.setup-dev
	CUBLAS_WORKSPACE_CONFIG=:4096:8 $(BIN)/python -m pytest -m gpu -rs -s $(PYTEST)
	$(BIN)/python -m benchmarks.gpu

check: $(VENV)/.setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q --doctest-modules attn_monitor
	$(BIN)/python -m tests.support.javascript
	$(BIN)/python -m tests.support.wheel

# The charts come from two training runs of five minutes, kept in runs/curves, the gallery from short ones.
docs: $(VENV)/.setup-dev
	$(BIN)/python docs/make_models.py
	$(BIN)/python docs/make_curves.py
	$(BIN)/python docs/make_divergence.py
	$(BIN)/python docs/make_gallery.py

# The documents as pages in build/site; a link that leads nowhere is an error.
site: $(VENV)/.setup-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "open build/site/index.html; for the search too: $(BIN)/python -m http.server -d build/site"

# About half an hour on two quiet cores; only on a quiet machine are the figures worth keeping.
bench: $(VENV)/.setup-dev
	$(BIN)/python -m benchmarks $(BENCH)

# Bounds of constraints/tested.txt past the newest releases that go together; nothing is installed.
pins: | $(BIN)/python
	mkdir -p build
	$(BIN)/python -m pip install --quiet --dry-run --ignore-installed --report build/pins.json '.[dev,docs]'
	$(BIN)/python constraints/move.py build/pins.json

clean:
	rm -rf $(VENV) .venv-oldest node_modules build dist *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# A setup is repeated when the list of dependencies has changed. Of two equal versions of PyTorch pip prefers the one that
# ends in +cpu, so PIP_EXTRA_INDEX_URL with an index of such builds is enough to come without CUDA.
$(VENV)/.setup-%: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "installing the extra '$*' into $(VENV), once: 6 GB with PyTorch's CUDA build, 2 GB with its build for CPUs"
	$(BIN)/python -m pip install --editable '.[$*]' --constraint $(CONSTRAINTS)
	touch $@
