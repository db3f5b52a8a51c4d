"""llama.cpp's own quantizer as the byte oracle, and GGUF files of random weights to feed it.

The cyllama wheel exposes ``model_quantize(source, target, params)``, but only the plain fields of its parameters: the
importance matrix and the per-tensor types are pointers that Python cannot set. This file sets them with ctypes, at
offsets it proves first by planting values through the public fields. The work is done in a child process (this
file run as a script), because a failed assertion inside llama.cpp ends the process.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

# llama_model_quantize_params, as the wheel lays it out behind the Python object's header: four int32 (threads, file
# type, output type, embedding type), six bools padded to eight bytes, four pointers.
_HEADER = 24
_IMATRIX, _OVERRIDES, _TENSOR_TYPES = _HEADER + 24, _HEADER + 32, _HEADER + 40


@dataclass(frozen=True)
class Job:
    """One call of llama.cpp's quantizer. Types are numbers of ggml_type; ``imatrix`` is an .npz of float32 vectors.

    ``dry_run``: nothing is written, and a missing importance matrix is no error; ``Outcome`` tells both."""

    source: str
    target: str
    ftype: int
    imatrix: str | None = None
    output_type: int | None = None
    embedding_type: int | None = None
    tensor_types: tuple[tuple[str, int], ...] = ()
    pure: bool = False
    threads: int = 1
    dry_run: bool = False


@dataclass(frozen=True)
class Outcome:
    """``error`` is empty on success; otherwise what llama.cpp said, or "crashed: ..." when the process died.

    Of a dry run: ``types`` by tensor, and whether it ``needs_imatrix`` that it was not given."""

    error: str = ""
    types: Mapping[str, str] = field(default_factory=dict)
    needs_imatrix: bool = False


def run(jobs: Sequence[Job]) -> list[Outcome]:
    """Run jobs in order, in as few child processes as crashes allow."""
    outcomes: list[Outcome] = []
    while len(outcomes) < len(jobs):
        rest = jobs[len(outcomes) :]
        done = subprocess.run(
            [sys.executable, str(Path(__file__).resolve())],
            input=json.dumps([asdict(job) for job in rest]),
            capture_output=True,
            text=True,
            timeout=900,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        outcomes += [Outcome(**json.loads(line)) for line in done.stdout.splitlines()]
        if len(outcomes) < len(jobs) and done.returncode == 0:
            raise RuntimeError(f"the oracle stopped early: {done.stderr[-2000:]}")
        if done.returncode != 0:
            outcomes.append(Outcome(f"crashed: {done.returncode}: {done.stderr[-2000:]}"))
    return outcomes


def save_importance(path: Path, values: Mapping[str, np.ndarray]) -> str:
    """Store flat float32 vectors for ``Job.imatrix``."""
    np.savez(path, **{name: np.ascontiguousarray(v, np.float32).ravel() for name, v in values.items()})
    return str(path)


@dataclass(frozen=True)
class Tensor:
    """One tensor to write: row-major shape."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """A GGUF model of random weights: enough for the quantizer, which builds no graph."""

    arch: str = "llama"
    n_layer: int = 2
    n_head: int = 4
    n_head_kv: int = 4
    n_expert: int = 0
    columns: int = 256
    ffn_columns: int = 256
    tied: bool = False
    extra: tuple[Tensor, ...] = field(default=())

    def tensors(self) -> list[Tensor]:
        """Names and shapes in the style of the family: fused or separate attention, dense or expert FFN."""
        d, f = self.columns, self.ffn_columns
        found = [Tensor("token_embd.weight", (3, d)), Tensor("output_norm.weight", (d,))]
        if not self.tied:
            found.append(Tensor("output.weight", (3, d)))
        if self.arch == "gpt2":
            found.append(Tensor("position_embd.weight", (5, d)))
        fused = self.arch in ("falcon", "phi3", "gpt2", "gptneox")
        for i in range(self.n_layer):
            add = [("attn_norm", (d,)), ("attn_output", (2, d))]
            add += [("attn_qkv", (2, d))] if fused else [(f"attn_{x}", (2, d)) for x in "qkv"]
            if self.n_expert:
                e = self.n_expert
                add += [("ffn_gate_inp", (e, d)), ("ffn_gate_exps", (e, 2, d)), ("ffn_up_exps", (e, 2, d))]
                add += [("ffn_down_exps", (e, 2, f))]
                if self.arch == "qwen2moe":
                    add += [("ffn_gate_inp_shexp", (1, d)), ("ffn_gate_shexp", (2, d)), ("ffn_up_shexp", (2, d))]
                    add += [("ffn_down_shexp", (2, f))]
            else:
                add += [("ffn_up", (2, d)), ("ffn_down", (2, f))]
                if self.arch not in ("gpt2", "gptneox", "falcon", "phi3"):
                    add += [("ffn_gate", (2, d))]
            found += [Tensor(f"blk.{i}.{name}.weight", shape) for name, shape in add]
            found.append(Tensor(f"blk.{i}.attn_q.bias", (d,)))
        return [*found, *self.extra]


_LENGTHS = ("context_length", "embedding_length", "feed_forward_length", "expert_feed_forward_length")
_FLOATS = (
    "attention.layer_norm_rms_epsilon",
    "attention.layer_norm_epsilon",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "embedding_scale",
    "residual_scale",
    "logit_scale",
    "attention.scale",
)


def write_model(path: Path, model: Model, *, seed: int = 0) -> str:
    """Write ``model`` with heavy-tailed float32 weights (Student t, three degrees of freedom)."""
    import gguf

    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(str(path), model.arch)
    for key in _LENGTHS:
        writer.add_uint32(f"{model.arch}.{key}", 256)
    for key in _FLOATS:
        writer.add_float32(f"{model.arch}.{key}", 1.0)
    writer.add_block_count(model.n_layer)
    writer.add_head_count(model.n_head)
    writer.add_head_count_kv(model.n_head_kv)
    writer.add_rope_dimension_count(256 // model.n_head)
    writer.add_sliding_window(128)
    writer.add_vocab_size(3)
    writer.add_parallel_residual(True)
    if model.n_expert:
        writer.add_expert_count(model.n_expert)
        writer.add_expert_used_count(2)
    for tensor in model.tensors():
        writer.add_tensor(tensor.name, (random.standard_t(3, tensor.shape) * 0.02).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def types_of(path: str | Path) -> dict[str, str]:
    """Tensor name to lower-case qtype name, read by the format owner's reader."""
    import gguf

    return {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(path).tensors}


