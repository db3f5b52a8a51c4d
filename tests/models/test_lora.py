"""Adapters merged while a model is read: exact, the same in any pieces, part of what an artifact is; hostile ones."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest

from llm_quantize import api, events
from llm_quantize.artifacts.manifest import read_manifest
from llm_quantize.artifacts.verify import verify
from llm_quantize.cli import run
from llm_quantize.compare.making import make_words
from llm_quantize.errors import (
    IntegrityError,
    LlmQuantizeError,
    MalformedInputError,
    NetworkError,
    NumericPolicyError,
    UnsupportedError,
    UsageError,
)
from llm_quantize.formats import expressions
from llm_quantize.io.artifact_paths import manifest_path
from llm_quantize.io.gguf_file import read_gguf
from llm_quantize.models import lora as module
from llm_quantize.models.low_rank import cut, laid_out, product
from llm_quantize.models.opening import open_model, open_source
from llm_quantize.options import MethodOptions, Options
from llm_quantize.pipeline import plan, quantize
from tests.fake_hub import COMMIT, FakeHub
from tests.faults.tiny_llama import write_fp8_llama, write_tiny_llama
from tests.io.torch_by_hand import name as global_name
from tests.io.torch_by_hand import state_dict, write_zip
from tests.models.adapters import Arrays, attention, factors, write_adapter
from tests.models.test_hub import point_to
from tests.oracles.low_rank import exact_sum

Q = "model.layers.0.self_attn.q_proj"
A, B = f"base_model.model.{Q}.lora_A.weight", f"base_model.model.{Q}.lora_B.weight"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("lora") / "tiny")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("lora") / "adapter", factors(attention()))


def floats(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def made(model: Path, place: Path, *lora: object, format: str = "gguf", level: str = "Q8_0", **options: Any) -> bytes:
    (result,) = quantize(
        str(model), format, levels=[level], output_dir=place, lora=[*map(str, lora)], options=Options(**options)
    )
    path = result.path if result.path.is_file() else result.path / "model.safetensors"
    return path.read_bytes()


def test_products_are_exact_sums_in_any_order() -> None:
    """Bits of the product do not change with the order of the rank, and it is near the exact one."""
    random = np.random.default_rng(0)
    for rank in (1, 2, 3, 16, 200):
        b = (random.standard_normal((7, rank)) * 10.0 ** random.integers(-9, 9, (7, rank))).astype(np.float32)
        a = (random.standard_normal((5, rank)) * 10.0 ** random.integers(-9, 9, (5, rank))).astype(np.float32)
        b[3], a[2] = 0, np.float32(1e-45)
        found = product(cut(b), laid_out(cut(a)))
        for _ in range(3):
            order = random.permutation(rank)
            again = product(cut(b[:, order]), laid_out(cut(a[:, order])))
            assert again.tobytes() == found.tobytes()
        assert np.array_equal(product(cut(a), laid_out(cut(b))).T, found)
        twin = exact_sum(np.zeros((7, 5)), b, a.T, 1.0)
        for i, j in itertools.product(range(7), range(5)):
            largest = Fraction(float(abs(b[i]).max())) * Fraction(float(abs(a[j]).max())) * rank
            assert abs(Fraction(found[i, j]) - twin[i][j]) <= largest / 2**38, (rank, i, j)


def test_what_is_read_is_the_exact_sum_rounded(model: Path, adapter: Path) -> None:
    tensors = factors(attention())
    with open_model(str(model)) as plain, open_model(str(model), lora=[f"{adapter}=0.375"]) as merged:
        weight = floats(plain.read_rows(f"{Q}.weight", 0, 5))
        found = merged.read_rows(f"{Q}.weight", 0, 5)
        assert found.dtype == np.float32 == merged.stored_dtype(f"{Q}.weight")
        twin = exact_sum(weight[:, :40], tensors[B][:5], tensors[A][:, :40], 0.375 * 8 / 4)
        for i, j in itertools.product(range(5), range(40)):
            nearest = abs(Fraction(float(np.spacing(found[i, j])))) / 2
            assert abs(Fraction(float(found[i, j])) - twin[i][j]) <= nearest * Fraction(1001, 1000)
        untouched = "model.layers.0.mlp.up_proj.weight"
        assert merged.read_rows(untouched, 0, 9).tobytes() == plain.read_rows(untouched, 0, 9).tobytes()
        assert merged.stored_dtype(untouched) == plain.stored_dtype(untouched)


@pytest.mark.parametrize("dora", [False, True])
def test_any_pieces_either_way_are_the_same_bits(
    model: Path, tmp_path: Path, dora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = factors(attention())
    embedding = "base_model.model.model.embed_tokens"
    random = np.random.default_rng(3)
    tensors[f"{embedding}.lora_embedding_A"] = random.standard_normal((4, 320)).astype(np.float32)
    tensors[f"{embedding}.lora_embedding_B"] = random.standard_normal((256, 4)).astype(np.float32)
    if dora:
        for key in [*tensors]:
            if key.endswith(("lora_B.weight", "lora_embedding_B")):
                front = key.removesuffix("lora_B.weight").removesuffix("lora_embedding_B")
                tensors[f"{front}lora_magnitude_vector"] = random.uniform(0.5, 2, 256).astype(np.float32)
    adapter = write_adapter(tmp_path / "adapter", tensors, use_dora=dora)
    for name in (f"{Q}.weight", "model.embed_tokens.weight"):
        wholes = []
        for block, transpose in itertools.product((1, 999, 1 << 18), (False, True)):
            monkeypatch.setattr(module, "_BLOCK_WEIGHTS", block)
            with open_model(str(model), lora=[str(adapter)]) as merged:
                rows = merged.matrix(name, transpose=transpose)[0]
                for step in (rows, 7, 100):
                    parts = [
                        merged.read_rows(name, at, min(rows, at + step), transpose=transpose)
                        for at in range(0, rows, step)
                    ]
                    whole = np.concatenate(parts)
                    wholes.append((whole.T if transpose else whole).tobytes())
                if not transpose:
                    wholes.append(bytes(merged.raw_rows(name, 0, rows, buffer=bytearray(4 * 320 * 256))))
        assert len(set(wholes)) == 1


def test_threads_and_processes_change_no_byte(model: Path, adapter: Path, tmp_path: Path) -> None:
    found = made(model, tmp_path / "a", adapter, level="Q4_K_M", threads=1)
    assert made(model, tmp_path / "b", adapter, level="Q4_K_M", threads=3) == found
    assert made(model, tmp_path / "c", f"{adapter}=1", level="Q4_K_M", engine="processes", threads=2) == found
    assert made(model, tmp_path / "d", level="Q4_K_M") != found


def test_no_copy_is_written_and_the_name_says_it(model: Path, adapter: Path, tmp_path: Path) -> None:
    made(model, tmp_path / "out", adapter)
    assert {path.name.partition(".gguf")[0] for path in (tmp_path / "out").iterdir()} == {"tiny-adapter-Q8_0"}
    file = read_gguf(tmp_path / "out" / "tiny-adapter-Q8_0.gguf")
    assert file.metadata["llm_quantize.adapters"].value == "the adapter adapter (LoRA)"


def test_the_manifest_and_the_card_say_what_was_merged(model: Path, adapter: Path, tmp_path: Path) -> None:
    made(model, tmp_path, f"{adapter}=0.5", format="safetensors", level="F16")
    place = tmp_path / "tiny-adapter-F16"
    manifest = read_manifest(manifest_path(place))
    assert manifest is not None
    (entry,) = manifest["identity"]["adapters"]
    assert (entry["name"], entry["scale"], entry["kind"]) == ("adapter", 0.5, "LoRA")
    assert "`tiny` with the adapter adapter (LoRA, 0.5 of it), quantized by" in (place / "README.md").read_text()
    assert str(adapter.parent) not in (place / "README.md").read_text() + json.dumps(manifest)


@pytest.mark.parametrize("format", ["gguf", "safetensors"])
def test_another_adapter_is_another_source(model: Path, adapter: Path, tmp_path: Path, format: str) -> None:
    level = {"gguf": "Q8_0", "safetensors": "F16"}[format]
    more = {"name": "x"}

    def again(*lora: str) -> str:
        return quantize(str(model), format, levels=[level], output_dir=tmp_path, lora=lora, **more)[0].status

    assert again(str(adapter)) == "written"
    assert again(str(adapter)) == again(f"{adapter}=1.0") == "already complete"
    for lora in ([], [f"{adapter}=0.5"], [str(adapter)] * 2):
        with pytest.raises(IntegrityError, match="the source changed") as caught:
            again(*lora)
        assert caught.value.remedy
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    other = write_adapter(copy, factors(attention(), seed=1))
    with pytest.raises(IntegrityError, match=r"weights changed|source changed"):
        again(str(other))


def test_measurements_are_kept_apart(model: Path, adapter: Path, tmp_path: Path) -> None:
    def content(*lora: str) -> str:
        source = open_source(str(model), lora=lora)
        with source.checkpoint:
            return source.content()

    seen = [content(), content(str(adapter)), content(f"{adapter}=0.5"), content(str(adapter), str(adapter))]
    other = write_adapter(tmp_path / "adapter", factors(attention(), seed=1))
    settings = write_adapter(tmp_path / "b" / "adapter", factors(attention()), lora_alpha=9)
    assert len({*seen, content(str(other)), content(str(settings))}) == 6
    assert content(str(adapter)) == seen[1]


def test_verify_against_the_merged_source(model: Path, adapter: Path, tmp_path: Path) -> None:
    made(model, tmp_path, adapter)
    path = tmp_path / "tiny-adapter-Q8_0.gguf"
    assert verify(path, source=str(model), lora=[str(adapter)]).ok
    assert api.verify(path, source=model, lora=adapter).ok
    found = verify(path, source=str(model))
    assert not found.ok


def test_verify_says_where_adapters_are_missing(model: Path, adapter: Path, tmp_path: Path) -> None:
    made(model, tmp_path, adapter)
    (artifact,) = tmp_path.glob("*.gguf")
    for lora, told in ([], 1), ([str(adapter)], 0), ([f"{adapter}=0.5"], 1):
        heard: list[Any] = []
        verify(artifact, source=str(model), lora=lora, on_event=heard.append)
        cautions = [one.text for one in heard if isinstance(one, events.Caution) and "says that adapters" in one.text]
        assert len(cautions) == told
        assert all("the adapter adapter (LoRA)" in text for text in cautions)


def test_a_changed_adapter_is_noticed(model: Path, tmp_path: Path) -> None:
    own = write_adapter(tmp_path / "adapter", factors(attention()))
    with open_model(str(model), lora=[str(own)]) as merged:
        write_adapter(own, factors(attention(), seed=1))
        with pytest.raises(IntegrityError, match="changed"):
            merged.read_rows(f"{Q}.weight", 0, 1)


def test_a_plan_reads_no_weights(model: Path, adapter: Path) -> None:
    (artifact,) = plan(str(model), levels=["Q4_K_M"], lora=[str(adapter)])
    assert artifact.name.startswith("tiny-adapter")
    with (
        open_model(str(model), lora=[str(adapter)], headers_only=True) as merged,
        pytest.raises(UsageError, match="headers only"),
    ):
        merged.read_rows(f"{Q}.weight", 0, 1)


def test_memory_is_what_is_said(tmp_path: Path) -> None:
    """What one thread holds while it reads rows of a merged matrix, beside them and what the model itself takes."""
    import tracemalloc

    shapes = {"model.layers.0.mlp.down_proj": (256, 4096)}
    place = write_tiny_llama(tmp_path / "wide", inner=4096)
    adapter = write_adapter(tmp_path / "adapter", factors(shapes, rank=64), rank=64)
    name = "model.layers.0.mlp.down_proj.weight"
    with open_model(str(place)) as plain, open_model(str(place), lora=[str(adapter)]) as merged:
        merged.read_rows(name, 0, 1)
        for transpose in (False, True):
            merged._local.right = None  # type: ignore[attr-defined]
            rows = 128
            tracemalloc.start()
            merged.read_rows(name, 0, rows, transpose=transpose)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            own = rows * merged.matrix(name, transpose=transpose)[1] * 4
            assert peak - own < merged.scratch - plain.scratch


def test_sources_that_are_not_plain_directories(model: Path, adapter: Path, tmp_path: Path) -> None:
    """A GGUF file, FP8, GPTQ and AWQ-like packed codes: merged into the values that they decode to."""
    made(model, tmp_path, level="Q6_K")
    made(model, tmp_path, format="gptq", level="4bit", method=MethodOptions(method="rtn", transform="none"))
    fp8 = write_fp8_llama(tmp_path / "tiny-fp8")
    shape = {Q: (256, 256)}
    small = write_adapter(tmp_path / "small", factors(shape))
    tensors = factors(shape)
    for place in (tmp_path / "tiny-Q6_K.gguf", tmp_path / "tiny-GPTQ-4bit", fp8):
        with open_model(str(place)) as plain, open_model(str(place), lora=[str(small)]) as merged:
            rows, columns = plain.matrix(f"{Q}.weight")
            if (rows, columns) != (256, 256):
                pytest.fail(f"{place} has another shape")
            before = plain.read_rows(f"{Q}.weight", 0, rows)
            expected = before + 2.0 * (tensors[B].astype(np.float64) @ tensors[A])
            np.testing.assert_allclose(merged.read_rows(f"{Q}.weight", 0, rows), expected, rtol=1e-6, atol=1e-5)
            assert merged.tensors[f"{Q}.weight"].dtype == "F32"
            assert merged.kind == plain.kind
        again = made(place, tmp_path / "out", small, level="Q8_0")
        assert again != made(place, tmp_path / "plain", level="Q8_0")


def test_from_the_command_line(model: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = ["--lora", f"{adapter}=0.5"]
    assert run(["--json", "quantize", str(model), "-q", "Q8_0", "-o", str(tmp_path), *lora]) == 0
    captured = capsys.readouterr()
    path = json.loads(captured.out)["artifacts"][0]["path"]
    assert "the adapter adapter (LoRA, 0.5 of it) is merged into 4 tensors" in captured.err
    assert run(["--json", "verify", path, "--source", str(model), *lora]) == 0
    capsys.readouterr()
    assert run(["--json", "plan", str(model), "-q", "Q8_0", *lora]) == 0
    capsys.readouterr()
    assert run(["--json", "info", str(model), *lora]) == 0
    assert json.loads(capsys.readouterr().out)["adapters"] == ["the adapter adapter (LoRA, 0.5 of it)"]
    assert run(["--json", "quantize", str(model), "-q", "Q8_0", "--lora", "nowhere/at/all"]) == 2
    assert "--lora" in make_words("gguf", "Q8_0", Options(), None, lora=["x"])


Change = Callable[[Path], Any]


def settings(**changes: Any) -> Change:
    return lambda place: write_adapter(place, factors(attention()), **changes)


def tensors(change: Callable[[Arrays], Any], **more: Any) -> Change:
    def write(place: Path) -> None:
        arrays = factors(attention())
        change(arrays)
        write_adapter(place, arrays, **more)

    return write


def content(file: str, data: bytes, *gone: str) -> Change:
    def write(place: Path) -> None:
        write_adapter(place, factors(attention()))
        (place / file).write_bytes(data)
        for name in gone:
            (place / name).unlink()

    return write


def rebuilt(shapes: Mapping[str, tuple[int, int]], **more: Any) -> Change:
    return lambda place: write_adapter(place, factors(shapes), **more)


def bad(value: float) -> Change:
    def change(arrays: Arrays) -> None:
        arrays[A][2, 7] = value

    return tensors(change)


NONE = np.zeros((0, 256), np.float32)
HOSTILE: dict[str, tuple[Change, type[LlmQuantizeError], str]] = {
    "IA3": (settings(peft_type="IA3"), UnsupportedError, "IA3"),
    "LoHa": (settings(peft_type="LOHA"), UnsupportedError, "LOHA"),
    "VeRA": (settings(peft_type="VERA"), UnsupportedError, "VERA"),
    "prompt tuning": (settings(peft_type="PROMPT_TUNING"), UnsupportedError, "PROMPT_TUNING"),
    "no type": (settings(peft_type=None), UnsupportedError, "None"),
    "a type that is a list": (settings(peft_type=["LORA"]), UnsupportedError, "LORA"),
    "PiSSA": (settings(init_lora_weights="pissa_niter_4"), UnsupportedError, "pissa_niter_4"),
    "LoftQ": (settings(init_lora_weights="loftq"), UnsupportedError, "loftq"),
    "a start that is a list": (settings(init_lora_weights=[1]), UnsupportedError, "init_lora_weights"),
    "activated": (settings(alora_invocation_tokens=[1, 2]), UnsupportedError, "activated"),
    "layers repeated": (settings(layer_replication=[[0, 2], [1, 2]]), UnsupportedError, "repeated"),
    "QALoRA": (settings(use_qalora=True), UnsupportedError, "QALoRA"),
    "rows of the embedding": (settings(trainable_token_indices=[3]), UnsupportedError, "single rows"),
    "experts": (settings(target_parameters=["a.b"]), UnsupportedError, "experts"),
    "another base": (
        rebuilt({"model.layers.7.self_attn.q_proj": (256, 256)}, base_model_name_or_path="org/Other-7B"),
        UsageError, "org/Other-7B"),
    "another width": (
        rebuilt({Q: (512, 512)}, base_model_name_or_path="org/Other-7B"), UsageError, "org/Other-7B"),
    "another width and no name": (
        rebuilt({Q: (512, 512)}, base_model_name_or_path=None), UsageError, "does not name"),
    "another architecture": (rebuilt({"transformer.h.0.attn.c_attn": (768, 256)}), UsageError, "c_attn"),
    "a name that climbs": (rebuilt({"../../etc/passwd": (256, 256)}), UsageError, "passwd"),
    "a name of control characters": (rebuilt({"\x1b[2J.q_proj": (256, 256)}), UsageError, "x1b"),
    "A alone": (tensors(lambda arrays: arrays.pop(B)), MalformedInputError, "not a pair"),
    "B alone": (tensors(lambda arrays: arrays.pop(A)), MalformedInputError, "not a pair"),
    "A of a linear, B of an embedding": (
        tensors(lambda arrays: arrays.update({B.replace("lora_B.weight", "lora_embedding_B"): arrays.pop(B)})),
        MalformedInputError, "not a pair"),
    "twice": (
        tensors(lambda arrays: arrays.update({A.removeprefix("base_model.model."): arrays[A]})),
        UnsupportedError, "twice"),
    "turned": (
        tensors(lambda arrays: arrays.update({A: np.ascontiguousarray(arrays[A].T)})), MalformedInputError, "rank"),
    "another rank in B": (
        tensors(lambda arrays: arrays.update({B: arrays[B][:, :3].copy()})), UsageError, "does not fit"),
    "rank 0": (
        tensors(lambda arrays: arrays.update({A: NONE, B: NONE.T.copy()}), rank_pattern={"0.self_attn.q_proj": 0}),
        MalformedInputError, "rank"),
    "rank 0 for all": (settings(rank=0), MalformedInputError, "rank"),
    "another rank than said": (settings(r=5), MalformedInputError, "rank"),
    "a rank that is a text": (settings(r="4"), MalformedInputError, "rank"),
    "patterns that are a list": (settings(rank_pattern=[1]), MalformedInputError, "rank_pattern"),
    "a pattern that is none": (settings(rank_pattern={"(((": 4}), MalformedInputError, "("),
    "a pattern that takes for ever": (settings(alpha_pattern={"(a+)+\\1": 4}), MalformedInputError, ""),
    "a huge alpha": (settings(lora_alpha=1e300), MalformedInputError, "lora_alpha"),
    "an alpha of many digits": (settings(lora_alpha=10**400), MalformedInputError, ""),
    "an alpha that is a text": (settings(lora_alpha="16"), MalformedInputError, "lora_alpha"),
    "an alpha that is true": (settings(lora_alpha=True), MalformedInputError, "lora_alpha"),
    "NaN": (bad(np.nan), NumericPolicyError, "nan in row 2, column 7"),
    "infinite": (bad(-np.inf), NumericPolicyError, "-inf"),
    "integers": (
        tensors(lambda arrays: arrays.update({A: arrays[A].astype(np.int32)})), UnsupportedError, "I32"),
    "DoRA without lengths": (settings(use_dora=True), MalformedInputError, "DoRA"),
    "lengths without DoRA": (
        tensors(lambda arrays: arrays.update(
            {A.replace("lora_A.weight", "lora_magnitude_vector"): np.ones(256, np.float32)})),
        MalformedInputError, "DoRA"),
    "too many lengths": (
        tensors(lambda arrays: (arrays.pop(B.replace("0.self", "1.self")), arrays.pop(A.replace("0.self", "1.self")),
                                [arrays.pop(key) for key in [*arrays] if "o_proj" in key],
                                arrays.update({A.replace("lora_A.weight", "lora_magnitude_vector"):
                                               np.ones(257, np.float32)})), use_dora=True),
        UsageError, "does not fit"),
    "a bias where there is none": (
        tensors(lambda arrays: arrays.update({B.replace("weight", "bias"): np.ones(256, np.float32)})),
        UsageError, "bias"),
    "a bias of A": (
        tensors(lambda arrays: arrays.update({A.replace("weight", "bias"): np.ones(4, np.float32)})),
        UnsupportedError, "bias where there is none"),
    "a tensor of another kind": (
        tensors(lambda arrays: arrays.update({A.replace("lora_A", "lora_E"): np.ones(4, np.float32)})),
        UnsupportedError, "not known"),
    "a change of a norm": (
        tensors(lambda arrays: arrays.update(factors({"model.norm": (256, 1)}))), UnsupportedError, "no matrix"),
    "a norm of another size": (
        tensors(lambda arrays: arrays.update({"base_model.model.model.norm.weight": np.ones(255, np.float32)})),
        UsageError, "does not fit"),
    "a larger vocabulary": (
        tensors(lambda arrays: arrays.update(
            {"base_model.model.model.embed_tokens.weight": np.ones((321, 256), np.float32)})),
        UsageError, "[321, 256]"),
    "nothing": (tensors(lambda arrays: arrays.clear()), MalformedInputError, "changes nothing"),
    "no weights": (content(CONFIG, b'{"peft_type": "LORA"}', WEIGHTS), MalformedInputError, "no weights"),
    "no settings": (content("x", b"", CONFIG), UsageError, "no adapter is here"),
    "settings that are no JSON": (content(CONFIG, b"{"), MalformedInputError, "JSON"),
    "settings that are a list": (content(CONFIG, b"[]"), MalformedInputError, "object"),
    "deep settings": (content(CONFIG, b'{"a":' * 5000), MalformedInputError, ""),
    "broken weights": (content(WEIGHTS, b"PK"), MalformedInputError, "too short"),
    "a pickle that runs": (
        lambda place: (content("x", b"", WEIGHTS)(place), write_zip(
            place / "adapter_model.bin", state_dict(a=global_name("os", "system") + b")R"))),
        UnsupportedError, "os.system"),
    "a link that leads outside": (
        lambda place: (content("x", b"", WEIGHTS)(place), (place / WEIGHTS).symlink_to("/etc/hostname")),
        LlmQuantizeError, "outside"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile(model: Path, tmp_path: Path, kind: str) -> None:
    write, error, says = HOSTILE[kind]
    place = tmp_path / "adapter"
    write(place)
    with pytest.raises(error) as caught:
        quantize(str(model), levels=["Q8_0"], lora=[str(place)], output_dir=tmp_path / "out")
    text = str(caught.value)
    assert says in text
    assert caught.value.file
    assert "\x1b" not in text
    assert not (tmp_path / "out").exists()
    if error is not NumericPolicyError:  # everything else is known from headers alone
        with pytest.raises(error):
            plan(str(model), levels=["Q8_0"], lora=[str(place)])


def test_patterns_without_number_are_refused_in_time(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = write_adapter(tmp_path / "many", factors(attention()), alpha_pattern={f"v{n}": 8 for n in range(20_000)})
    monkeypatch.setattr(expressions, "MOST_SECONDS", 0.05)
    with pytest.raises(MalformedInputError, match="take too long to match") as caught:
        plan(str(model), levels=["Q8_0"], lora=[str(place)])
    assert "fetch adapter_config.json again" in str(caught.value)


def test_the_first_pattern_that_fits_counts(model: Path, tmp_path: Path) -> None:
    settings = {"alpha_pattern": {"nothing": 3, "1.self_attn.q_proj": 16, "q_proj": 4, "[01].self_attn.[qo]_proj": 2}}
    place = write_adapter(tmp_path / "patterns", factors(attention()), **settings)
    with open_model(model, lora=[str(place)]) as opened:
        scales = [opened.changed[f"{name}.weight"].scaling for name in sorted(attention())]
    assert scales == [0.5, 1.0, 0.5, 4.0]


@pytest.mark.parametrize(
    ("text", "says"),
    [("", "no such adapter"), ("{}=", "scale"), ("{}=x", "scale"), ("{}=nan", "scale"), ("{}=inf", "scale"),
     ("=1", "scale"), ("/no/such", "no such adapter"), ("a/b/c", "no such adapter"), ("{}@main", "no revisions"),
     ("../x y/z", "no such adapter"), ("{}/adapter_config.json", "no adapter is here")],
)  # fmt: skip
def test_words_that_name_no_adapter(model: Path, adapter: Path, text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        open_model(str(model), lora=[text.replace("{}", str(adapter))])


def test_a_path_with_an_equals_sign(model: Path, tmp_path: Path) -> None:
    place = write_adapter(tmp_path / "lr=2e-4", factors(attention()))
    for text, scale in ((str(place), 1.0), (f"{place}=0.5", 0.5)):
        with open_model(str(model), lora=[text]) as merged:
            assert merged.adapters[0].scale == scale


def test_a_huge_scale_is_refused_by_whoever_writes(model: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(NumericPolicyError):
        made(model, tmp_path, f"{adapter}=1e38")
    with pytest.raises(UsageError, match="too large"):
        made(model, tmp_path, f"{adapter}=1e308")


def test_dora_after_another_adapter(model: Path, adapter: Path, tmp_path: Path) -> None:
    arrays = factors({Q: (256, 256)})
    arrays[A.replace("lora_A.weight", "lora_magnitude_vector")] = np.ones(256, np.float32)
    dora = write_adapter(tmp_path / "dora", arrays, use_dora=True)
    for pair in ([adapter, dora], [dora, adapter]):
        with pytest.raises(UsageError, match="DoRA and another") as caught:
            open_model(str(model), lora=[*map(str, pair)])
        assert caught.value.tensor == f"{Q}.weight"


def test_notes(model: Path, tmp_path: Path) -> None:
    """What is replaced whole has no scale; a tokenizer of the adapter's own is not taken."""
    arrays = {**factors(attention()), "base_model.model.model.norm.weight": np.full(256, 2, np.float32)}
    place = write_adapter(tmp_path / "adapter", arrays)
    shutil.copy(model / "tokenizer.json", place)
    with open_model(str(model), lora=[str(place)]) as merged:
        assert merged.notes == ()
        assert merged.read_rows("model.norm.weight", 0, 1).tolist() == [[2.0] * 256]
    (place / "chat_template.jinja").write_text("{{ x }}")
    with open_model(str(model), lora=[f"{place}=0.5"]) as merged:
        whole, own = merged.notes
        assert "model.norm.weight: replaced whole" in whole
        assert "chat_template.jinja of its own" in own


