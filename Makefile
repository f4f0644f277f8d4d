# Two commands are all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# onnxruntime and onnxruntime-gpu share one folder, so exactly one of them is installed.
RUNTIME := $(if $(shell command -v nvidia-smi 2>/dev/null),gpu,cpu)

# onnxruntime-genai needs the former of the two.
TESTED := $(RUNTIME)$(if $(filter cpu,$(RUNTIME)),$(shell printf ',genai'))

.PHONY: demo test test-slow lint install install-dev clean

demo: install
	$(BIN)/mcsharp demo --output out/demo

test: install-dev
	$(BIN)/python -m pytest -q -m "not slow" -n auto --maxprocesses 8 --dist worksteal

test-slow: install-dev
	$(BIN)/python -m pytest -q -m slow

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/installed-$(RUNTIME)

install-dev: $(VENV)/installed-$(RUNTIME)-dev

$(VENV)/installed-$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[$(RUNTIME)]"
	touch $@

$(VENV)/installed-$(RUNTIME)-dev: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[$(TESTED),dev]"
	touch $@ $(VENV)/installed-$(RUNTIME)

$(BIN)/pip:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) out build *.egg-info
	find mcsharp_sdk -name '*.nb[ic]' -delete
