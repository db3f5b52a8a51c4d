"""Which model this is: a hash that differs when a weight, a shape or the configuration does, without reading it all."""

from __future__ import annotations

import hashlib

from llm_quantize.io.journal import canonical_json
from llm_quantize.models.base import Model

SAMPLED_ROWS = 5


def model_digest(checkpoint: Model) -> str:
    """SHA-256 over the configuration, every file's header, and rows of every tensor: its first, its last and three
    between, as they are stored.

    Files that only moved or were copied keep their digest. Training changes some value in those rows of some tensor,
    so two checkpoints of one run differ, although names, shapes and sizes are the same.
    """
    digest = hashlib.sha256(canonical_json({"config": checkpoint.config, "folded": dict(checkpoint.folded)}))
    for fact in checkpoint.fingerprint():
        digest.update(canonical_json([fact.name, fact.size, fact.header_sha256]))
    for name in checkpoint.tensors:
        rows = checkpoint.matrix(name)[0] if checkpoint.is_readable(name) else 0
        sampled = {index * (rows - 1) // (SAMPLED_ROWS - 1) for index in range(SAMPLED_ROWS)} if rows else set()
        digest.update(name.encode())
        for row in sorted(sampled):
            digest.update(checkpoint.raw_rows(name, row, row + 1))
    return digest.hexdigest()
