"""How texts begin and end where the files beside tokenizer.json say more than it does, judged by real llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf.constants import Keys

from llm_quantize.calibration.tokens import TextTokenizer
from llm_quantize.formats.gguf.vocabulary.reading import read_vocabulary
from llm_quantize.io.gguf_file import MetaValue
from llm_quantize.models.opening import open_source
from llm_quantize.options import Options
from llm_quantize.runtimes.llama_cpp import LlamaCpp

from ..tiny_models import make_tiny
from ..tiny_tokenizers import PRE_TOKENIZERS, byte_level_json, save_tokenizer, write_model
from .test_gguf_vocabulary import template

BEGIN, END = "<|im_start|>", "<|im_end|>"
NAMES = {"bos_token": BEGIN, "eos_token": "<|endoftext|>"}
# Of transformers 4.46.3, asked which of its fast classes put add_bos_token in the place of the post-processor.
HEEDING = ["LlamaTokenizerFast", "LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizerFast", "CohereTokenizerFast",
           "GPTNeoXTokenizerFast"]  # fmt: skip
OTHERS = ["PreTrainedTokenizerFast", "GPT2TokenizerFast", "Qwen2TokenizerFast", None]


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    """Ids 0 <|endoftext|>, 1 <|im_start|>, 2 <|im_end|>; 3002 to 3006 as GLM names its speakers."""
    data = byte_level_json(PRE_TOKENIZERS["qwen2"][0])
    for index, text in enumerate(("<|user|>", "<|observation|>", "<|tool|>", "<|stop|>"), start=3002):
        data["added_tokens"].append({**data["added_tokens"][0], "id": index, "content": text})
    return data


def vocabulary(
    directory: Path, data: dict[str, Any], settings: dict[str, Any], config: dict[str, Any], generation: Any = None
) -> tuple[dict[str, MetaValue], list[str]]:
    save_tokenizer(directory, data, settings)
    told: list[str] = []
    found = read_vocabulary(directory, config, embedding_rows=None, generation_config=generation, note=told.append)
    return found, told


@pytest.mark.parametrize("version", ["4.43.1", None, "5.2.0"])
@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("name", [HEEDING[0], HEEDING[-1], OTHERS[0]])
def test_what_the_model_was_run_with_decides(
    name: str, said: bool, version: str | None, plain: dict[str, Any], tmp_path: Path
) -> None:
    """tokenizer.json adds what tokenizer_config.json says it should not, or the reverse."""
    data = plain if said else plain | {"post_processor": template([BEGIN], [], {BEGIN: 1})}
    settings = {"tokenizer_class": name, "add_bos_token": said, **NAMES}
    config = {} if version is None else {"transformers_version": version}
    metadata, told = vocabulary(tmp_path, data, settings, config)
    heeded = name in HEEDING and version != "5.2.0"
    assert metadata[Keys.Tokenizer.ADD_BOS].value is (said if heeded else not said)
    assert len(told) == 1
    assert f"add_bos_token {str(said).lower()}, but tokenizer.json adds" in told[0]
    assert ("Transformers 5" in told[0]) is heeded
    with LlamaCpp(write_model(tmp_path / "m.gguf", metadata), context=64, threads=1) as runtime:
        assert (runtime.tokenize("Hi", add_special=True)[0] == 1) is (said if heeded else not said)


def test_where_both_agree_nothing_is_said(plain: dict[str, Any], tmp_path: Path) -> None:
    for name in (*HEEDING, *OTHERS):
        settings = {"tokenizer_class": name, "add_bos_token": False, "add_eos_token": False, **NAMES}
        assert vocabulary(tmp_path, plain, settings, {})[1] == []
        assert vocabulary(tmp_path, plain, {"tokenizer_class": name, **NAMES}, {})[1] == []


def test_an_end_that_is_not_added(plain: dict[str, Any], tmp_path: Path) -> None:
    """The eos of the post-processor is then no role of its own."""
    data = plain | {"post_processor": template([], [END], {END: 2})}
    settings = {"tokenizer_class": "LlamaTokenizerFast", **NAMES}
    metadata, told = vocabulary(tmp_path, data, settings | {"add_eos_token": True}, {})
    assert (metadata[Keys.Tokenizer.EOS_ID].value, metadata[Keys.Tokenizer.ADD_EOS].value, told) == (2, True, [])
    metadata, told = vocabulary(tmp_path, data, settings | {"add_eos_token": False}, {})
    assert (metadata[Keys.Tokenizer.EOS_ID].value, metadata[Keys.Tokenizer.ADD_EOS].value) == (0, False)
    assert len(told) == 1


def test_the_plan_says_it_and_calibration_begins_texts_so(tmp_path: Path) -> None:
    from llm_quantize.formats.table import FORMATS

    model = make_tiny("llama", tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    data = json.loads((model / "tokenizer.json").read_text())
    text = data["added_tokens"][0]["content"]
    settings |= {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "bos_token": text}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((model / "config.json").read_text()) | {"transformers_version": "4.43.1"}
    (model / "config.json").write_text(json.dumps(config))
    source = open_source(str(model))
    with source.checkpoint:
        (plan,) = FORMATS["gguf"].plan(source, ["Q8_0"], "tiny", None, Options())
        assert sum("add_bos_token true" in warning for warning in plan.warnings) == 1
        assert TextTokenizer(source).bos == data["added_tokens"][0]["id"]


def ends(metadata: dict[str, MetaValue], path: Path, ids: list[int]) -> list[bool]:
    """Whether llama.cpp ends a generation at each of ``ids``."""
    with LlamaCpp(write_model(path, metadata), context=64, threads=1) as runtime:
        return [bool(runtime._library.call.llama_vocab_is_eog(runtime._vocab, index)) for index in ids]


@pytest.mark.parametrize(
    ("config", "generation"),
    [
        ({"eos_token_id": 0}, {"eos_token_id": [0, 3002, 3003]}),
        ({"eos_token_id": [0, 3002, 3003]}, {"eos_token_id": 0}),
        ({"eos_token_id": [0, 3002, 3003]}, None),
        ({"text_config": {"eos_token_id": [3002, 3003]}}, {}),
    ],
    ids=["generation_config", "config", "config alone", "text_config"],
)
def test_every_end_of_a_list_is_marked(
    config: dict[str, Any], generation: Any, plain: dict[str, Any], tmp_path: Path
) -> None:
    metadata, told = vocabulary(tmp_path, plain, NAMES, config, generation)
    assert ends(metadata, tmp_path / "m.gguf", [0, 2, 3002, 3003, 3004]) == [True, True, True, True, False]
    assert told == []


def test_the_marks_of_glm_are_those_of_published_files(plain: dict[str, Any], tmp_path: Path) -> None:
    data = json.loads(json.dumps(plain).replace(END, "[sMASK]"))
    metadata, _ = vocabulary(tmp_path, data, NAMES, {}, {"eos_token_id": [0, 3002, 3003]})
    keys = Keys.Tokenizer
    assert [metadata[key].value for key in (keys.EOS_ID, keys.EOT_ID, keys.EOM_ID)] == [0, 3002, 3003]


def test_what_gguf_has_no_place_for_is_told(plain: dict[str, Any], tmp_path: Path) -> None:
    generation = {"eos_token_id": [3002, 0, 2, 3003, 3004, 3005, 9999, True, "x"]}
    metadata, told = vocabulary(tmp_path, plain, NAMES, {"eos_token_id": None}, generation)
    assert ends(metadata, tmp_path / "m.gguf", [0, 2, 3002, 3003, 3004, 3005]) == [True, True, True, True, False, False]
    assert len(told) == 1
    assert "at <|tool|>, <|stop|> too" in told[0]


def test_an_end_that_llama_cpp_does_not_know_by_its_text_is_not_lost(plain: dict[str, Any], tmp_path: Path) -> None:
    """The end of a turn of tokenizer_config.json keeps its place where the post-processor adds another eos."""
    data = plain | {"post_processor": template([], ["<|endoftext|>"], {"<|endoftext|>": 0})}
    settings = {"bos_token": BEGIN, "eos_token": "<|user|>"}
    metadata, told = vocabulary(tmp_path, data, settings, {}, {"eos_token_id": [3003, 3004]})
    assert ends(metadata, tmp_path / "m.gguf", [0, 3002, 3003, 3004]) == [True, True, True, False]
    assert "<|tool|>" in told[0]
