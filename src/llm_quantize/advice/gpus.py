"""GPUs by name: the memory that nvidia-smi reports, and the compute capability, which says what kernels there are."""

from __future__ import annotations

import re
from collections.abc import Mapping

from llm_quantize.errors import UsageError

# (MiB in all, compute capability)
GPUS: Mapping[str, tuple[int, float]] = {
    "T4": (15_360, 7.5),
    "RTX 2060": (6_144, 7.5),
    "RTX 2080 Ti": (11_264, 7.5),
    "RTX 3060": (12_288, 8.6),
    "RTX 3080": (10_240, 8.6),
    "RTX 3090": (24_576, 8.6),
    "RTX 4060": (8_188, 8.9),
    "RTX 4070": (12_282, 8.9),
    "RTX 4080": (16_376, 8.9),
    "RTX 4090": (24_564, 8.9),
    "RTX 5060 Ti": (16_311, 12.0),
    "RTX 5070": (12_227, 12.0),
    "RTX 5080": (16_303, 12.0),
    "RTX 5090": (32_607, 12.0),
    "RTX A6000": (49_140, 8.6),
    "A10": (23_028, 8.6),
    "A100 40GB": (40_960, 8.0),
    "A100 80GB": (81_920, 8.0),
    "L4": (23_034, 8.9),
    "L40S": (46_068, 8.9),
    "H100": (81_559, 9.0),
    "H200": (143_771, 9.0),
    "B200": (183_359, 10.0),
}

_BRAND = re.compile(r"nvidia|geforce|tesla|graphics|[^a-z0-9]+")


def find(name: str) -> tuple[int, float] | None:
    """Bytes in all and compute capability of the GPU that ``name`` means, in any case, with its brand or without; None
    where it is none of GPUS."""
    wanted = _letters(name)
    exact = [
        facts for known, facts in GPUS.items() if _letters(known).removeprefix("rtx") == wanted.removeprefix("rtx")
    ]
    if len(exact) != 1:
        return None
    mebibytes, capability = exact[0]
    return mebibytes << 20, capability


def described(text: str) -> tuple[int | None, float]:
    """(bytes in all, or None where that is not said; compute capability) of ``text``: a GPU of the table, or a compute
    capability such as 8.9. Raises UsageError."""
    if re.fullmatch(r"\d{1,2}\.\d", text.strip()):
        return None, float(text)
    found = find(text)
    if found is None:
        raise UsageError(
            "this GPU is not in the table",
            expected=", ".join(GPUS),
            found=text,
            remedy="give its compute capability and its memory, for example --gpu 8.9 --vram 24G",
        )
    return found


def _letters(name: str) -> str:
    return _BRAND.sub("", name.lower())
