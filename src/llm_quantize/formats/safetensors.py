"""A model directory of plain weights in another element type, or in files of another size: the casts and the sharding.

    config.json            the source's, its dtype set, without what it says of a quantization of the source
    model.safetensors      every tensor of the source under its own name: BF16, F16 or F32
    the rest               as in every directory (directory.py)

What is no weight (buffers of integers) is left out and told. Rounding is to nearest, ties to even.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_quantize.errors import UsageError
from llm_quantize.formats.base import Importance, Store
from llm_quantize.formats.card import About, bytes_words
from llm_quantize.formats.directory import Contents, plain_config, plan_files, whole
from llm_quantize.formats.idle_options import OF_DIRECTORIES, refuse_idle
from llm_quantize.formats.keeping import Kept
from llm_quantize.formats.level_names import FLOATS, known_level
from llm_quantize.formats.recipe import no_recipes
from llm_quantize.io.safetensors_file import TensorInfo
from llm_quantize.plan import ArtifactPlan

if TYPE_CHECKING:
    from llm_quantize.models.opening import Source
    from llm_quantize.options import Options

_DTYPES: Mapping[str, str] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""The levels, and what a configuration calls them."""

_DTYPE_KEYS = ("dtype", "torch_dtype")


class Safetensors:
    """The row."""

    name = "safetensors"
    levels: Sequence[str] = tuple(_DTYPES)
    example = "BF16"
    default: str | None = None
    method = "rtn"
    transform = "none"
    weighs = False
    act_order = False

    def plan(
        self, source: Source, levels: Sequence[str], stem: str, importance: Importance | None, options: Options
    ) -> list[ArtifactPlan]:
        """See ``Format``. Raises UsageError for a level or an option that weights without codes have no use for,
        UnsupportedError for a model without tokenizer files."""
        refuse_idle(
            self.name,
            options,
            OF_DIRECTORIES,
            "every tensor is stored in the type of the level; --output-shard-size sets the size of files",
        )
        names = list(dict.fromkeys(self._level(level) for level in levels))
        return [self._plan(source, level, stem, options) for level in names]

    def needs_importance(self, source: Source, level: str, options: Options) -> bool:
        """See ``Format``: nothing is weighed."""
        return False

    def calibrated(self, level: str) -> bool:
        """See ``Format``."""
        return False

    def check_text(self, levels: Sequence[str], options: Options) -> None:
        """See ``Format``: every level can be made without text."""

    def recipe_level(self, text: str) -> str:
        """See ``Format``: it takes no recipes."""
        raise no_recipes(self.name)

    def recipe_type(self, text: str) -> str:
        """See ``Format``."""
        raise no_recipes(self.name)

    def keeping(self, source: Source, level: str | None, options: Options) -> Kept | None:
        """See ``Format``: what all values surely fit, of what is quantized F32."""
        tensors = source.checkpoint.tensors
        words = {info.dtype for name, info in tensors.items() if source.checkpoint.is_readable(name)}
        fitting = words.pop() if len(words) == 1 else "F32"
        return Kept(level or (fitting if fitting in self.levels else "F32"), options, 1)

    def labels(self, source: Source) -> Collection[str]:
        """See ``Format``: of floats nothing says that they were made here but the manifest."""
        return ()

    def store(self, plan: ArtifactPlan) -> Store:
        """See ``Format``: no method ever asks, as nothing here is a matrix of codes."""
        raise UsageError("weights in a float type have no codes to choose", expected="--method rtn")

    def texts_of(self, path: Path) -> Sequence[str] | None:
        """See ``Format``: nothing is weighed."""
        return None

    def _level(self, level: str) -> str:
        return known_level(level, self.name, self.levels, usual={32: "F32"}, others=FLOATS)

    def _plan(self, source: Source, level: str, stem: str, options: Options) -> ArtifactPlan:
        kept, dropped = _sorted_out(source)
        groups = [whole(info, level.lower()) for info in kept]
        weights = sum(info.elements for info in kept)
        name = f"{stem}-{level}"
        contents = Contents(
            format=self.name,
            label=level,
            name=name,
            groups=groups,
            config=_config(source.checkpoint.config, _DTYPES[level]),
            about=_about(
                name,
                level,
                len(kept),
                sum(group.nbytes for group in groups),
                weights,
                source.architecture.family.auto,
            ),
            weights=weights,
            identity={"nonfinite": options.nonfinite},
            shard_size=options.method.shard_size,
            judged=options.judged,
            include=options.method.include,
            dropped=dropped,
            too_large="use BF16 or F32, which hold larger magnitudes: -q BF16",
        )
        return plan_files(source, contents)


def _sorted_out(source: Source) -> tuple[list[TensorInfo], dict[str, str]]:
    """The tensors that are weights, and why the others are not taken."""
    kept, dropped = [], {}
    for name, info in source.checkpoint.tensors.items():
        if source.checkpoint.is_readable(name):
            kept.append(info)
        else:
            dropped[name] = f"a buffer of {info.dtype}, which runtimes make by themselves"
    return kept, dropped


def _config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The source's configuration, its element type set wherever it names one, and at the top where it names none."""
    found = plain_config(config)
    named = [key for key in _DTYPE_KEYS if key in found]
    found |= dict.fromkeys(named or _DTYPE_KEYS[:1], dtype)
    text = found.get("text_config")
    if isinstance(text, dict):
        found["text_config"] = text | {key: dtype for key in _DTYPE_KEYS if key in text}
    return found


def _about(name: str, level: str, tensors: int, nbytes: int, weights: int, auto: str) -> About:
    return About(
        tags=(level.lower(),),
        recipe={"Format": "safetensors", "Level": level, "Tensors": f"{tensors}, all of them in {level}"},
        sizes={"Weights": f"{bytes_words(nbytes)}, {8 * nbytes / max(1, weights):.2f} bits per weight"},
        loading=(
            f"## Loading\n\n```python\nfrom transformers import {auto}, AutoTokenizer\n\n"
            f'model = {auto}.from_pretrained("{name}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```\n\n```sh\nvllm serve {name}\n```\n'
        ),
    )
