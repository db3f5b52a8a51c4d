"""The llama.cpp adapter against a tiny GGUF made here, by hand, with the gguf package."""

from __future__ import annotations

import gc
import resource
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from llm_quantize.errors import MalformedInputError, MissingExtraError, UnsupportedError, UsageError
from llm_quantize.events import Generated
from llm_quantize.models.chat_template import render
from llm_quantize.runtimes import llama_cpp_library
from llm_quantize.runtimes.base import talk
from llm_quantize.runtimes.llama_cpp import ChatText, LlamaCpp, _choose
from tests.hearing import into

WIDTH, HEADS, LAYERS, HIDDEN = 64, 4, 2, 96


def _byte_words() -> list[str]:
    """The 256 printable stand-ins of GPT-2's byte-level alphabet, in byte order."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in kept else chr(next(spare)) for b in range(256)]


def make_gguf(
    path: Path, *, template: str | None = None, vocabulary: bool = True, arch: str = "llama", layers: int = LAYERS
) -> Path:
    words = [*_byte_words(), "ab", "abc", "<s>", "</s>"]
    random = np.random.Generator(np.random.PCG64(7))
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2" if vocabulary else "no_vocab")
    if vocabulary:
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(words)
        writer.add_token_types([1] * 258 + [3, 3])
        writer.add_token_merges(["a b", "ab c"])
        writer.add_bos_token_id(258)
        writer.add_eos_token_id(259)
        writer.add_add_bos_token(True)
        if template is not None:
            writer.add_chat_template(template)

    def put(name: str, *shape: int) -> None:
        values = 1 + random.normal(0, 0.1, shape) if len(shape) == 1 else random.normal(0, 0.3, shape)
        writer.add_tensor(name, values.astype(np.float32))

    put("token_embd.weight", len(words), WIDTH)
    put("output_norm.weight", WIDTH)
    put("output.weight", len(words), WIDTH)
    for layer in range(layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            put(f"blk.{layer}.{name}.weight", WIDTH, WIDTH)
        put(f"blk.{layer}.ffn_gate.weight", HIDDEN, WIDTH)
        put(f"blk.{layer}.ffn_up.weight", HIDDEN, WIDTH)
        put(f"blk.{layer}.ffn_down.weight", WIDTH, HIDDEN)
        put(f"blk.{layer}.attn_norm.weight", WIDTH)
        put(f"blk.{layer}.ffn_norm.weight", WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_tokens_and_text(model: Path) -> None:
    with LlamaCpp(model) as llama:
        assert llama.vocab_size == 260
        assert llama.tokenize("abc ab", add_special=False) == [257, 32, 256]
        assert llama.tokenize("ab") == [258, 256]
        assert llama.tokenize("ab</s>", add_special=False, parse_special=True) == [256, 259]
        assert len(llama.tokenize("ab</s>", add_special=False, parse_special=False)) == 5
        assert llama.tokenize("", add_special=False) == []
        for text in ("abc", "naïve café", "日本語 👩‍👩‍👧", "tab\tand\r\nline", "x" * 3000):
            assert llama.detokenize(llama.tokenize(text, add_special=False)) == text
        assert llama.metadata("general.architecture") == "llama"
        assert llama.metadata("no.such.key") is None


def _attention(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    e = np.exp(x)
    return e / e.sum(-1, keepdims=True)


def _forward(path: Path, ids: list[int]) -> np.ndarray:
    """The same network in float64 numpy: RMS norm, interleaved rotary positions, SwiGLU."""
    weights = {t.name: np.asarray(t.data, np.float64) for t in gguf.GGUFReader(path).tensors}

    def norm(v: np.ndarray, name: str) -> np.ndarray:
        return v / np.sqrt((v * v).mean(-1, keepdims=True) + 1e-5) * weights[name]

    n, size = len(ids), WIDTH // HEADS
    angles = np.arange(n)[:, None] * 10000.0 ** (-np.arange(0, size, 2) / size)
    turn = np.exp(1j * angles)[:, None, :]

    def rope(v: np.ndarray) -> np.ndarray:
        v = v.reshape(n, HEADS, size)
        pair = (v[..., 0::2] + 1j * v[..., 1::2]) * turn
        return np.stack([pair.real, pair.imag], -1).reshape(n, HEADS, size)

    x = weights["token_embd.weight"][ids]
    for layer in range(LAYERS):
        w = {k.removeprefix(f"blk.{layer}."): v for k, v in weights.items()}
        h = norm(x, f"blk.{layer}.attn_norm.weight")
        q, k = rope(h @ w["attn_q.weight"].T), rope(h @ w["attn_k.weight"].T)
        v = (h @ w["attn_v.weight"].T).reshape(n, HEADS, size)
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(size)
        scores = np.where(np.tril(np.ones((n, n), bool)), scores, -np.inf)
        x = x + np.einsum("hij,jhd->ihd", _attention(scores), v).reshape(n, WIDTH) @ w["attn_output.weight"].T
        h = norm(x, f"blk.{layer}.ffn_norm.weight")
        gate = h @ w["ffn_gate.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["ffn_up.weight"].T)) @ w["ffn_down.weight"].T
    return norm(x, "output_norm.weight") @ weights["output.weight"].T


@pytest.mark.parametrize("length", [1, 7, 600])
def test_logits_are_those_of_plain_arithmetic(model: Path, length: int) -> None:
    ids = np.random.Generator(np.random.PCG64(length)).integers(0, 260, length).tolist()
    expected = _forward(model, ids)
    with LlamaCpp(model, context=700, threads=1) as one, LlamaCpp(model, context=700, threads=2) as two:
        got = one.logits(ids)
        assert got.shape == (length, 260)
        assert got.dtype == np.float32
        assert np.abs(got - expected).max() < 2e-4 * np.ptp(expected)
        assert np.array_equal(got, one.logits(ids))
        assert np.array_equal(got, two.logits(ids))
        for first in {0, length // 2, length - 1, min(512, length - 1)}:
            assert np.array_equal(got[first:], one.logits(ids, first))


def test_generation_is_deterministic_and_follows_the_logits(model: Path) -> None:
    with LlamaCpp(model, context=64) as llama:
        text = "".join(llama.generate("abc", max_tokens=12))
        assert text == "".join(llama.generate("abc", max_tokens=12))
        assert text == "".join(llama.generate(llama.tokenize("abc"), max_tokens=12))
        ids, greedy = llama.tokenize("abc"), []
        for _ in range(12):
            token = int(np.argmax(llama.logits(ids)[-1]))
            if token == 259:
                break
            ids.append(token)
            greedy.append(token)
        assert text.encode()[:4] == llama.detokenize(greedy).encode()[:4]
        warm = ["".join(llama.generate("abc", max_tokens=12, temperature=3.0, seed=s)) for s in (0, 0, 1)]
        assert warm[0] == warm[1] != warm[2]
        assert len(list(llama.generate("abc", max_tokens=1000))) < 64


def test_a_draw_follows_the_probabilities() -> None:
    random = np.random.Generator(np.random.PCG64(3))
    logits = np.log(np.array([0.1, 0.6, 0.3], np.float32))
    counts = np.bincount([_choose(logits, 1.0, random) for _ in range(4000)], minlength=3) / 4000
    assert np.abs(counts - [0.1, 0.6, 0.3]).max() < 0.03
    assert _choose(logits, 0.0, random) == 1


def test_a_draw_leaves_out_the_unlikely() -> None:
    """The fewest tokens that have the share, by their own probabilities."""
    random = np.random.Generator(np.random.PCG64(3))
    logits = np.log(np.array([0.1, 0.55, 0.05, 0.3], np.float32))
    for share, allowed in ((0.5, [0, 1, 0, 0]), (0.8, [0, 0.647, 0, 0.353]), (0.94, [0.105, 0.579, 0, 0.316])):
        counts = np.bincount([_choose(logits, 1.0, random, share) for _ in range(4000)], minlength=4) / 4000
        assert np.abs(counts - allowed).max() < 0.03
        assert (counts == 0).tolist() == [part == 0 for part in allowed]


def test_generation_tells_how_fast_it_was(model: Path) -> None:
    heard: list[Any] = []
    with LlamaCpp(model, context=64, threads=2) as llama:
        pieces = list(llama.generate("abc", max_tokens=12, temperature=3.0, top_p=0.9, on_event=heard.append))
    (told,) = heard
    assert isinstance(told, Generated)
    assert len(pieces) - 1 <= told.tokens <= 12
    assert (told.threads, told.prompt_tokens) == (2, 2)
    assert told.rate == told.tokens / told.seconds
    assert told.prompt_seconds is not None
    assert told.prompt_seconds > 0
    with LlamaCpp(model) as llama, pytest.raises(UsageError, match="top-p"):
        list(llama.generate("abc", top_p=0.0))


def test_gpu_layers_need_a_build_for_gpus(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On this build the number has no effect; that it is where it should be, the block shows."""
    library = llama_cpp_library.load_library()
    monkeypatch.setattr(library.call, "llama_supports_gpu_offload", lambda: False)
    with pytest.raises(UnsupportedError, match="on the CPU only"):
        LlamaCpp(model, gpu_layers=3)
    monkeypatch.setattr(library.call, "llama_supports_gpu_offload", lambda: True)
    block, _ = library.model_parameters(3)
    assert block.read()[:24] == bytes(16) + (3).to_bytes(4, "little") + (1).to_bytes(4, "little")
    with LlamaCpp(model, gpu_layers=3) as llama:
        assert "".join(llama.generate("abc", max_tokens=4))


