"""A planned directory filled by hand, tensor by tensor: rounding to nearest, no engine, no journal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from llm_quantize import kernels
from llm_quantize.architectures.rows import matrix_shape, read_output_rows, to_float32
from llm_quantize.formats.base import scheme_of
from llm_quantize.formats.packed_formats import PACKED
from llm_quantize.grids import grid_type
from llm_quantize.grids.grid import Grid
from llm_quantize.models.opening import Source
from llm_quantize.plan import ArtifactPlan, TensorPlan


def fill(source: Source, plan: ArtifactPlan, directory: Path) -> dict[str, tuple[Grid, torch.Tensor]]:
    """Write the files of ``plan``, and return {module: (grid, codes)} of what stands in them."""
    scheme = scheme_of(plan)
    form = PACKED[plan.format]
    contents = [
        bytearray(b"".join(piece for _, piece in file.known()) + bytes(file.size - file.known_bytes))
        for file in plan.files
    ]

    def put(tensor: TensorPlan, data: bytes) -> None:
        assert len(data) == tensor.nbytes, tensor.name
        assert tensor.offset >= plan.files[tensor.file].known_bytes
        contents[tensor.file][tensor.offset : tensor.offset + len(data)] = data

    found = {}
    for matrix in plan.matrices:
        weight = to_float32(read_output_rows(source.checkpoint, matrix.weight, 0, matrix.weight.shape[0]))
        maker = grid_type(matrix.qtype, scale=scheme.qtype.scale)
        grid, codes = maker.plain(torch.from_numpy(np.array(weight)), None)
        found[matrix.name] = grid, codes
        for index, array in zip(matrix.fields, form.pack(scheme, grid, codes), strict=True):
            assert array.shape == plan.tensors[index].output.shape
            put(plan.tensors[index], array.tobytes())
    for index in plan.rounded():
        tensor = plan.tensors[index]
        rows = read_output_rows(source.checkpoint, tensor.output, 0, matrix_shape(tensor.output.shape)[0])
        put(tensor, kernels.quantize(tensor.qtype, rows, None).tobytes())
    directory.mkdir()
    for file, data in zip(plan.files, contents, strict=True):
        (directory / file.name).parent.mkdir(exist_ok=True)
        (directory / file.name).write_bytes(data)
    return found
