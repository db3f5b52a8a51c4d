"""CTranslate2 models, as its own converter (4.8) makes them of a Hugging Face directory:

    model.bin         every variable, by name (io/ctranslate2_file.py)
    config.json       special tokens, the epsilon of norms
    vocabulary.json   the text of each token, by id
    the rest          as in every directory (directory.py): the tokenizer's files, the card

Of a matrix W (N, K), the embedding and the head among them:

    NAME/weight        int8   (N, K)   w = q / s of its row, q from -127
    NAME/weight_scale  float32 (N,)    s = 127 / max|w| of the row (rounding plainly)

    NAME/weight        int16  (N, K)   w = q / s
    NAME/weight_scale  float32 ()      s = 1024 / max|w| of the matrix

A tied head is an alias of the embedding. The converter makes an alias of any two variables whose values happen to be
equal; here only of those that are the same weight of the source.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_quantize.architectures.base import OutputTensor
from llm_quantize.architectures.rows import weights_of
from llm_quantize.formats.base import Importance, Store
from llm_quantize.formats.card import About, bytes_words
from llm_quantize.formats.ctranslate2.families import Family
from llm_quantize.formats.ctranslate2.levels import CODES, FED, LEVELS, VARIABLE_TYPES, Level, level_of
from llm_quantize.formats.ctranslate2.network import KIND, REVISION, Network, Weight, family_of, network_of
from llm_quantize.formats.ctranslate2.vocabulary import has_template, special_tokens, tokens_of
from llm_quantize.formats.directory import KEPT_TYPES, Contents, plan_around
from llm_quantize.formats.gguf.restored.files import Restored, restored
from llm_quantize.formats.idle_options import refuse_idle
from llm_quantize.formats.keeping import Kept
from llm_quantize.formats.recipe import no_recipes
from llm_quantize.io.ctranslate2_file import MODEL_FILE, Variable, layout_model
from llm_quantize.io.output import OutputFile
from llm_quantize.plan import ArtifactPlan, MatrixPlan, TensorPlan

if TYPE_CHECKING:
    from llm_quantize.models.opening import Source
    from llm_quantize.options import Options

_DTYPES: Mapping[str, str] = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
_STORED = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
_FLOATS = frozenset(_STORED.values())
_LEVEL_OF: Mapping[frozenset[str], str] = {
    frozenset(_STORED.get(word, word) for word in (level.matrix, level.rest)): name
    for name, level in LEVELS.items()
    if level.rest is not None
}
"""{the types of what a model stores, as a source has them: the level that stores just these}."""


class CTranslate2:
    """The row."""

    name = "ctranslate2"
    levels: Sequence[str] = tuple(LEVELS)
    example = "int8"
    default = "int8"
    method = "gptq"
    transform = "none"
    weighs = False
    act_order = False

    def plan(
        self, source: Source, levels: Sequence[str], stem: str, importance: Importance | None, options: Options
    ) -> list[ArtifactPlan]:
        """See ``Format``. Raises UsageError (no such level, options of other formats), UnsupportedError (a family or
        variant that CTranslate2's converter or network does not know, a model without tokenizer files)."""
        refuse_idle(
            self.name,
            options,
            {"--method", "--include"},
            "one file holds everything, rounded as the level says: take another level",
        )
        family, network = family_of(source), network_of(source)
        names = list(dict.fromkeys(level_of(level) for level in levels))
        return [self._plan(source, family, network, name, stem, importance, options) for name in names]

    def needs_importance(self, source: Source, level: str, options: Options) -> bool:
        """See ``Format``: nothing is weighed."""
        return False

    def calibrated(self, level: str) -> bool:
        """See ``Format``."""
        return LEVELS[level_of(level)].matrix == FED

    def check_text(self, levels: Sequence[str], options: Options) -> None:
        """See ``Format``: every level can be made without text."""

    def recipe_level(self, text: str) -> str:
        """See ``Format``: it takes no recipes."""
        raise no_recipes(self.name)

    def recipe_type(self, text: str) -> str:
        """See ``Format``."""
        raise no_recipes(self.name)

    def keeping(self, source: Source, level: str | None, options: Options) -> Kept | None:
        """See ``Format``: of a CTranslate2 model its own level, of floats the one that holds them all; no other source
        has these grids."""
        tensors = source.checkpoint.tensors
        words = {info.dtype for name, info in tensors.items() if source.checkpoint.is_readable(name)}
        found = level or _LEVEL_OF.get(frozenset(words), "float32" if words <= _FLOATS else None)
        return None if found is None else Kept(found, options, 1)

    def labels(self, source: Source) -> Collection[str]:
        """See ``Format``."""
        tensors = source.checkpoint.tensors
        words = frozenset(info.dtype for name, info in tensors.items() if source.checkpoint.is_readable(name))
        own = "line8" in words or "line16" in words
        return (source.checkpoint.kind, f"CT2-{_LEVEL_OF[words]}") if own and words in _LEVEL_OF else ()

    def store(self, plan: ArtifactPlan) -> Store:
        """See ``Format``."""
        from llm_quantize.formats.ctranslate2.store import CTranslate2Store

        return CTranslate2Store()

    def texts_of(self, path: Path) -> Sequence[str] | None:
        """See ``Format``: text goes through the model itself, no importance is collected."""
        return None

    def _plan(
        self,
        source: Source,
        family: Family,
        network: Network,
        name: str,
        stem: str,
        importance: Importance | None,
        options: Options,
    ) -> ArtifactPlan:
        level, method = LEVELS[name], options.method
        loaded, warnings = _loaded(source)
        window = source.architecture.config.get("sliding_window")
        if family.window == "none" and window is not None:
            warnings.append(
                f"CTranslate2 has no sliding window in this family: beyond {window} tokens it attends to more than the "
                "source does"
            )
        file, tensors, matrices = _lay_out(network, level, loaded)
        label = f"CT2-{name}"
        fed = self.calibrated(name)
        text = {"text": importance.sha256} if fed and importance is not None else {}
        texts = () if importance is None else importance.datasets
        words = method.words(self.name, texts) if fed else {}
        weights = sum(weights_of(weight.output.shape) for weight in network.weights)
        contents = Contents(
            format=self.name,
            label=label,
            name=f"{stem}-{label}",
            groups=(),
            config=_config(source, family),
            about=_about(f"{stem}-{label}", name, len(matrices), file.size, weights, words),
            weights=weights,
            identity={**(method.identity(self.name) if fed else {}), "nonfinite": options.nonfinite, **text},
            shard_size=method.shard_size,
            judged=options.judged,
            include=method.include,
            measured=fed and options.statistics is None and method.pairs(self.name),
            warnings=warnings,
            dropped=source.left_out,
            too_large="use bfloat16 or float32, which hold larger magnitudes: -q bfloat16",
        )
        return plan_around(source, contents, [file, _vocabulary(source)], tensors, matrices)


def _loaded(source: Source) -> tuple[str, list[str]]:
    """The type that the converter loads the model in: the configuration's, else the one of its embedding; and a warning
    where tensors are stored in another one."""
    tensors, config = source.checkpoint.tensors, source.checkpoint.config
    text = config.get("text_config")
    said = [where.get(key) for where in (config, text) if isinstance(where, dict) for key in ("dtype", "torch_dtype")]
    stored = {KEPT_TYPES.get(tensors[p.source].dtype, "f32") for o in source.tensors.outputs for p in o.pieces}
    loaded = next((_DTYPES[word] for word in said if isinstance(word, str) and word in _DTYPES), None)
    if loaded is None:
        return min(stored, default="f32"), []
    if stored - {loaded}:
        return loaded, [
            f"some weights are stored in {', '.join(sorted(stored - {loaded}))}, the configuration says {loaded}: they "
            "are rounded as they are stored, where CTranslate2's converter rounds them to that type first"
        ]
    return loaded, []


def _lay_out(network: Network, level: Level, loaded: str) -> tuple[OutputFile, list[TensorPlan], list[MatrixPlan]]:
    """model.bin, and the place of every variable of it that holds data."""
    variables, stored = list(network.scalars), dict[str, list[tuple[OutputTensor, str]]]()
    for weight in network.weights:
        name = weight.output.name
        stored[name] = _stored(weight, level, loaded)
        variables += [Variable(one.name, VARIABLE_TYPES.get(kind, kind), one.shape) for one, kind in stored[name]]
    layout = layout_model(KIND, REVISION, variables, network.aliases)
    tensors: list[TensorPlan] = []
    matrices: list[MatrixPlan] = []
    sizes = {variable.name: variable.nbytes for variable in variables}
    for weight in network.weights:
        first = len(tensors)
        for output, kind in stored[weight.output.name]:
            tensors.append(TensorPlan(output, kind, 0, layout.offsets[output.name], sizes[output.name]))
        if weight.quantized and level.rounds:
            name, fields = weight.output.name.removesuffix("/weight"), (first, first + 1)
            seen = weight.seen and level.matrix == FED
            matrices.append(MatrixPlan(name, weight.output, level.matrix, fields, seen))
    return OutputFile(MODEL_FILE, layout.size, layout.header, between=layout.between), tensors, matrices


def _stored(weight: Weight, level: Level, loaded: str) -> list[tuple[OutputTensor, str]]:
    """What is stored of a weight: a type as in TensorPlan for each."""
    output = weight.output
    if not weight.quantized:
        return [(output, level.rest or loaded)]
    if not level.rounds:
        return [(output, level.matrix)]
    scales = () if level.matrix == "line16" else output.shape[:1]
    codes = OutputTensor(output.name, output.shape)
    return [(codes, CODES[level.matrix]), (OutputTensor(f"{output.name}_scale", scales), "float32")]


def _config(source: Source, family: Family) -> bytes:
    """config.json, byte for byte the converter's, but for a token that there is not: it writes null, which the runtime
    does not load, where "" means none."""
    directory, made = source.checkpoint.directory, _made(source)
    tokens = special_tokens(directory, source.architecture.family.model_type, made)
    chats = bool(family.chat_eos) and has_template(directory, made)
    known: dict[str, Any] = {
        "bos_token": next((tokens[role] for role in family.bos if role in tokens), ""),
        "eos_token": family.chat_eos if chats else tokens.get("eos_token", ""),
        "layer_norm_epsilon": source.architecture.config.number(family.epsilon) if family.epsilon else None,
        "multi_query_attention": True,  # of models with as many key heads as query heads, too
        "unk_token": next((tokens[role] for role in family.unk if role in tokens), ""),
    }
    return json.dumps(known, indent=2, sort_keys=True).encode() + b"\n"


def _made(source: Source) -> Restored | None:
    """The small files of a GGUF file; None of a directory, which has them."""
    return restored(source) if source.checkpoint.metadata is not None else None


def _vocabulary(source: Source) -> OutputFile:
    tokens = tokens_of(source.checkpoint.directory, source.architecture.hyper.vocab_size, _made(source))
    data = json.dumps(tokens, indent=2).encode()
    return OutputFile("vocabulary.json", len(data), data)


def _about(name: str, level: str, matrices: int, nbytes: int, weights: int, method: Mapping[str, str]) -> About:
    recipe: dict[str, Any] = {"Format": "CTranslate2", "Level": level}
    if matrices:
        recipe["Rounded"] = f"{matrices} matrices, embedding and head among them"
    return About(
        tags=("ctranslate2", level),
        recipe=recipe | dict(method),
        sizes={"Weights": f"{bytes_words(nbytes)}, {8 * nbytes / max(1, weights):.2f} bits per weight"},
        loading=(
            "## Loading\n\n`pip install ctranslate2 tokenizers`\n\n```python\nimport ctranslate2\n"
            "from tokenizers import Tokenizer\n\n"
            f'generator = ctranslate2.Generator("{name}")\n'
            f'tokenizer = Tokenizer.from_file("{name}/tokenizer.json")\n'
            'prompt = tokenizer.encode("Once upon a time").tokens\n'
            "found = generator.generate_batch([prompt], max_length=64, include_prompt_in_result=False)\n"
            "print(tokenizer.decode(found[0].sequences_ids[0]))\n```\n"
        ),
    )
