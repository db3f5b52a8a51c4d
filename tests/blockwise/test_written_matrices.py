"""An embedding that the artifact holds in several fields enters the quantized stream as it is stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llm_quantize.artifacts.opening import open_decoded
from llm_quantize.blockwise.embedding import WrittenTable
from llm_quantize.models.opening import open_source
from llm_quantize.options import CalibrationOptions, Options
from llm_quantize.pipeline import quantize
from tests.blockwise.tiny import write_text
from tests.tiny_models import make_tiny


@pytest.mark.parametrize("tied", [True, False])
def test_the_stored_embedding_and_head_are_used(tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny("llama", tmp_path / "model", tie_word_embeddings=tied)
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    read_rows = WrittenTable.read_rows

    def watched(self: WrittenTable, name: str, rows: torch.Tensor) -> torch.Tensor:
        found = read_rows(self, name, rows)
        seen.setdefault(name, []).append((rows, found))
        return found

    monkeypatch.setattr(WrittenTable, "read_rows", watched)
    calibration = CalibrationOptions(data=(str(write_text(tmp_path)),), samples=3, length=32)
    options = Options(threads=1, calibration=calibration)
    (result,) = quantize(str(model), "ctranslate2", levels=["int8"], output_dir=tmp_path, options=options)
    source = open_source(str(model))
    with source.checkpoint:
        artifact = open_decoded(source, result.path)
        tables = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
        assert tables <= seen.keys()
        for name in tables:
            for rows, found in seen[name]:
                assert torch.equal(found, artifact.read(name)[rows])
            assert not torch.equal(found, source_rows(source, name, rows))


def source_rows(source: object, name: str, rows: torch.Tensor) -> torch.Tensor:
    from llm_quantize.streams.weights import CheckpointWeights

    return CheckpointWeights(source.checkpoint).read(name).float()[rows]  # type: ignore[attr-defined]
