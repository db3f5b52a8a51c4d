"""A model several times larger than the memory limit is measured under it, and the plan says what is used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_quantize.errors import ResourceError
from llm_quantize.evaluation import quality
from llm_quantize.evaluation.quality_plan import QualityPlan

from ..tiny_models import make_tiny

_SCRIPT = """
import json, sys
import numpy as np
from llm_quantize.evaluation.quality import measure_quality
from llm_quantize.pipeline import Options, quantize
from llm_quantize.models.opening import open_source
import llm_quantize.streams.network, transformers.models.llama.modeling_llama
model, folder, limit, context = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
windows = np.random.Generator(np.random.PCG64(0)).integers(0, 320, (4, context)).astype(np.int32)
source = open_source(model)
files = sorted(__import__("pathlib").Path(folder).glob("*.gguf"))
result = measure_quality(source, files, windows, threads=2, max_ram=limit)
print(json.dumps(result.to_dict()["memory"] | {"kld": result.artifacts[0].divergence.kld}))
"""


def larger(model: Path, layers: int) -> int:
    """Make the model of one layer that is in ``model`` one of ``layers``, each its own file; returns its bytes."""
    values = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    layer = {name: value for name, value in values.items() if ".layers.0." in name}
    names: dict[str, str] = {}
    total = 0
    for index in range(layers + 1):
        part = (
            {name.replace(".layers.0.", f".layers.{index}."): value for name, value in layer.items()}
            if index < layers
            else {name: value for name, value in values.items() if name not in layer}
        )
        file = f"model-{index + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(part, model / file, {"format": "pt"})
        names |= dict.fromkeys(part, file)
        total += sum(value.numel() * value.element_size() for value in part.values())
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def test_seventy_billion_weights_fit_sixteen_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan for Llama 3 70B's sizes, from sizes alone: one block, two heads, hidden states on disk."""
    width, feed, vocabulary, layers, kv = 8192, 28672, 128256, 80, 1024
    block = 4 * (2 * width * width + 2 * width * kv + 3 * width * feed)
    head = 4 * vocabulary * width
    hyper = SimpleNamespace(
        n_head=64, n_head_kv=8, head_dim=128, embedding_length=width, feed_forward_length=feed, n_expert=0,
        n_layer=layers, recurrence=None,
    )  # fmt: skip
    source: Any = SimpleNamespace(architecture=SimpleNamespace(hyper=hyper), checkpoint=SimpleNamespace(scratch=0))
    network: Any = SimpleNamespace(
        n_blocks=layers,
        width=width,
        vocab_size=vocabulary,
        eager=False,
        dtype=SimpleNamespace(itemsize=4),
        bytes=lambda part: block if isinstance(part, int) else head,
    )
    artifacts: Any = [SimpleNamespace(size=42_000_000_000, scratch=0)] * 2
    windows = np.zeros((64, 512), np.int32)
    monkeypatch.setattr(quality.memory, "memory_limit", lambda limit: limit)
    plan = QualityPlan(source, network, artifacts, windows, runtime=False)
    fitted, together = plan.fit(4, threads=8, max_ram=16_000_000_000, device="cpu")
    assert 3 * head < fitted.peak <= 16_000_000_000
    assert fitted.threads >= 4
    assert not fitted.in_memory
    assert together == 2
    less, alone = plan.fit(4, threads=8, max_ram=12_000_000_000, device="cpu")
    assert 2 * head < less.peak <= 12_000_000_000
    assert alone == 1
    assert plan.fit(4, threads=8, max_ram=64_000_000_000, device="cpu")[0].threads == 8
    with pytest.raises(ResourceError, match="memory limit"):
        plan.fit(4, threads=8, max_ram=8_000_000_000, device="cpu")
    in_runtime = QualityPlan(source, network, artifacts, windows, runtime=True)
    with pytest.raises(ResourceError, match="memory limit"):  # the runtime holds the whole file
        in_runtime.fit(4, threads=8, max_ram=16_000_000_000, device="cpu")


@pytest.mark.heavy
def test_larger_than_the_limit(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = make_tiny(
        "llama", tmp_path / "model", hidden_size=1024, intermediate_size=4096, num_attention_heads=16,
        num_key_value_heads=16, num_hidden_layers=1,
    )  # fmt: skip
    size = larger(model, 32)
    assert size * 2 > 2_000_000_000  # in float32, as it is computed
    made = subprocess.run(
        [sys.executable, "-m", "llm_quantize", "quantize", str(model), "gguf", "-q", "Q8_0", "-o", str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    limit = 650_000_000
    run = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(model), str(tmp_path), str(limit), "128"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["peak"] <= found["planned"] <= limit
    assert found["kld"] > 0
    refused = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(model), str(tmp_path), str(300_000_000), "128"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "ResourceError" in refused.stderr