@pytest.fixture
def hub(adapter: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    files = {path.name: path.read_bytes() for path in adapter.iterdir()} | {"evil.py": b"x", "README.md": b"x"}
    with FakeHub(files) as found:
        point_to(found.url, monkeypatch)
        yield found
    huggingface_hub.close_session()


def test_an_adapter_of_the_hub(model: Path, adapter: Path, hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        open_model(str(model), lora=[f"org/model@{COMMIT}=0.5"]) as merged,
        open_model(str(model), lora=[f"{adapter}=0.5"]) as other,
    ):
        (merge,) = merged.adapters
        assert (merge.name, merge.revision, merge.scale) == ("org/model", COMMIT, 0.5)
        name = f"{Q}.weight"
        assert merged.read_rows(name, 0, 9).tobytes() == other.read_rows(name, 0, 9).tobytes()
    fetched = {path.rsplit("/", 1)[-1] for _, path in hub.requests if "/resolve/" in path}
    assert fetched == {CONFIG, WEIGHTS}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with open_model(str(model), lora=[f"org/model@{COMMIT}"]) as merged:
        assert merged.adapters[0].revision == COMMIT
    with pytest.raises(NetworkError, match="offline"):
        open_model(str(model), lora=["org/another"])


def test_a_repository_without_an_adapter(model: Path, monkeypatch: pytest.MonkeyPatch, hub: Any) -> None:
    hub.files.pop(CONFIG)
    with pytest.raises(UsageError, match="holds no adapter"):
        open_model(str(model), lora=["org/model"])


class Named:
    """A model of a name and a commit."""

    def __init__(self, name: str, revision: str | None) -> None:
        self.name, self.revision = name, revision


@pytest.mark.parametrize(
    ("base", "name", "outcome"),
    [
        ("org/Llama-3.2-1B", "meta-llama/Llama-3.2-1B", ""),
        ("unsloth/Meta-Llama-3.1-8B-bnb-4bit", "meta-llama/Llama-3.1-8B", ""),
        ("unsloth/llama-3.2-1b-unsloth-bnb-4bit", "meta-llama/Llama-3.2-1B", ""),
        ("org/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-1B", "refused"),
        ("org/Llama-3.1-1B", "meta-llama/Llama-3.2-1B", "refused"),
        ("/home/me/base", "meta-llama/Llama-3.2-1B", "told"),
    ],
)
def test_the_base_that_an_adapter_names(model: Path, tmp_path: Path, base: str, name: str, outcome: str) -> None:
    from llm_quantize.models.adapter import open_adapter

    heard: list[Any] = []
    place = write_adapter(tmp_path / "adapter", factors(attention()), base_model_name_or_path=base)
    adapter = open_adapter(str(place), heard.append)
    hub: Any = Named(name, COMMIT)
    if outcome == "refused":
        with pytest.raises(UsageError) as caught:
            module._check_base(adapter, hub, heard.append)
        assert base in str(caught.value)
        assert name in str(caught.value)
    else:
        module._check_base(adapter, hub, heard.append)
    assert bool(heard) == (outcome == "told")
    module._check_base(adapter, Named("some-directory", None), heard.append)  # type: ignore[arg-type]
    assert base in heard[-1].text
