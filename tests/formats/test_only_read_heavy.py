"""Random damage to directories in layouts that are only read, to CTranslate2 models and to Ollama's manifests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_quantize.errors import LlmQuantizeError
from llm_quantize.io.ctranslate2_file import MODEL_FILE
from llm_quantize.models.hub.ollama import stored
from llm_quantize.models.opening import open_source
from llm_quantize.options import MethodOptions, Options
from llm_quantize.pipeline import quantize
from tests.formats.test_only_read_hostile import KEYS, VALUES, survives
from tests.oracles.peer_layouts import PEERS, write_peer
from tests.tiny_models import make_tiny

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(3600)]
ROUNDS = 1000
DTYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return make_tiny("llama", folder / "model", intermediate_size=128, num_hidden_layers=1)


def pick(random: np.random.Generator, values: Any) -> Any:
    return values[int(random.integers(0, len(values)))]


@pytest.mark.parametrize("peer", PEERS)
def test_structured_damage(peer: str, model: Path, tmp_path: Path) -> None:
    """Settings, names, shapes and types changed at random, one to three at a time."""
    place = tmp_path / "peer"
    write_peer(model, place, peer)
    random = np.random.default_rng(sorted(PEERS).index(peer))
    own, config = load_file(place / "model.safetensors"), json.loads((place / "config.json").read_text())
    for _ in range(ROUNDS):
        tensors, said = dict(own), {**config["quantization_config"]}
        for _ in range(int(random.integers(1, 4))):
            name = pick(random, list(tensors))
            shape = tuple(int(size) for size in random.choice([0, 1, 2, 3, 16, 32, 64, 128], random.integers(0, 5)))
            match int(random.integers(0, 6)):
                case 0:
                    said[pick(random, KEYS)] = pick(random, VALUES)
                case 1:
                    tensors[f"{name.rpartition('.')[0]}.{pick(random, list(own)).rpartition('.')[2]}"] = tensors[
                        name
                    ].clone()
                case 2:
                    del tensors[name]
                case 3:
                    tensors[name] = torch.zeros(shape, dtype=tensors[name].dtype)
                case 4:
                    tensors[name] = torch.ones(tensors[name].shape, dtype=pick(random, DTYPES))
                case _:
                    tensors[name] = torch.zeros(shape, dtype=pick(random, DTYPES))
        (place / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
        save_file(tensors, place / "model.safetensors", {"format": "pt"})
        survives(place)


def test_bytes_of_ctranslate2_models(model: Path, tmp_path: Path) -> None:
    options = Options(threads=1, method=MethodOptions(method="rtn"))
    (result,) = quantize(str(model), "ctranslate2", levels=["int8"], output_dir=tmp_path, options=options)
    place = Path(shutil.copytree(result.path, tmp_path / "copy"))
    whole, random = (place / MODEL_FILE).read_bytes(), np.random.default_rng(1)
    for _ in range(10 * ROUNDS):
        data = bytearray(whole)
        for _ in range(int(random.integers(1, 4))):
            data[int(random.integers(0, len(data)))] = int(random.integers(0, 256))
        (place / MODEL_FILE).write_bytes(data[: int(random.integers(1, len(data)))] if random.random() < 0.2 else data)
        try:
            with open_source(str(place)).checkpoint as found:
                found.read_rows("model.norm.weight", 0, 1)
        except LlmQuantizeError as error:
            assert error.file  # noqa: PT017


def test_manifests_of_ollama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    path = tmp_path / "manifests" / "registry.ollama.ai" / "library" / "m" / "latest"
    path.parent.mkdir(parents=True)
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{'0' * 64}", "size": 3}
    whole = json.dumps({"schemaVersion": 2, "layers": [layer, {**layer, "mediaType": "x"}]}).encode()
    random = np.random.default_rng(2)
    for _ in range(20 * ROUNDS):
        data = bytearray(whole)
        for _ in range(int(random.integers(1, 6))):
            data[int(random.integers(0, len(data)))] = int(random.choice(list(b'{}[]",:0123\\ axn\x00\xff')))
        path.write_bytes(data)
        with pytest.raises(LlmQuantizeError) as caught:
            stored("ollama:m")
        assert caught.value.file
