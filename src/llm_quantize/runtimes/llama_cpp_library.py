"""The C interface of llama.cpp, as the xllamacpp wheel's shared object exports it, through ctypes.

Owner of the interface: llama.cpp, ``include/llama.h``. Its two parameter structs change from release to release, so
nothing here spells out a layout. They are opaque blocks, larger than the real struct, that the library itself fills
with defaults; the few fields we set are found by the pattern of those defaults, and what was set is read back from
the live context. A release whose patterns or answers differ is refused by name.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
import struct
from collections import deque
from pathlib import Path
from typing import Any

from llm_quantize.errors import MissingExtraError, UnsupportedError

_BLOCK_BYTES = 1024
# Context defaults: n_ctx, n_batch, n_ubatch, n_seq_max open the struct; four "unspecified" enums (rope scaling,
# pooling, attention, flash attention) stand before two zero floats and four floats of -1 (YaRN "from the model");
# the cache types K and V are two F16 enums behind the callback pointers that follow.
_CONTEXT_HEAD = struct.pack("<4i", 512, 2048, 512, 1)
_ENUMS_AND_YARN = struct.pack("<4i6f", -1, -1, -1, -1, 0, 0, -1, -1, -1, -1)
# Model defaults behind the two pointers: n_gpu_layers (all), split by layer.
_LAYERS_AND_SPLIT = struct.pack("<2i", -1, 1)
_CACHE_TYPES = re.compile(rb"\x00{16}(\x01\x00\x00\x00\x01\x00\x00\x00)\x00{16}")
_GGML_F32 = 0
_LOG_DEBUG, _LOG_ERROR, _LOG_CONTINUE = 1, 4, 5


class Block(ctypes.Structure):
    """A parameter struct of unknown layout: the library writes its defaults at the front."""

    _fields_ = (("data", ctypes.c_uint8 * _BLOCK_BYTES),)

    def read(self) -> bytes:
        return bytes(self.data)

    def put(self, offset: int, layout: str, *values: int) -> None:
        raw = struct.pack(layout, *values)
        self.data[offset : offset + len(raw)] = list(raw)


class Batch(ctypes.Structure):
    """``llama_batch``: n tokens with their positions, sequences and "wants logits" flags."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


class ChatMessage(ctypes.Structure):
    """``llama_chat_message``."""

    _fields_ = (("role", ctypes.c_char_p), ("content", ctypes.c_char_p))


_LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_P, _S = ctypes.c_void_p, ctypes.c_char_p
_I, _U, _B, _Z = ctypes.c_int32, ctypes.c_uint32, ctypes.c_bool, ctypes.c_size_t
_IDS = ctypes.POINTER(ctypes.c_int32)
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (_LogCallback, _P)),
    "llama_supports_gpu_offload": (_B, ()),
    "llama_model_default_params": (Block, ()),
    "llama_context_default_params": (Block, ()),
    "llama_model_load_from_file": (_P, (_S, Block)),
    "llama_model_free": (None, (_P,)),
    "llama_init_from_model": (_P, (_P, Block)),
    "llama_free": (None, (_P,)),
    "llama_n_ctx": (_U, (_P,)),
    "llama_n_batch": (_U, (_P,)),
    "llama_n_ubatch": (_U, (_P,)),
    "llama_n_seq_max": (_U, (_P,)),
    "llama_n_threads": (_I, (_P,)),
    "llama_set_n_threads": (None, (_P, _I, _I)),
    "llama_get_memory": (_P, (_P,)),
    "llama_memory_clear": (None, (_P, _B)),
    "llama_memory_seq_rm": (_B, (_P, _I, _I, _I)),
    "llama_memory_seq_pos_min": (_I, (_P, _I)),
    "llama_model_get_vocab": (_P, (_P,)),
    "llama_model_n_ctx_train": (_I, (_P,)),
    "llama_model_meta_val_str": (_I, (_P, _S, _S, _Z)),
    "llama_model_chat_template": (_S, (_P, _S)),
    "llama_chat_apply_template": (_I, (_S, ctypes.POINTER(ChatMessage), _Z, _B, _S, _I)),
    "llama_vocab_n_tokens": (_I, (_P,)),
    "llama_vocab_type": (_I, (_P,)),
    "llama_vocab_bos": (_I, (_P,)),
    "llama_vocab_eos": (_I, (_P,)),
    "llama_vocab_is_eog": (_B, (_P, _I)),
    "llama_vocab_get_text": (_S, (_P, _I)),
    "llama_tokenize": (_I, (_P, _S, _I, _IDS, _I, _B, _B)),
    "llama_detokenize": (_I, (_P, _IDS, _I, _S, _I, _B, _B)),
    "llama_token_to_piece": (_I, (_P, _I, _S, _I, _I, _B)),
    "llama_batch_init": (Batch, (_I, _I, _I)),
    "llama_batch_free": (None, (Batch,)),
    "llama_decode": (_I, (_P, Batch)),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), (_P,)),
}


