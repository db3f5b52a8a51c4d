"""Layouts that are only read, of no sense: settings, fields and names of any kind end in our errors, or in values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_quantize.advice.describe import describe
from llm_quantize.artifacts.verify import verify
from llm_quantize.errors import LlmQuantizeError
from llm_quantize.models.opening import open_source
from tests.oracles.peer_layouts import PEERS, write_peer
from tests.tiny_models import make_tiny

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 7, 64, 10**40, 0.5, "", "x", "NVFP4", "auto_round", [], {}, [1], {"a": 1}),
    *({"a": {"bits": "x"}}, [[128, 128]], [128, 128], [0, 128], "gemm", "mx_fp", "e5m2", "名\0"),
)
KEYS = (
    *("quant_method", "quant_algo", "bits", "group_size", "sym", "zero_point", "version", "packing_format"),
    *("data_type", "extra_config", "weight_block_size", "fmt", "act_bits", "config_groups", "kv_cache_scheme"),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("made")
    model = make_tiny("llama", folder / "model", intermediate_size=128, num_hidden_layers=1)
    for peer in PEERS:
        write_peer(model, folder / peer, peer)
    return {peer: folder / peer for peer in PEERS}


def survives(place: Path) -> bool:
    """Whether it can be read; all who look end in our tree, and say where."""
    read = True
    for look in (describe, verify):
        try:
            look(str(place))
        except LlmQuantizeError as error:
            assert error.file  # noqa: PT017
    try:
        with open_source(str(place)).checkpoint as model:
            for name in model.tensors:
                if model.is_readable(name):
                    rows = model.matrix(name)[0]
                    assert len(np.asarray(model.read_rows(name, 0, rows))) == rows
    except LlmQuantizeError as error:
        assert error.exit_code in (3, 4, 8, 9), str(error)  # noqa: PT017
        assert error.file  # noqa: PT017
        read = False
    return read


def settings(place: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((place / "config.json").read_text())
    change(config["quantization_config"])
    (place / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("peer", PEERS)
def test_settings_of_no_sense(peer: str, made: dict[str, Path], tmp_path: Path) -> None:
    place = Path(shutil.copytree(made[peer], tmp_path / "copy"))
    config = (place / "config.json").read_text()
    random = np.random.default_rng(len(peer))
    for key in KEYS:
        for value in random.choice(np.array(VALUES, dtype=object), 4, replace=False):
            settings(place, lambda said, key=key, value=value: said.update({key: value}))
            survives(place)
            (place / "config.json").write_text(config)
    assert survives(place)


@pytest.mark.parametrize("peer", PEERS)
def test_two_ways_of_quantizing_in_one_directory(peer: str, made: dict[str, Path], tmp_path: Path) -> None:
    """One matrix in the layout of another directory: refused, or, where types tell, read as what it is."""
    place = Path(shutil.copytree(made[peer], tmp_path / "copy"))
    name = "model.layers.0.mlp.up_proj"
    own = load_file(place / "model.safetensors")
    for other in ("ModelOpt NVFP4", "AWQ gemv_fast", "AutoRound", "FP8 blocks"):
        if other == peer:
            continue
        taken = {key: value for key, value in load_file(made[other] / "model.safetensors").items() if name in key}
        kept = {key: value for key, value in own.items() if name not in key}
        save_file(kept | taken, place / "model.safetensors", {"format": "pt"})
        survives(place)
        save_file(own | taken, place / "model.safetensors", {"format": "pt"})
        survives(place)


@pytest.mark.parametrize("peer", PEERS)
def test_fields_that_are_gone_or_of_another_type(peer: str, made: dict[str, Path], tmp_path: Path) -> None:
    place = Path(shutil.copytree(made[peer], tmp_path / "copy"))
    name = "model.layers.0.self_attn.q_proj."
    own = load_file(place / "model.safetensors")
    needed = [key for key in own if key.startswith(name) and not key.endswith("input_scale")]
    for field in needed:
        save_file({key: value for key, value in own.items() if key != field}, place / "model.safetensors")
        assert not survives(place), field
        for dtype in (torch.float64, torch.int64, torch.uint8, torch.bool):
            if own[field].dtype == dtype:
                continue
            changed = {**own, field: torch.zeros(own[field].shape, dtype=dtype)}
            save_file(changed, place / "model.safetensors", {"format": "pt"})
            assert not survives(place) or field.endswith("weight"), (field, dtype)
