#!/bin/sh
# Makes one virtual environment for each peer in the directory given: sh benchmarks/peers/environments.sh DIRECTORY
# torch comes first and alone, so that the CPU build is not replaced; what pins another torch goes in with --no-deps.
set -eu
[ $# -eq 1 ] || { echo "usage: environments.sh DIRECTORY" >&2; exit 2; }
peers=$1
python=${PYTHON:-python3.11}
torch=2.13.0
mkdir -p "$peers"
echo "torch==$torch" > "$peers/constraints.txt"

environment() {
    [ -x "$peers/$1/bin/python" ] || "$python" -m venv "$peers/$1"
    pip="$peers/$1/bin/python -m pip --disable-pip-version-check install --quiet"
    $pip "torch==$torch"
    pip="$pip --constraint $peers/constraints.txt"
}

environment gptqmodel
$pip transformers==5.23.0 accelerate safetensors optimum==2.3.0 threadpoolctl device-smi pypcre tokenicer logbar ninja \
    maturin datasets pyarrow dill torchao defuser pillow protobuf sentencepiece wheel setuptools packaging requests
$pip --no-deps --no-build-isolation gptqmodel==7.7.0

environment llmcompressor
$pip transformers==5.17.0 "huggingface_hub<2" compressed-tensors==0.19.0 datasets accelerate loguru pyyaml requests \
    tqdm pillow numpy
$pip --no-deps llmcompressor==0.14.0.1

environment autoawq
$pip transformers==4.51.3 tokenizers==0.21.4 huggingface_hub==0.36.0 datasets==3.6.0 accelerate zstandard "numpy<2.4"
$pip --no-deps triton
$pip --no-deps autoawq==0.2.9

environment autoround
$pip transformers==5.23.0 accelerate datasets pydantic numpy pillow py-cpuinfo tqdm threadpoolctl packaging \
    gguf==0.19.0 sentencepiece safetensors
$pip --no-deps auto-round==0.16.1