def chat_ids(llama: LlamaCpp, prompt: str, *, system: str | None = None, heard: Any = None) -> list[int]:
    """The tokens of a chat in the file's own template."""
    with ChatText(llama, *([] if heard is None else [into(heard)])) as template:
        return llama.chat_ids(template.text(talk(prompt, system)))


def test_chat_uses_the_model_template(tmp_path: Path) -> None:
    known = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    own = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[reply]"
    for name, template, text, begins in (
        ("known", known, "<|im_start|>user\nab<|im_end|>\n", 1),
        ("own", own, "[user]ab[reply]", 1),
    ):
        with LlamaCpp(make_gguf(tmp_path / f"{name}.gguf", template=template)) as llama:
            ids = chat_ids(llama, "ab")
            assert ids.count(258) == begins
            assert llama.detokenize(ids) == text
            assert "[system]x[user]ab" in llama.detokenize(chat_ids(llama, "ab", system="x")).replace(
                "<|im_start|>system\nx<|im_end|>\n<|im_start|>user\n", "[system]x[user]"
            )
            assert isinstance("".join(llama.generate("ab", max_tokens=2, chat=True)), str)
    with (
        LlamaCpp(make_gguf(tmp_path / "none.gguf")) as llama,
        pytest.raises(UnsupportedError, match="no chat template"),
    ):
        list(llama.generate("ab", chat=True))


