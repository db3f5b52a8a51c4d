"""Random damage to a right model, through the command line: only our errors, never a hang, never a half artifact."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_quantize.errors import LlmQuantizeError
from llm_quantize.pipeline import plan
from tests.cli.test_hostile_cli import CONFIG, copied
from tests.cli.test_hostile_cli import good as good

FUZZ = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
VALUES = (
    st.sampled_from(
        [
            *(
                None,
                True,
                False,
                0,
                1,
                -1,
                2,
                3,
                0.5,
                -0.0,
                1e308,
                10**12,
                10**40,
                "",
                "llama",
                "名",
                "\0",
                [],
                {},
                [0],
            ),
            *({"a": 1}, "x" * 300, [[]], [None], {"type": None}, {"rope_type": "yarn", "factor": 2}, {"rope_type": []}),
        ]
    )
    | st.integers(-5, 70000)
    | st.floats(allow_nan=False, allow_infinity=False)
)
EXTRA_KEYS = [
    "head_dim", "rope_scaling", "rope_parameters", "sliding_window", "layer_types", "quantization_config",
    "text_config", "attention_bias", "mlp_bias", "partial_rotary_factor", "num_experts", "num_local_experts",
    "num_experts_per_tok", "torch_dtype", "pad_token_id", "unk_token_id", "architectures", "auto_map",
    "vocab_size", "eos_token_id",
]  # fmt: skip
MODEL_TYPES = [
    "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "phi3",
    "gpt2", "gpt_neox", "stablelm", "olmo2", "granite", "smollm3", "falcon",
]  # fmt: skip


@pytest.fixture(scope="module")
def victim(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(good, tmp_path_factory.mktemp("fuzz") / "model")


def survives(place: Path) -> None:
    """Planning the model either works or ends in our tree."""
    try:
        plan(str(place), "gguf", levels=["Q4_K_M"])
    except LlmQuantizeError as error:
        json.dumps(error.to_dict())
        assert error.exit_code in (2, 3, 4, 6, 9), str(error)  # noqa: PT017
        assert error.file, str(error)  # noqa: PT017


@given(
    st.dictionaries(st.sampled_from([*CONFIG, *EXTRA_KEYS]), VALUES, min_size=1, max_size=3),
    st.sampled_from(MODEL_TYPES),
)
@FUZZ
def test_configurations(victim: Path, changes: dict[str, Any], model_type: str) -> None:
    (victim / "config.json").write_text(json.dumps({**CONFIG, "model_type": model_type, **changes}))
    try:
        survives(victim)
    finally:
        (victim / "config.json").write_text(json.dumps(CONFIG))


def places(value: Any, limit: int = 6) -> Iterator[tuple[Any, Any]]:
    """(container, key) of values inside ``value``; of long lists and objects, the first few."""
    keys = list(value)[:limit] if isinstance(value, dict) else range(min(len(value), limit))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key], limit)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@given(data=st.data())
@FUZZ
def test_tokenizer_files(victim: Path, name: str, data: st.DataObject) -> None:
    original = (victim / name).read_bytes()
    value = json.loads(original)
    for _ in range(data.draw(st.integers(1, 2))):
        container, key = data.draw(st.sampled_from(list(places(value))))
        how = data.draw(st.sampled_from(["replace", "delete", "rename"]))
        if how == "replace":
            container[key] = deepcopy(data.draw(VALUES))  # the drawn lists are shared between examples
        elif how == "delete" or isinstance(container, list):
            del container[key]
        else:
            container[data.draw(st.text(max_size=5))] = container.pop(key)
        if not value:
            break
    (victim / name).write_text(json.dumps(value))
    try:
        survives(victim)
    finally:
        (victim / name).write_bytes(original)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md"])
@given(data=st.data())
@FUZZ
def test_bytes(victim: Path, name: str, data: st.DataObject) -> None:
    (victim / "README.md").write_bytes(
        b"---\nlicense: mit\nlanguage: [en, ja]\nbase_model: a/b\ntags:\n- x\n---\n# A\n"
    )
    original = (victim / name).read_bytes()
    raw = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, min(len(raw), 4000)))
        raw[at : at + data.draw(st.integers(0, 4))] = data.draw(
            st.binary(max_size=4) | st.sampled_from([b"[", b"&a ", b"*a"])
        )
    (victim / name).write_bytes(raw)
    try:
        survives(victim)
    finally:
        (victim / name).write_bytes(original)
