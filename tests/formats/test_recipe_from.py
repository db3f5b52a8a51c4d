"""The types of someone's GGUF file for another model of that shape: what is made has them; what differs is told."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest

import llm_quantize
from llm_quantize.cli import run
from llm_quantize.errors import LlmQuantizeError, MalformedInputError, UnsupportedError, UsageError
from llm_quantize.formats.gguf.levels import Overrides
from llm_quantize.formats.recipe import Recipe
from llm_quantize.formats.recipe_file import read_recipe, recipe_bytes
from llm_quantize.io.gguf_file import MetaValue, layout_gguf, read_gguf
from llm_quantize.models.quantized import PackedDirectory
from llm_quantize.models.recipes import recipe_from
from llm_quantize.options import MethodOptions
from llm_quantize.pipeline import Options, plan, quantize
from llm_quantize.qtypes.ggml_types import GgmlType
from tests.fake_hub import FakeHub
from tests.faults.tiny_llama import write_tiny_llama
from tests.models.test_hub import cache, point_to
from tests.tiny_models import make_tiny

__all__ = ["cache"]

MIX = (("blk.0.attn_v", "q8_0"), ("blk.1.ffn_down", "iq4_nl"), ("token_embd", "q5_k"), ("blk.0.ffn_gate", "bf16"))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of another model of the shape, with a mix of its own."""
    place = tmp_path_factory.mktemp("theirs")
    model = write_tiny_llama(place / "other", seed=9)
    mix = Options(overrides=Overrides(tensor_types=MIX))
    quantize(str(model), levels=["Q4_K_M"], output_dir=place, name="Other-UD", options=mix)
    return Path(shutil.move(place / "Other-UD-Q4_K_M.gguf", place / "Other-8B-UD-Q4_K_XL.gguf"))


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("mine") / "mine")


def by_gguf_py(path: Path) -> dict[str, str]:
    """{tensor: type}, as the owner of the format reads it."""
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def changed(path: Path, target: Path, metadata: dict[str, Any], tensors: Any = None) -> Path:
    """A file of ``path``'s tensors (zeros) with other metadata: None takes a key out."""
    found = read_gguf(path)
    keys = {**found.metadata, **metadata}
    kept = {key: value for key, value in keys.items() if value is not None}
    layout = layout_gguf(kept, tensors or [(one.name, one.shape, one.type) for one in found.tensors])
    with target.open("wb") as stream:
        stream.write(layout.header)
        stream.truncate(layout.size)
    return target


def word(text: str) -> MetaValue:
    return MetaValue(gguf.GGUFValueType.STRING, text)


def number(value: int) -> MetaValue:
    return MetaValue(gguf.GGUFValueType.UINT32, value)


def test_the_file_made_has_the_types_of_theirs(theirs: Path, mine: Path, tmp_path: Path) -> None:
    assert run(["quantize", str(mine), "--recipe-from", str(theirs), "-o", str(tmp_path)]) == 0
    made = tmp_path / "mine-UD-Q4_K_XL.gguf"
    assert by_gguf_py(made) == by_gguf_py(theirs)
    assert {"Q8_0", "IQ4_NL", "Q5_K", "BF16", "Q4_K", "F32"} <= set(by_gguf_py(made).values())
    facts = {key: value.value for key, value in read_gguf(made).metadata.items()}
    assert facts["general.file_type"] == read_gguf(theirs).metadata["general.file_type"].value == 15
    assert facts["llm_quantize.types_from"] == theirs.name
    recipe = recipe_from(theirs)
    assert recipe.origin is not None
    front = theirs.read_bytes()[: gguf.GGUFReader(theirs).data_offset]
    assert facts["llm_quantize.types_from_sha256"] == recipe.origin.sha256 == hashlib.sha256(front).hexdigest()
    manifest = json.loads((tmp_path / f"{made.name}.manifest.json").read_text())
    assert manifest["made"]["recipe"]["from"]["file"] == theirs.name
    assert manifest["identity"]["recipe"] == recipe.sha256


