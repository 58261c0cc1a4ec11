# Two commands do everything on a machine with Python 3.11: make demo, make test.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt
INSTALLED := $(VENV)/.installed

.PHONY: install demo test test-slow lint types unit wheel clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/edgeflash demo

test: lint types unit wheel

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

# Small networks gain less from a second thread than tests do from a second process.
unit: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m 'not slow' --durations=10

test-slow: $(INSTALLED)
	$(BIN)/pytest -m slow --durations=10

# The wheel in an environment of its own: what a device-side install gets, without torch. setuptools
# ships whatever an older build/lib holds, so that goes first.
wheel: $(INSTALLED)
	rm -rf build/wheel build/lib build/bdist*
	$(BIN)/python -m build --wheel --outdir build/wheel . > /dev/null
	$(PYTHON) -m venv --clear build/wheel/venv
	build/wheel/venv/bin/python -m pip install --quiet --constraint .ci/constraints.txt "$$(ls build/wheel/*.whl)[onnx]"
	$(BIN)/edgeflash export edgeflash/models/shapes-student --to onnx --steps 1,4 --out build/wheel/bundle
	cd build/wheel && venv/bin/python ../../tests/check_wheel.py bundle

clean:
	rm -rf $(VENV) build demo .mypy_cache .pytest_cache .ruff_cache edgeflash.egg-info
