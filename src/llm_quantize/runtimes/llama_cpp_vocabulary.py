"""The tokenizer of a GGUF file in llama.cpp, without the weights of the file.

llama.cpp reads a vocabulary with a model around it, so it gets one of a single small block, all zeros: a file that
takes neither disk nor memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from gguf.constants import GGUFValueType, Keys

from llm_quantize.architectures.kinds import Kind
from llm_quantize.errors import MalformedInputError, UnsupportedError
from llm_quantize.io.gguf_file import MetaValue, layout_gguf
from llm_quantize.qtypes.ggml_types import GgmlType
from llm_quantize.runtimes.llama_cpp import LlamaCpp

_WIDTH = 32
_CONTEXT = 32
_SQUARE = ("ATTN_Q", "ATTN_K", "ATTN_V", "ATTN_OUT", "FFN_GATE", "FFN_UP", "FFN_DOWN")
_KEPT = ("tokenizer.", Keys.General.NAME)  # llama.cpp knows some tokenizers by the name of the model


def open_vocabulary(metadata: Mapping[str, MetaValue], file: Path) -> LlamaCpp:
    """The vocabulary that ``metadata`` of ``file`` holds, to tokenize with; the model around it is of no use.

    Raises MissingExtraError (xllamacpp is not installed), UnsupportedError (llama.cpp refuses the vocabulary).
    """
    rows = len(metadata[Keys.Tokenizer.LIST].value)
    arch, keys = "llama", Keys.LLM
    sizes = {
        keys.BLOCK_COUNT: 1,
        keys.CONTEXT_LENGTH: _CONTEXT,
        keys.EMBEDDING_LENGTH: _WIDTH,
        keys.FEED_FORWARD_LENGTH: _WIDTH,
        keys.VOCAB_SIZE: rows,
        Keys.Attention.HEAD_COUNT: 1,
    }
    own = {
        Keys.General.ARCHITECTURE: MetaValue(GGUFValueType.STRING, arch),
        **{key.format(arch=arch): MetaValue(GGUFValueType.UINT32, value) for key, value in sizes.items()},
        Keys.Attention.LAYERNORM_RMS_EPS.format(arch=arch): MetaValue(GGUFValueType.FLOAT32, 1e-5),
        **{key: value for key, value in metadata.items() if key.startswith(_KEPT)},
    }
    shapes: dict[Kind, tuple[int, ...]] = {
        Kind.TOKEN_EMBD: (rows, _WIDTH),
        Kind.OUTPUT_NORM: (_WIDTH,),
        **{Kind[name]: (_WIDTH,) for name in ("ATTN_NORM", "FFN_NORM")},
        **{Kind[name]: (_WIDTH, _WIDTH) for name in _SQUARE},
    }
    names = {tensor: tensor.of(0) for tensor in shapes}
    layout = layout_gguf(own, [(names[tensor], shape, GgmlType.F32) for tensor, shape in shapes.items()])
    with tempfile.TemporaryDirectory(prefix="llm-quantize-") as folder:
        small = Path(folder) / "vocabulary.gguf"
        with small.open("wb") as out:
            out.write(layout.header)
            out.truncate(layout.size)
        try:
            return LlamaCpp(small, context=_CONTEXT, threads=1)
        except MalformedInputError as error:
            raise UnsupportedError(
                "llama.cpp does not read the vocabulary of this file", file=file, found=error.found
            ) from error
