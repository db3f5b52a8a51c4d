# Everything a fresh machine needs: `make demo`, `make compare` and `make test`. Python 3.11+, pip, make and a C++ compiler are enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
VARIANTS := gguf:Q8_0,gguf:Q6_K,gguf:Q5_K_M,gguf:Q4_K_M,gguf:IQ4_XS,gguf:IQ3_M,gguf:IQ3_XXS,gguf:IQ2_M,gguf:IQ2_XXS,gguf:IQ1_S
SOURCES := $(shell find src CMakeLists.txt pyproject.toml -type f -not -name '*.pyc' -not -name '*.so' 2>/dev/null)

.PHONY: demo compare test test-all develop check format bench clean

demo: $(VENV)/.demo
	$(BIN)/llm-quantize demo

# Calibrates, as the small levels need it; the page is report/index.html.
compare: $(VENV)/.compare
	$(BIN)/llm-quantize compare builtin:demo-llama --variants $(VARIANTS) -o report

test: $(VENV)/.test
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/check

test-all: $(VENV)/.test
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/check --all

bench: $(VENV)/.test
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/gguf.py

format: $(VENV)/.test
	$(BIN)/ruff format src tests scripts benchmarks
	$(BIN)/ruff check --fix src tests scripts benchmarks

# For work on the code: the native kernels are built into src/, so that PYTHONPATH=src runs the working tree.
develop: $(VENV)/.test
	$(PIP) nanobind scikit-build-core cmake ninja
	PATH="$(CURDIR)/$(BIN):$$PATH" PYTHON=python scripts/build_native

$(VENV)/.python: scripts/need
	scripts/need $(PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --upgrade pip
	touch $@

# The wheel is built once per state of the sources and is what runs: the tests never see src/.
$(VENV)/.wheel: $(VENV)/.python $(SOURCES) constraints.txt
	rm -rf $(VENV)/wheel
	$(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir $(VENV)/wheel .
	touch $@

$(VENV)/.demo: $(VENV)/.wheel
	$(PIP) "llm-quantize[llamacpp] @ file://$$(echo $(CURDIR)/$(VENV)/wheel/*.whl)"
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --force-reinstall $(VENV)/wheel/*.whl
	touch $@

$(VENV)/.compare: $(VENV)/.wheel
	$(PIP) torch
	$(PIP) "llm-quantize[llamacpp,torch] @ file://$$(echo $(CURDIR)/$(VENV)/wheel/*.whl)"
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --force-reinstall $(VENV)/wheel/*.whl
	touch $@ $(VENV)/.demo

$(VENV)/.test: $(VENV)/.wheel
	$(PIP) torch
	$(PIP) "llm-quantize[test] @ file://$$(echo $(CURDIR)/$(VENV)/wheel/*.whl)"
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --force-reinstall $(VENV)/wheel/*.whl
	touch $@ $(VENV)/.demo $(VENV)/.compare

clean:
	rm -rf $(VENV) _build .pytest_cache .mypy_cache .ruff_cache .hypothesis
