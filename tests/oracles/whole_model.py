"""The dense twin of the streamed evaluation: transformers' own loader and whole forward, all logits at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from llm_quantize.artifacts.decoded import DecodedArtifact

from ..tiny_models import reference_model


def load_decoded(artifact: DecodedArtifact, directory: Path, model: Path) -> Any:
    """A whole float32 model of transformers with the artifact's weights; ``directory`` is made for its checkpoint."""
    directory.mkdir()
    config = json.loads((model / "config.json").read_text())
    values = {name: artifact.read(name).contiguous() for name in artifact.names}
    head = {name: artifact.for_head().read(name) for name in artifact.names if "embed" in name or "wte" in name}
    for name, value in head.items():
        if not torch.equal(value, values[name]):  # the artifact's head is not its embedding
            values["lm_head.weight"] = value
            config["tie_word_embeddings"] = False
    (directory / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    save_file(values, directory / "model.safetensors", {"format": "pt"})
    return reference_model(directory)


def whole_logits(model: Any, windows: np.ndarray) -> list[np.ndarray]:
    """float32 (length, vocabulary) of each window."""
    with torch.inference_mode():
        return [model(input_ids=torch.from_numpy(row.astype(np.int64))[None]).logits[0].numpy() for row in windows]