CHATML = (
    "{%- set start = '<|im_start|>' %}{% if messages[0]['role'] != 'system' %}"
    "{{ start + 'system\nYou answer in verse.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{% if loop.index > 9 %}{% break %}{% endif %}"
    "{{ start + message.role + '\n' + message.content + '<|im_end|>' }}\n{% endfor %}"
    "{% if add_generation_prompt %}{% generation %}{{ start }}assistant\n{% endgeneration %}{% endif %}"
)


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        "{{ bos_token }}{{ messages | tojson(indent=1) }}"
        "{{ messages|tojson(sort_keys=True) }}\n  {% if tools %}t{% endif %}",
        "{{ tools is none }} {{ documents is none }} {{ strftime_now('%Y') }} {{ eos_token }}",
    ],
)
def test_the_chat_is_the_text_of_transformers(tmp_path: Path, demo_model: Path, template: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(demo_model), bos_token="<s>", eos_token="</s>")
    messages = [{"role": "user", "content": "<b>ab</b>\n"}]
    expected = tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, tokenize=False
    )
    assert render(template, messages, bos="<s>", eos="</s>", file=tmp_path) == expected


def test_chat_of_a_file_has_its_default_system_message(tmp_path: Path) -> None:
    with LlamaCpp(make_gguf(tmp_path / "chatml.gguf", template=CHATML)) as llama:
        heard: list[object] = []
        text = llama.detokenize(chat_ids(llama, "ab", heard=heard))
        assert text.startswith("<|im_start|>system\nYou answer in verse.<|im_end|>\n<|im_start|>user\nab<|im_end|>")
        assert heard == []


