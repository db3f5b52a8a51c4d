"""A GGUF file of a tiny model, written by the gguf package from our tensor map: no part of our own writer."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from llm_quantize.architectures import Architecture, open_architecture
from llm_quantize.assemble import read_output_rows, to_float32
from llm_quantize.checkpoint import open_checkpoint


def write_gguf(directory: Path, path: Path, qtype: str = "F32") -> Architecture:
    """The model in ``directory`` as ``path``, matrices in ``qtype`` where rows allow, the rest F32. No vocabulary."""
    checkpoint = open_checkpoint(str(directory))
    architecture = open_architecture(checkpoint.config, file=directory / "config.json")
    writer = gguf.GGUFWriter(path, architecture.gguf_name)
    for key, value in architecture.metadata(checkpoint.generation_config).items():
        writer.add_key_value(key, value.value, value.type, sub_type=value.item)
    writer.add_tokenizer_model("no_vocab")
    wanted = gguf.GGMLQuantizationType[qtype]
    block = gguf.GGML_QUANT_SIZES[wanted][0]
    for tensor in architecture.map_tensors(checkpoint.tensors).outputs:
        rows = int(np.prod(tensor.shape[:-1])) if len(tensor.shape) > 1 else 1
        values = to_float32(read_output_rows(checkpoint, tensor, 0, rows)).reshape(tensor.shape)
        kind = wanted if not tensor.float32 and tensor.shape[-1] % block == 0 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return architecture