class Library:
    """The loaded shared object. ``call.llama_...`` are its functions; ``lines`` its last log lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: deque[tuple[int, str]] = deque(maxlen=400)
        self._skipping = False
        try:
            self.call: Any = ctypes.CDLL(str(path))
        except OSError as problem:
            raise UnsupportedError(
                "the shared object of xllamacpp does not load",
                file=path,
                found=problem,
                remedy="reinstall it: pip install --force-reinstall xllamacpp",
            ) from problem
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self.call, name, None)
            if function is None:
                raise self.changed(f"the function {name} is absent")
            function.restype, function.argtypes = result, arguments
        # The library keeps the pointer for the life of the process; so must we.
        self._callback = _LogCallback(self._log)
        self.call.llama_log_set(self._callback, None)
        self.call.llama_backend_init()

    def _log(self, level: int, text: bytes | None, _user: int | None) -> None:
        if not text:
            return
        line = text.decode("utf-8", "replace")
        # Debug lines grow with the number of layers; what we read and show is not among them.
        self._skipping = level == _LOG_DEBUG or (level == _LOG_CONTINUE and self._skipping)
        if self._skipping:
            return
        if level == _LOG_CONTINUE and self.lines:
            before = self.lines.pop()
            self.lines.append((before[0], before[1] + line))
        else:
            self.lines.append((level, line))

    def errors(self, count: int = 3) -> str:
        """The last ``count`` error lines of the log, joined."""
        found = [line.strip() for level, line in self.lines if level == _LOG_ERROR and line.strip()]
        return " | ".join(found[-count:])

    def changed(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"this release of xllamacpp has an interface we do not know: {what}",
            file=self.path,
            remedy="install the release named in constraints.txt",
        )

    def model_parameters(self, gpu_layers: int = 0) -> tuple[Block, Any]:
        """Model parameters for the CPU alone, or with ``gpu_layers`` on the GPUs that there are, and an object that
        must live until the model is loaded.

        ``devices`` is the first field: a list of back ends, empty here, where NULL would mean "all there are".
        Raises UnsupportedError where this build knows no GPU.
        """
        block: Block = self.call.llama_model_default_params()
        if block.read()[:16] != bytes(16):
            raise self.changed("model parameters do not open with two null pointers")
        devices = (ctypes.c_void_p * 1)(None)
        if not gpu_layers:
            block.put(0, "<Q", ctypes.addressof(devices))
            return block, devices
        if not self.call.llama_supports_gpu_offload():
            raise UnsupportedError(
                "this build of llama.cpp computes on the CPU only",
                file=self.path,
                remedy="install a build of xllamacpp for your GPU, or leave --gpu-layers out",
            )
        if block.read()[16:24] != _LAYERS_AND_SPLIT:
            raise self.changed("the number of GPU layers does not follow the two pointers")
        block.put(16, "<i", gpu_layers)
        return block, devices

    def context_parameters(self, context: int, batch: int) -> Block:
        """Context of ``context`` tokens, one sequence, exact attention (no flash attention), F32 cache."""
        block: Block = self.call.llama_context_default_params()
        data = block.read()
        start = data.find(_ENUMS_AND_YARN)
        types = _CACHE_TYPES.search(data, start + len(_ENUMS_AND_YARN), start + 160) if start >= 0 else None
        if not data.startswith(_CONTEXT_HEAD) or types is None or data.find(_ENUMS_AND_YARN, start + 1) >= 0:
            raise self.changed("the defaults of the context parameters differ")
        block.put(0, "<4i", context, batch, batch, 1)
        block.put(start + 12, "<i", 0)
        block.put(types.start(1), "<2i", _GGML_F32, _GGML_F32)
        return block

    def check_context(self, handle: int, context: int, batch: int) -> None:
        """Read back from a live context what ``context_parameters`` set, or refuse this release."""
        call = self.call
        # The library rounds the context up to a multiple of 256.
        if not context <= call.llama_n_ctx(handle) < context + 256:
            raise self.changed(f"context of {context} tokens asked, {call.llama_n_ctx(handle)} made")
        got = (call.llama_n_batch(handle), call.llama_n_ubatch(handle), call.llama_n_seq_max(handle))
        if got != (batch, batch, 1):
            raise self.changed(f"batch sizes {(batch, batch, 1)} asked, {got} made")
        log = "".join(line for _, line in self.lines)
        flash = re.search(r"flash_attn\s*=\s*(\w+)", log)
        cache = re.findall(r"[KV] \((\w+)\)", log)
        if flash is None or flash[1] not in ("disabled", "0") or not cache or set(cache) != {"f32"}:
            raise self.changed(f"F32 cache without flash attention asked, made: {flash and flash[1]}, {cache}")

    def new_batch(self, size: int) -> Batch:
        """A batch with room for ``size`` tokens of one sequence; ``llama_batch_free`` gives it back."""
        batch: Batch = self.call.llama_batch_init(size, 0, 1)
        filled = [bool(getattr(batch, name)) for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")]
        if batch.n_tokens != 0 or filled != [True, False, True, True, True, True]:
            raise self.changed("llama_batch has another layout")
        return batch


@functools.cache
def load_library() -> Library:
    """The one library of this process.

    Raises: MissingExtraError (xllamacpp is not installed), UnsupportedError (its interface is not the one we know).
    """
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise MissingExtraError("running a GGUF file", "llamacpp")
    folder = Path(spec.origin).parent
    found = sorted(p for p in folder.iterdir() if p.name.startswith("xllamacpp.") and p.suffix in (".so", ".pyd"))
    if not found:
        raise MissingExtraError("running a GGUF file", "llamacpp")
    return Library(found[0])
