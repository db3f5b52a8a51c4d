"""The claim of ``analyze profile``, on the built-in trained model: at equal bytes, less is lost on text not seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llm_quantize.calibration.text import load_texts
from llm_quantize.calibration.tokens import TextTokenizer
from llm_quantize.calibration.windows import sample_windows
from llm_quantize.evaluation.allocation import Target, choose
from llm_quantize.evaluation.profile import measure_profile, plan_profile
from llm_quantize.evaluation.quality import measure_quality
from llm_quantize.formats.gguf.levels import Overrides
from llm_quantize.measures.perplexity import cut_windows
from llm_quantize.models.opening import open_source
from llm_quantize.pipeline import Options, quantize

TYPES = ("q8_0", "q6_k", "q5_k", "q4_k", "iq4_xs", "q3_k", "q2_k")
TEXTS = Path("texts")


@pytest.mark.heavy
def test_a_profiled_recipe_beats_the_level_of_its_size(demo_model: Path, tmp_path: Path) -> None:
    source = open_source(str(demo_model))
    paths = []
    with source.checkpoint:
        tokenizer = TextTokenizer(source)
        seen = sample_windows(load_texts([]), tokenizer, samples=4, length=128)
        profile = measure_profile(plan_profile(source, seen.ids.astype(np.int32), TYPES, None))
        for like in ("Q4_K_M", "Q3_K_M"):
            choice = choose(source, profile, Target(like=like))
            for options in (Options(), Options(overrides=Overrides(recipe=choice.recipe))):
                paths += [
                    r.path for r in quantize(str(demo_model), levels=[like], output_dir=tmp_path, options=options)
                ]
            assert paths[-1].stat().st_size <= paths[-2].stat().st_size + 256
        texts = sorted((demo_model.parent / TEXTS).glob("*.txt"))
        assert len(texts) == 2
        held_out = np.concatenate(
            [
                cut_windows(tokenizer.encode(text.read_text(encoding="utf-8")), 256, bos=tokenizer.bos, limit=6)
                for text in texts
            ]
        )
        result = measure_quality(source, paths, held_out)
    pairs = {(pair.first, pair.second): pair for pair in result.pairs}
    for plain in (0, 2):
        pair = pairs[plain, plain + 1]
        assert pair.kld_ratio - 3 * pair.kld_ratio_sem > 1.2, result.artifacts[plain].path