def data_of(file: Any) -> dict[str, tuple[str, bytes]]:
    """Tensor name to (qtype name, bytes), of a path or an open gguf.GGUFReader."""
    import gguf

    reader = file if isinstance(file, gguf.GGUFReader) else gguf.GGUFReader(file)
    return {t.name: (t.tensor_type.name.lower(), t.data.tobytes()) for t in reader.tensors}


class _Importance(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


class _TensorType(ctypes.Structure):
    _fields_ = (("pattern", ctypes.c_char_p), ("type", ctypes.c_int))


def _poke(address: int, value: ctypes.Array[ctypes.Structure]) -> None:
    ctypes.c_void_p.from_address(address).value = ctypes.addressof(value)


def _parameters(job: Mapping[str, object]) -> tuple[object, list[object]]:
    """The wheel's parameter object, and what must stay alive while it is used."""
    from cyllama.llama.llama_cpp import LlamaModelQuantizeParams

    params = LlamaModelQuantizeParams()
    params.nthread, params.ftype = 0x1234567, 27
    planted = (ctypes.c_int32 * 4).from_address(id(params) + _HEADER)
    pointers = (ctypes.c_uint64 * 4).from_address(id(params) + _IMATRIX)
    if LlamaModelQuantizeParams.__basicsize__ != _HEADER + 56 or list(planted[:2]) != [0x1234567, 27] or any(pointers):
        raise RuntimeError("cyllama's parameter layout is not the one this oracle knows")
    params.nthread, params.ftype, params.pure = job["threads"], job["ftype"], job["pure"]
    params.dry_run = job["dry_run"]
    if job["output_type"] is not None:
        params.output_tensor_type = job["output_type"]
    if job["embedding_type"] is not None:
        params.token_embedding_type = job["embedding_type"]
    alive: list[object] = []
    if job["imatrix"] is not None:
        with np.load(str(job["imatrix"])) as stored:
            vectors = {name: stored[name] for name in stored.files}
        rows = (_Importance * (len(vectors) + 1))()
        for row, (name, vector) in zip(rows, vectors.items(), strict=False):
            row.name, row.data, row.size = name.encode(), vector.ctypes.data, vector.size
        _poke(id(params) + _IMATRIX, rows)
        alive += [rows, vectors]
    tensor_types: Iterable[tuple[str, int]] = job["tensor_types"]  # type: ignore[assignment]
    if tensor_types:
        patterns = list(tensor_types)
        types = (_TensorType * (len(patterns) + 1))()
        for entry, (pattern, kind) in zip(types, patterns, strict=False):
            entry.pattern, entry.type = pattern.encode(), kind
        _poke(id(params) + _TENSOR_TYPES, types)
        alive += [types, patterns]
    return params, alive


# A line of the log about one tensor: its name, its type, and the one it gets if that is another.
_TENSOR_LINE = re.compile(r"^\[ *\d+/ *\d+\] +(\S+) +- \[.*?\], type = +(\w+), size =[^(\n]*(?:\((\w+)\))?", re.M)


def _outcome(job: Mapping[str, object], error: str, said: str) -> Outcome:
    if error or not job["dry_run"]:
        return Outcome(f"{error}: {said[-1000:]}" if error else "")
    types = {name: (new or old).lower() for name, old, new in _TENSOR_LINE.findall(said)}
    return Outcome("", types, "will require an imatrix" in said)


def main() -> None:
    """Read jobs as JSON from stdin; answer one JSON line each. llama.cpp's own chatter goes elsewhere."""
    from cyllama.llama.llama_cpp import model_quantize

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for job in json.load(sys.stdin):
        with tempfile.TemporaryFile() as log:
            stderr = os.dup(2)
            os.dup2(log.fileno(), 2)
            params, alive = _parameters(job)
            error = ""
            try:
                model_quantize(job["source"], job["target"], params)
            except RuntimeError as failure:
                error = str(failure)
            log.seek(0)
            said = log.read().decode(errors="replace")
            os.dup2(stderr, 2)
            os.close(stderr)
        del params, alive
        answers.write(json.dumps(asdict(_outcome(job, error, said))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
