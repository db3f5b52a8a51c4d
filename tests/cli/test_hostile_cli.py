"""The command line on hostile models: exit code, message with file, tensor and remedy, at once, nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_quantize.cli import run
from llm_quantize.errors import IntegrityError
from tests.models.test_hostile_checkpoint import CASES as CHECKPOINT_CASES
from tests.safetensors_by_hand import write_tensors

HIDDEN, HEADS, KV_HEADS, INNER, LAYERS, VOCABULARY = 32, 4, 2, 64, 2, 2048
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_hidden_layers": LAYERS,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def weights() -> dict[str, np.ndarray]:
    """A small Llama's tensors, bfloat16 bits of harmless values."""
    rng = np.random.default_rng(1)

    def tensor(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)

    kv = HIDDEN // HEADS * KV_HEADS
    arrays = {"model.embed_tokens.weight": tensor(VOCABULARY, HIDDEN), "model.norm.weight": tensor(HIDDEN)}
    for layer in range(LAYERS):
        shapes = {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (kv, HIDDEN),
            "self_attn.v_proj": (kv, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }
        arrays |= {f"model.layers.{layer}.{name}.weight": tensor(*shape) for name, shape in shapes.items()}
    return {**arrays, "lm_head.weight": tensor(VOCABULARY, HIDDEN)}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Path:
    """A right model, whose files the cases link to."""
    place = tmp_path_factory.mktemp("good")
    write_tensors(place / "model.safetensors", weights())
    (place / "config.json").write_text(json.dumps(CONFIG))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (place / name).write_bytes((demo_model / name).read_bytes())
    return place


def copied(good: Path, place: Path) -> Path:
    place.mkdir(parents=True)
    for path in good.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    return place


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, the JSON object, and the same call's text for people."""
    code = run([*words, "--json"])
    out = capsys.readouterr().out
    result = json.loads(out)
    plain = run(words)
    text = capsys.readouterr()
    assert plain == code
    return code, result, text.err


def check_refusal(result: dict[str, Any], text: str, code: int) -> None:
    """What every message owes: code, what, file and remedy; no traceback, no control characters, not endless."""
    assert result["exit_code"] == code
    assert result["what"]
    assert code == 9 or result["file"]  # numbers are told by tensor, with the source tensor's name
    assert result["remedy"]
    assert "Traceback" not in text
    assert "\x1b" not in text
    assert len(text) < 4000


@pytest.fixture(scope="module", autouse=True)
def imports_done(good: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What a first call imports does not count as the time of a refusal."""
    assert run(["--json", "quantize", str(good), "-q", "Q8_0", "-o", str(tmp_path_factory.mktemp("first"))]) == 0


DESCRIBED = ("already gptq", "already awq", "already mxfp4", "already quantized, inner")


@pytest.mark.parametrize("kind", CHECKPOINT_CASES)
def test_broken_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    case = CHECKPOINT_CASES[kind]
    place, out = tmp_path / "model", tmp_path / "out"
    case.make(place)
    began = time.process_time()
    code, result, text = call(capsys, "quantize", str(place), "gguf", "-q", "Q4_K_M", "-o", str(out))
    assert time.process_time() - began < 2  # two calls
    # A configuration may say that a model is quantized when nothing in it is; to info that is a fact like another.
    refused = IntegrityError.exit_code if kind in DESCRIBED else case.exit_code
    assert (code, result["file"]) == (refused, str(place / case.file))
    check_refusal(result, text, refused)
    assert case.tensor in (None, result.get("tensor"))
    assert not case.offset or "offset" in result
    assert not out.exists()
    assert run(["--json", "info", str(place)]) == (0 if kind in DESCRIBED else case.exit_code)
    assert run(["--json", "plan", str(place), "-q", "Q8_0"]) == refused


@dataclass(frozen=True)
class Meaning:
    """A model whose files are well-formed and do not fit one another. ``names``: words that the message must hold."""

    change: Callable[[Path], object]
    exit_code: int
    file: str
    names: tuple[str, ...] = ()
    tensor: str | None = None


def config(**changes: Any) -> Callable[[Path], object]:
    """config.json with ``changes`` (``...`` deletes)."""

    def change(place: Path) -> None:
        known = {**CONFIG, **changes}
        (place / "config.json").write_text(json.dumps({k: v for k, v in known.items() if v is not ...}))

    return change


def tensors(*without: str, settings: dict[str, Any] | None = None, **more: Any) -> Callable[[Path], object]:
    """The weights without some, with ``more`` ("__" stands for a dot)."""

    def change(place: Path) -> None:
        arrays = {name: array for name, array in weights().items() if name not in without}
        arrays |= {name.replace("__", "."): array for name, array in more.items()}
        write_tensors(place / "model.safetensors", arrays)
        config(**(settings or {}))(place)

    return change


def tokenizer(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def apply(place: Path) -> None:
        known = json.loads((place / "tokenizer.json").read_text())
        change(known)
        (place / "tokenizer.json").write_text(json.dumps(known))

    return apply


def content(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda place: (place / name).write_bytes(data)


def without_files(*names: str) -> Callable[[Path], object]:
    return lambda place: [(place / name).unlink(missing_ok=True) for name in names]


def poisoned(value: float, dtype: str = "BF16") -> Callable[[Path], object]:
    """One bad value in the middle of a weight."""

    def change(place: Path) -> None:
        arrays = weights()
        name = "model.layers.1.mlp.up_proj.weight"
        bits = int(np.array(value, np.float32).view(np.uint32)) >> 16
        arrays[name] = arrays[name].copy()
        arrays[name][5, 7] = bits
        write_tensors(place / "model.safetensors", arrays)

    return change


def link(name: str) -> Callable[[Path], object]:
    """The file replaced by a link to a copy outside the model."""

    def change(place: Path) -> None:
        outside = place.parent / "secret"
        (place / name).rename(outside)
        (place / name).symlink_to(outside)

    return change


def fifo(name: str) -> Callable[[Path], object]:
    def change(place: Path) -> None:
        (place / name).unlink(missing_ok=True)
        os.mkfifo(place / name)

    return change


SAFE, CONF, TOK = "model.safetensors", "config.json", "tokenizer.json"
UP1 = "model.layers.1.mlp.up_proj.weight"
EXTRA_LAYER = {
    name.replace("layers.1.", "layers.2.").replace(".", "__"): array
    for name, array in weights().items()
    if ".layers.1." in name
}
MEANINGS: dict[str, Meaning] = {
    "more layers than weights": Meaning(config(num_hidden_layers=3), 3, "", ("layers.2.",)),
    "fewer layers than weights": Meaning(config(num_hidden_layers=1), 3, SAFE, ("layers.1.",)),
    "a layer too many in the file": Meaning(tensors(**EXTRA_LAYER), 3, SAFE, ("layers.2.",)),
    **{f"layers {n!r}": Meaning(config(num_hidden_layers=n), 3, CONF, ("num_hidden_layers",))
       for n in (0, -1, 1.5, "2", True, None, 10**30, 10**9)},
    "layers absent": Meaning(config(num_hidden_layers=...), 3, CONF, ("num_hidden_layers",)),
    **{f"heads {n!r}": Meaning(config(num_attention_heads=n), 3, CONF, ("num_attention_heads",))
       for n in (0, -4, 10**20, [4])},
    "heads that do not divide": Meaning(
        config(num_attention_heads=5, num_key_value_heads=5), 3, CONF, ("hidden_size",)
    ),
    **{f"kv heads {n!r}": Meaning(config(num_key_value_heads=n), 3, CONF, ("num_key_value_heads",)) for n in (0, 3, 8)},
    "hidden size 0": Meaning(config(hidden_size=0), 3, CONF, ("hidden_size",)),
    "hidden size of another model": Meaning(config(hidden_size=64), 3, SAFE),
    "inner size of another model": Meaning(config(intermediate_size=96), 3, SAFE),
    "norm eps a string": Meaning(config(rms_norm_eps="1e-5"), 3, CONF, ("rms_norm_eps",)),
    "unknown activation": Meaning(config(hidden_act="evil"), 4, CONF, ("evil",)),
    "unknown rope": Meaning(config(rope_scaling={"rope_type": "evil", "factor": 2.0}), 4, CONF, ("evil",)),
    "rope factor 0": Meaning(config(rope_scaling={"rope_type": "linear", "factor": 0}), 3, CONF, ("factor",)),
    "vocabulary beyond embedding": Meaning(config(vocab_size=4096), 3, SAFE, ("2048",)),
    "vocabulary below embedding": Meaning(config(vocab_size=1024), 3, SAFE, ("1024",)),
    "unknown architecture": Meaning(config(model_type="lama"), 4, CONF, ("lama", "'llama'")),
    "hostile architecture name": Meaning(config(model_type="\x1b[2J" + "x" * 5000), 4, CONF),
    "architecture absent": Meaning(config(model_type=...), 3, CONF, ("model_type",)),
    "architecture a list": Meaning(config(model_type=["llama"]), 3, CONF, ("model_type",)),
    "untied without lm_head": Meaning(tensors("lm_head.weight"), 3, "", ("lm_head.weight",)),
    **{f"without {name}": Meaning(tensors(name), 3, "", (name,)) for name in ("model.norm.weight", UP1)},
    "unknown tensor": Meaning(tensors(**{"model__layers__0__evil__weight": np.ones(3, np.float32)}), 3, SAFE,
                              ("model.layers.0.evil.weight",)),
    "weight of integers": Meaning(tensors(UP1, **{UP1.replace(".", "__"): np.ones((INNER, HIDDEN), np.int64)}), 4, SAFE,
                                  ("I64",), UP1),
    "weight of another shape": Meaning(
        tensors(UP1, **{UP1.replace(".", "__"): np.ones((INNER, 3), np.float32)}), 3, SAFE, (), UP1
    ),
    "NaN in a weight": Meaning(
        poisoned(float("nan")), 9, "", (UP1, "row 5, column 7", "1 such"), "blk.1.ffn_up.weight"
    ),
    "infinity in a weight": Meaning(poisoned(float("inf")), 9, "", (UP1, "row 5, column 7"), "blk.1.ffn_up.weight"),
    # tokenizer
    "no tokenizer": Meaning(without_files(TOK, "tokenizer_config.json"), 3, "", ("tokenizer",)),
    "tokenizer not JSON": Meaning(content(TOK, b"{"), 3, TOK),
    "tokenizer empty": Meaning(content(TOK, b""), 3, TOK),
    "tokenizer a list": Meaning(content(TOK, b"[]"), 3, TOK),
    "tokenizer BOM": Meaning(content(TOK, b"\xef\xbb\xbf{}"), 3, TOK, ("byte order mark",)),
    "tokenizer deep": Meaning(content(TOK, b"[" * 200_000), 3, TOK, ("deeply",)),
    "tokenizer without model": Meaning(tokenizer(lambda t: t.pop("model")), 3, TOK),
    "tokenizer of unknown kind": Meaning(tokenizer(lambda t: t["model"].update(type="Evil")), 4, TOK, ("Evil",)),
    "unknown pre-tokenizer": Meaning(
        tokenizer(lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="evil+")), 4, TOK, ("evil+",)
    ),
    "pre-tokenizer a number": Meaning(tokenizer(lambda t: t.update(pre_tokenizer=5)), 3, TOK),
    "vocabulary a list": Meaning(tokenizer(lambda t: t["model"].update(vocab=[1, 2])), 3, TOK),
    "token id negative": Meaning(tokenizer(lambda t: t["model"]["vocab"].update(evil=-5)), 3, TOK, ("evil",)),
    "token id a float": Meaning(tokenizer(lambda t: t["model"]["vocab"].update(evil=1.5)), 3, TOK, ("evil",)),
    "token id huge": Meaning(tokenizer(lambda t: t["model"]["vocab"].update(evil=10**18)), 3, TOK),
    "more tokens than rows": Meaning(tokenizer(lambda t: t["model"]["vocab"].update(evil=5000)), 3, TOK),
    "two tokens, one id": Meaning(tokenizer(lambda t: t["model"]["vocab"].update(evil=7)), 3, TOK),
    "merges a number": Meaning(tokenizer(lambda t: t["model"].update(merges=5)), 3, TOK),
    "merge of three": Meaning(tokenizer(lambda t: t["model"]["merges"].append(["a", "b", "c"])), 3, TOK),
    "added tokens an object": Meaning(tokenizer(lambda t: t.update(added_tokens={})), 3, TOK),
    "added token without id": Meaning(tokenizer(lambda t: t["added_tokens"].append({"content": "x"})), 3, TOK),
    "tokenizer_config not JSON": Meaning(content("tokenizer_config.json", b"{"), 3, "tokenizer_config.json"),
    "chat template not UTF-8": Meaning(content("chat_template.jinja", b"\xff\xfe"), 3, "chat_template.jinja"),
    "tokenizer.model garbage": Meaning(
        lambda place: (without_files(TOK)(place), content("tokenizer.model", b"\xff" * 50)(place)), 3, "tokenizer.model"
    ),
    "tokenizer a FIFO": Meaning(fifo(TOK), 3, TOK, ("regular",)),
    "tokenizer_config a FIFO": Meaning(fifo("tokenizer_config.json"), 3, "tokenizer_config.json", ("regular",)),
    "chat template a FIFO": Meaning(fifo("chat_template.jinja"), 3, "chat_template.jinja", ("regular",)),
    "tokenizer a link outside": Meaning(link(TOK), 6, TOK, ("outside",)),
    "tokenizer_config a link outside": Meaning(link("tokenizer_config.json"), 6, "tokenizer_config.json", ("outside",)),
    "generation_config a link outside": Meaning(
        link("generation_config.json"), 6, "generation_config.json", ("outside",)
    ),
    "card a link outside": Meaning(
        lambda place: (content("README.md", b"---\nlicense: mit\n---\n")(place), link("README.md")(place)),
        6,
        "README.md",
        ("outside",),
    ),
    "chat template a link outside": Meaning(
        lambda place: (content("chat_template.jinja", b"x")(place), link("chat_template.jinja")(place)),
        6,
        "chat_template.jinja",
        ("outside",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MEANINGS)
def test_files_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str], good: Path, kind: str) -> None:
    case = MEANINGS[kind]
    place, out = copied(good, tmp_path / "model"), tmp_path / "out"
    case.change(place)
    began = time.process_time()
    code, result, text = call(capsys, "quantize", str(place), "gguf", "-q", "Q8_0", "-o", str(out))
    assert time.process_time() - began < 2  # two calls
    check_refusal(result, text, case.exit_code)
    assert code == case.exit_code, text
    assert result.get("file", "").endswith(case.file)
    assert code == 9 or str(tmp_path) in result["file"]
    for name in case.names:
        assert name in json.dumps(result, ensure_ascii=False), text
    assert case.tensor in (None, result.get("tensor"))
    assert not list(out.glob("*.gguf"))


@pytest.mark.parametrize("name", ["nowhere-\udcff", "with\nnewline", "\x1b[2J", "名前"])
def test_strange_names_of_models(tmp_path: Path, capsys: pytest.CaptureFixture[str], good: Path, name: str) -> None:
    _, result, text = call(capsys, "info", str(tmp_path / name))
    check_refusal(result, text, 2)
    copied(good, tmp_path / name)
    code = run(["--json", "quantize", str(tmp_path / name), "-q", "Q8_0", "-o", str(tmp_path / "out")])
    assert code == 0, capsys.readouterr().out


HARMLESS: dict[str, Callable[[Path], object]] = {
    "as it is": lambda _place: None,
    "rotary tables": tensors(**{"model__layers__0__self_attn__rotary_emb__inv_freq": np.ones(4, np.float32)}),
    "tied with the same lm_head": tensors(
        "lm_head.weight",
        settings={"tie_word_embeddings": True},
        lm_head__weight=weights()["model.embed_tokens.weight"],
    ),
    "tied without lm_head": tensors("lm_head.weight", settings={"tie_word_embeddings": True}),
    "tied with another lm_head, which is kept as transformers does": config(tie_word_embeddings=True),
    "no generation_config": without_files("generation_config.json"),
    "endless chat template": content("chat_template.jinja", b"{% for i in range(10**12) %}x{% endfor %}"),
    "code beside it": lambda place: (
        config(auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, trust_remote_code=True)(
            place
        ),
        content("evil.py", b"raise SystemExit(99)")(place),
        content("pytorch_model.bin", b"\x80\x04.")(place),
    ),
    "a card that is not YAML": content("README.md", b"---\n\t{[\xff\n---\n"),
    "a card of a million brackets": content("README.md", b"---\n" + b"[" * 1_000_000 + b"\n---\n"),
    "a card of brackets": content("README.md", b"---\n" + b"[" * 30_000 + b"\n---\n"),
    "a card of many lines": content("README.md", b"---\n" + b"a: [1, 2]\n" * 90_000 + b"\n---\n"),
    "a card that grows": content("README.md", b"---\na: &a [x,x]\n" + b"b: [*a,*a,*a]\n" * 30 + b"---\n"),
    "a card in a FIFO": fifo("README.md"),
    "a card that asks for objects": content("README.md", b"---\nlicense: !!python/object/apply:os.abort []\n---\n"),
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_odd_but_right(tmp_path: Path, capsys: pytest.CaptureFixture[str], good: Path, kind: str) -> None:
    place = copied(good, tmp_path / "model")
    HARMLESS[kind](place)
    began = time.process_time()
    code = run(["--json", "quantize", str(place), "-q", "Q8_0", "-o", str(tmp_path / "out")])
    assert time.process_time() - began < 2
    out = capsys.readouterr().out
    assert code == 0, out
    path = Path(json.loads(out)["artifacts"][0]["path"])
    settings = json.loads((place / "config.json").read_text())
    has_output = b"\x0d\0\0\0\0\0\0\0output.weight" in path.read_bytes()
    assert has_output == (not settings["tie_word_embeddings"] or kind.startswith("tied with another"))


def test_only_the_model_and_the_output_are_opened_and_nothing_of_it_runs(tmp_path: Path, good: Path) -> None:
    """The whole job under an audit hook: files, imports, code, processes, sockets."""
    place = copied(good, tmp_path / "model")
    HARMLESS["code beside it"](place)
    HARMLESS["a card that asks for objects"](place)
    code = """
        import os, sys
        model, out = sys.argv[1:3]
        allowed = [model, out, *map(os.path.realpath, (sys.prefix, sys.base_prefix)), *sys.path[1:]]
        allowed += ["/proc", "/sys", "/dev/null", "/dev/urandom", os.path.realpath(sys.argv[3])]
        allowed += [os.path.realpath(os.environ["LLM_QUANTIZE_CACHE"])]  # our own: what was read and found the same
        bad = []
        def watch(event, facts):
            if event in ("open", "os.listdir", "os.scandir") and isinstance(facts[0], (str, bytes)):
                path = os.path.realpath(os.fsdecode(facts[0]))
                if not any(path == place or path.startswith(place + os.sep) for place in allowed if place):
                    bad.append((event, path))
                if path.startswith(model) and path.endswith((".py", ".bin", ".pt")):
                    bad.append((event, path))
            elif event == "exec" and str(getattr(facts[0], "co_filename", "")).startswith(model):
                bad.append((event, str(facts[0])))
            elif event in ("subprocess.Popen", "os.system", "os.exec", "socket.connect", "pickle.find_class"):
                bad.append((event, str(facts)))
        sys.addaudithook(watch)
        from llm_quantize.cli import run
        code = run(["--json", "quantize", model, "-q", "Q4_K_M", "-o", out])
        print(*bad, sep="\\n", file=sys.stderr)
        sys.exit(98 if bad else code)
    """
    import llm_quantize

    source = Path(llm_quantize.__file__).parent
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(code), str(place), str(tmp_path / "out"), str(source)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 20, done.stderr[-3000:]  # its rows do not divide into blocks of 256
