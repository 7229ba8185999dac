# make run: the default experiment, from nothing. make test: the tests, from nothing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: run test test-all test-faults lint constraints clean
run: $(VENV)/installed
	$(BIN)/python flows/sweep.py $(ARGS)

test: $(VENV)/installed lint
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow and not faults" $(ARGS)

test-all: $(VENV)/installed lint
	$(BIN)/python -m pytest -m "not faults" $(ARGS)

# Hundreds of kills, full disks, damaged files, ten thousand wrong inputs: an hour.
test-faults: $(VENV)/installed
	$(BIN)/python -m pytest -m faults $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two steps, because pip refuses to install a folder where it checks hashes.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "lambda_hat needs Python 3.11 or newer; call make with PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# Pin the newest versions pyproject.toml allows, for every Python and platform at once; needs uv.
constraints:
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-annotate --no-header --upgrade --extra dev pyproject.toml --output-file constraints.txt

clean:
	rm -rf $(VENV) lambda_hat_store

# The figures of docs/benchmarks.md.
.PHONY: bench bench-accuracy bench-speed bench-memory bench-storage
bench: bench-accuracy bench-speed bench-memory bench-storage
	$(BIN)/python benchmarks/sweep_overhead.py

bench-accuracy: $(VENV)/installed
	$(BIN)/python benchmarks/accuracy.py
	$(BIN)/python benchmarks/deep_linear.py

# Installs devinterp and PyTorch in an environment of their own.
bench-speed: $(VENV)/installed
	$(BIN)/python benchmarks/speed.py $(ARGS)

bench-memory: $(VENV)/installed
	$(BIN)/python benchmarks/memory.py $(ARGS)

bench-storage: $(VENV)/installed
	$(BIN)/python benchmarks/storage.py $(ARGS)