def test_written_out_it_is_the_same_recipe(
    theirs: Path, mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["info", str(theirs), "--recipe"]) == 0
    file = tmp_path / "theirs.recipe.json"
    file.write_text(capsys.readouterr().out, "utf-8")
    assert read_recipe(file) == recipe_from(theirs) == llm_quantize.recipe_from(theirs)
    for place, words in (("a", ["--recipe", str(file)]), ("b", ["--recipe-from", str(theirs)])):
        assert run(["quantize", str(mine), *words, "-o", str(tmp_path / place)]) == 0
    for name in ("mine-UD-Q4_K_XL.gguf", "mine-UD-Q4_K_XL.gguf.manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_differs_is_told(theirs: Path, mine: Path, tmp_path: Path) -> None:
    """Tensors that only one of the two has, rows that do not divide, and importance that is not in the file."""
    found = read_gguf(theirs)
    tensors = [(one.name, one.shape, one.type) for one in found.tensors if one.name != "blk.1.attn_q.weight"]
    tensors.append(("blk.1.attn_extra.weight", (4, 256), GgmlType.Q6_K))
    metadata = {"quantize.imatrix.file": word("/home/someone/imatrix.dat"), "quantize.imatrix.chunks_count": number(7)}
    file = changed(theirs, tmp_path / "x-Q4_K_S.gguf", metadata, tensors)
    odd = write_tiny_llama(tmp_path / "odd", inner=320)
    for model, rows in ((mine, 256), (odd, 320)):
        recipe = recipe_from(file)
        (found_plan,) = plan(str(model), levels=[recipe.level], options=Options(overrides=Overrides(recipe=recipe)))
        told = "\n".join(found_plan.warnings)
        assert "1 tensor of x-Q4_K_S.gguf that this model has not" in told
        assert "1 tensor that x-Q4_K_S.gguf has not: as Q4_K_M has them" in told
        assert ("blk.1.attn_q.weight",) in found_plan.details.values()
        assert any("imatrix.dat" in note and "chunks 7" in note for note in found_plan.notes)
        assert not any("/home" in note for note in found_plan.notes)
        types = {tensor.name: tensor.qtype for tensor in found_plan.tensors}
        assert types["blk.0.ffn_down.weight"] == ("q4_k" if rows == 256 else "q5_0")
        assert bool(found_plan.substituted) == (rows == 320)
        assert found_plan.name.endswith("-Q4_K_S")


def test_types_that_need_importance_calibrate(theirs: Path, mine: Path, tmp_path: Path) -> None:
    found = read_gguf(theirs)
    tensors = [
        (one.name, one.shape, GgmlType.IQ2_XXS if one.name == "blk.0.ffn_up.weight" else one.type)
        for one in found.tensors
    ]
    recipe = recipe_from(changed(theirs, tmp_path / "x.gguf", {}, tensors))
    options = Options(overrides=Overrides(recipe=recipe), calibrate=False)
    with pytest.raises(UsageError, match="importance") as caught:
        plan(str(mine), levels=[recipe.level], options=options)
    assert caught.value.tensor == "blk.0.ffn_up.weight"
    (made,) = plan(str(mine), levels=[recipe.level], options=Options(overrides=Overrides(recipe=recipe)))
    assert made.cost is not None
    assert made.cost.tokens > 0


@pytest.mark.parametrize(
    ("metadata", "error", "says"),
    [
        ({"general.architecture": word("qwen2"), "qwen2.block_count": number(2)}, UsageError, "qwen2 with 2 blocks"),
        ({"llama.block_count": number(3)}, UsageError, "llama with 3 blocks"),
        ({"llama.block_count": None}, MalformedInputError, "which model"),
        ({"llama.block_count": word("2")}, MalformedInputError, "which model"),
        ({"general.architecture": None}, MalformedInputError, "which model"),
        ({"general.type": word("mmproj")}, UnsupportedError, "no language model"),
        ({"split.count": number(2), "split.no": number(0)}, MalformedInputError, "parts of a split"),
    ],
)
def test_files_of_another_shape_are_refused(
    theirs: Path, mine: Path, tmp_path: Path, metadata: dict[str, Any], error: type[LlmQuantizeError], says: str
) -> None:
    file = changed(theirs, tmp_path / "x.gguf", metadata)
    with pytest.raises(error, match=says):
        plan(str(mine), levels=["Q4_K_M"], options=Options(overrides=Overrides(recipe=recipe_from(file))))


def test_types_that_are_not_written_are_refused_by_name(theirs: Path, tmp_path: Path) -> None:
    found = read_gguf(theirs)
    tensors = [(one.name, one.shape, GgmlType.Q8_1 if "attn_k." in one.name else one.type) for one in found.tensors]
    with pytest.raises(UsageError, match="types that are not written") as caught:
        recipe_from(changed(theirs, tmp_path / "x.gguf", {}, tensors))
    assert "blk.0.attn_k.weight q8_1" in str(caught.value.found)
    assert "iq4_xs" in str(caught.value.expected)


@pytest.mark.parametrize(
    ("file", "said", "name", "level"),
    [
        ("M-UD-Q4_K_XL.gguf", 15, "UD-Q4_K_XL", "Q4_K_M"),
        ("M.i1-IQ3_XXS.gguf", 23, "IQ3_XXS", "IQ3_XXS"),
        ("anything.gguf", 14, "Q4_K_S", "Q4_K_S"),
        ("anything.gguf", None, "Q4_K_M", "Q4_K_M"),
        ("anything.gguf", 999, "Q4_K_M", "Q4_K_M"),
        ("M-F16.gguf", 1, "F16", "F16"),
    ],
)
def test_what_it_is_called(theirs: Path, tmp_path: Path, file: str, said: int | None, name: str, level: str) -> None:
    recipe = recipe_from(
        changed(theirs, tmp_path / file, {"general.file_type": None if said is None else number(said)})
    )
    assert (recipe.name, recipe.level) == (name, level)


def test_a_split_file_and_two_options(theirs: Path, mine: Path, tmp_path: Path) -> None:
    whole = recipe_from(theirs)
    options = Options(overrides=Overrides(recipe=whole), split_max_size=200_000)
    quantize(str(mine), levels=[whole.level], output_dir=tmp_path, name="parts", options=options)
    directory = tmp_path / "parts-UD-Q4_K_XL"
    parts = sorted(directory.glob("*.gguf"))
    assert len(parts) > 2
    for place in (directory, parts[1]):
        recipe = recipe_from(place)
        assert recipe.tensors == whole.tensors
        assert recipe.origin is not None
        assert recipe.origin.file == "parts-UD-Q4_K_XL.gguf"
        fronts = b"".join(part.read_bytes()[: read_gguf(part).data_start] for part in parts)
        assert recipe.origin.sha256 == hashlib.sha256(fronts).hexdigest()
    parts[-1].unlink()
    with pytest.raises(UsageError, match="absent"):
        recipe_from(directory)
    words = ["plan", str(mine), "--recipe-from", str(theirs)]
    assert run(words) == 0
    assert run([*words, "-q", "Q8_0"]) == 2
    assert run([*words, "--recipe", str(theirs)]) == 2
    assert run(["plan", str(mine), "--recipe-from", str(mine)]) == 2
    assert run(["plan", str(mine), "--recipe-from", str(tmp_path / "none.gguf")]) == 2


@pytest.mark.parametrize("trouble", [None, "no-range"])
def test_of_the_hub_only_headers_are_fetched(
    theirs: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, trouble: str | None
) -> None:
    """Of a file of 9 MB whose header has more than the first megabyte that is asked for."""
    words = MetaValue(gguf.GGUFValueType.ARRAY, [f"word {i}" for i in range(120_000)], gguf.GGUFValueType.STRING)
    found = read_gguf(theirs)
    tensors = [(one.name, one.shape, one.type) for one in found.tensors]
    tensors.append(("v.large.weight", (4096, 512), GgmlType.F32))
    large = changed(theirs, tmp_path / "Other-UD-Q4_K_XL.gguf", {"tokenizer.ggml.tokens": words}, tensors)
    start = read_gguf(large).data_start
    assert start > 1 << 20
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    files = {"UD/Other-UD-Q4_K_XL.gguf": large.read_bytes(), "Other-Q8_0.gguf": theirs.read_bytes()}
    with FakeHub(files, {"UD/Other-UD-Q4_K_XL.gguf": trouble}) as hub:
        point_to(hub.url, monkeypatch)
        recipe = recipe_from("org/model:Q4_K_XL")
        assert recipe == recipe_from(large)
        if trouble is None:
            assert hub.sent["UD/Other-UD-Q4_K_XL.gguf"] == 4 << 20
        with pytest.raises(UsageError, match="several"):
            recipe_from("org/model")
    assert list(scratch.iterdir()) == []
    assert not list(cache.rglob("*.gguf"))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of another model with several grids, in which a module was left as it is."""
    place = tmp_path_factory.mktemp("mixed")
    model = make_tiny("llama", place / "other", seed=5)
    grids = {"model.layers.0.mlp.down_proj": "int8_g32", "model.layers.1.self_attn.o_proj": "int2_g32"}
    recipe = Recipe("mixed", "W4A16", grids, form="compressed-tensors")
    options = Options(
        overrides=Overrides(recipe=recipe),
        method=MethodOptions(method="rtn", group_size=32, ignore=(r"1\.mlp\.down_proj",)),
    )
    quantize(str(model), "compressed-tensors", levels=["W4A16"], output_dir=place, options=options)
    return place / "other-mixed"


def grids_of(directory: Path) -> dict[str, str]:
    with PackedDirectory(directory) as packed:
        return {name: matrix.qtype for name, matrix in packed.matrices.items()}


def test_the_grids_of_a_directory(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_tiny("llama", tmp_path / "mine")
    words = ["quantize", str(model), "compressed-tensors", "--method", "rtn", "-o", str(tmp_path)]
    assert run([*words, "--recipe-from", str(mixed)]) == 0
    assert "1 module that other-mixed has not quantized: left as they are" in capsys.readouterr().err
    made = tmp_path / "mine-W2-8A16"
    assert grids_of(made) == grids_of(mixed)
    assert set(grids_of(made).values()) == {"int8_g32", "int2_g32", "int4_g32"}
    assert run(["info", str(mixed), "--recipe"]) == 0
    (tmp_path / "r.json").write_text(capsys.readouterr().out, "utf-8")
    assert run([*words, "--recipe", str(tmp_path / "r.json")]) == 0  # it is there already, and the same
    assert "already complete" in capsys.readouterr().out
    assert llm_quantize.verify(made, source=model, rederive=True).ok
    assert run(["quantize", str(model), "gguf", "--recipe-from", str(mixed), "-o", str(tmp_path)]) == 2
    assert "is for another format" in capsys.readouterr().err


def test_directories_that_are_no_recipe_are_refused(mixed: Path, tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "mine")
    options = Options(method=MethodOptions(method="rtn"))
    quantize(str(model), "compressed-tensors", levels=["W8A8"], output_dir=tmp_path, options=options)
    with pytest.raises(UsageError, match="activations of 16 bits"):
        recipe_from(tmp_path / "mine-W8A8-channel")
    larger = make_tiny("llama", tmp_path / "larger", num_hidden_layers=3)
    recipe = recipe_from(mixed)
    with pytest.raises(UsageError, match="another shape"):
        plan(str(larger), recipe.form, levels=[recipe.level], options=Options(overrides=Overrides(recipe=recipe)))


def test_the_origin_of_a_recipe_is_read_strictly(theirs: Path, tmp_path: Path) -> None:
    fields = json.loads(recipe_bytes(recipe_from(theirs)))
    for found in ("x", {}, {**fields["from"], "blocks": "2"}, {**fields["from"], "path": "/etc"}, 7):
        file = tmp_path / "r.json"
        file.write_text(json.dumps({**fields, "from": found}))
        with pytest.raises(MalformedInputError, match="origin"):
            read_recipe(file)