def test_chat_without_jinja_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with LlamaCpp(make_gguf(tmp_path / "chatml.gguf", template=CHATML)) as llama:
        heard: list[Any] = []
        assert list(llama.generate("ab", max_tokens=2, chat=True, on_event=into(heard))) is not None
        assert [event["event"] for event in heard] == ["warning", "generated"]
        assert "built-in template" in heard[0]["text"]
    own = make_gguf(tmp_path / "own.gguf", template="{{ messages[0].content }}!")
    with LlamaCpp(own) as llama, pytest.raises(MissingExtraError, match="llamacpp"):
        list(llama.generate("ab", chat=True))


def test_refusals(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        LlamaCpp(tmp_path / "absent.gguf")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(model.read_bytes()[:5000])
    with pytest.raises(MalformedInputError) as caught:
        LlamaCpp(broken)
    assert caught.value.found not in (None, "no message")
    with pytest.raises(UnsupportedError, match="nonesuch"):
        LlamaCpp(make_gguf(tmp_path / "arch.gguf", arch="nonesuch"))
    with LlamaCpp(model, context=16) as llama:
        for ids in ([], [0] * 17, [260], [-1]):
            with pytest.raises(UsageError):
                llama.logits(ids)
        with pytest.raises(UsageError):
            list(llama.generate("x" * 40))
        with pytest.raises(UsageError):
            list(llama.generate("x", temperature=-1.0))
    with pytest.raises(UsageError, match="closed"):
        llama.logits([1])
    with LlamaCpp(make_gguf(tmp_path / "bare.gguf", vocabulary=False)) as bare:
        assert bare.logits([1, 2]).shape == (2, 260)
        with pytest.raises(UnsupportedError, match="no tokenizer"):
            bare.tokenize("x")


def test_an_unknown_interface_is_refused_not_guessed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = llama_cpp_library.load_library()
    changed = llama_cpp_library.Block()
    monkeypatch.setattr(library.call, "llama_context_default_params", lambda: changed)
    with pytest.raises(UnsupportedError, match="interface we do not know"):
        LlamaCpp(model)
    monkeypatch.undo()
    wrong = library.call.llama_context_default_params()
    monkeypatch.setattr(library, "context_parameters", lambda context, batch: wrong)
    with pytest.raises(UnsupportedError, match="interface we do not know"):
        LlamaCpp(model, context=1024)
    with pytest.raises(UnsupportedError, match="F32 cache"):
        LlamaCpp(model, context=512)


def test_an_absent_wheel_names_its_extra(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp_library.importlib.util, "find_spec", lambda name: None)
    llama_cpp_library.load_library.cache_clear()
    try:
        with pytest.raises(MissingExtraError, match="llamacpp"):
            LlamaCpp(model)
    finally:
        monkeypatch.undo()
        llama_cpp_library.load_library.cache_clear()


def test_a_deep_model(tmp_path: Path) -> None:
    """The runtime's log grows with the layers; what is read from it must not be pushed out."""
    with LlamaCpp(make_gguf(tmp_path / "deep.gguf", layers=120), context=64, threads=1) as deep:
        assert np.isfinite(deep.logits([1, 2, 3])).all()


def test_quiet_and_no_leak(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def once() -> None:
        with LlamaCpp(model, context=512) as llama:
            llama.logits([1, 2, 3])

    for _ in range(5):
        once()
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(60):
        once()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 20_000, f"{grown} kB more after 60 models"
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""
