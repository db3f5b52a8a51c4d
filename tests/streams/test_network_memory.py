"""A model of many blocks costs the memory of one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.tiny_models import make_tiny

BLOCKS, WIDTH, INNER = 16, 512, 4096

CHILD = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from llm_quantize.streams.network import open_network
from llm_quantize.streams.weights import CheckpointWeights
from llm_quantize.models.opening import open_source

def memory():
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) << 10 for name in ("VmHWM", "VmPeak")}

def through(network, weights, blocks):
    states = list(network.embed(weights, torch.arange(64).reshape(2, 32)))
    for index in blocks:
        with network.block(index, weights) as block:
            states = [block(state) for state in states]

small = open_source(sys.argv[1])
network = open_network(small, dtype="float32")
through(network, CheckpointWeights(small.checkpoint), range(2))  # what transformers and torch allocate once
before = memory()
source = open_source(sys.argv[2])
network = open_network(source, dtype="float32")
through(network, CheckpointWeights(source.checkpoint), range(network.n_blocks))
after = memory()
sizes = {name: after[name] - before[name] for name in before}
print(json.dumps({**sizes, "block": network.bytes(0), "all": network.n_blocks * network.bytes(0)}))
"""


def test_peak_is_near_one_block(tmp_path: Path) -> None:
    small = make_tiny("llama", tmp_path / "small")
    model = tmp_path / "model"
    make_tiny("llama", model, num_hidden_layers=1, hidden_size=WIDTH, intermediate_size=INNER)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": BLOCKS}))
    (model / "model.safetensors").unlink()
    shapes = {
        "self_attn.q_proj": (WIDTH, WIDTH),
        "self_attn.k_proj": (WIDTH // 2, WIDTH),
        "self_attn.v_proj": (WIDTH // 2, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH),
        "mlp.gate_proj": (INNER, WIDTH),
        "mlp.up_proj": (INNER, WIDTH),
        "mlp.down_proj": (WIDTH, INNER),
        "input_layernorm": (WIDTH,),
        "post_attention_layernorm": (WIDTH,),
    }
    tensors = {
        f"model.layers.{layer}.{name}.weight": torch.full(shape, 0.01, dtype=torch.bfloat16)
        for layer in range(BLOCKS)
        for name, shape in shapes.items()
    }
    tensors["model.embed_tokens.weight"] = torch.full((320, WIDTH), 0.5, dtype=torch.bfloat16)
    tensors["model.norm.weight"] = torch.ones(WIDTH, dtype=torch.bfloat16)
    tensors["lm_head.weight"] = torch.ones((320, WIDTH), dtype=torch.bfloat16)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    del tensors
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(small), str(model)], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["block"] > 24 << 20
    assert found["all"] == BLOCKS * found["block"]
    for kind in ("VmHWM", "VmPeak"):
        assert found[kind] < found["block"] + (24 << 20), found
