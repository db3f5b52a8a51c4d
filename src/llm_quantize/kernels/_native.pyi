import numpy as np
import numpy.typing as npt

def levels() -> list[str]: ...
def qtypes() -> list[tuple[str, int, int]]: ...
def scan_nonfinite(
    level: str, values: npt.NDArray[np.float32] | npt.NDArray[np.float16] | npt.NDArray[np.uint16]
) -> tuple[int, int]: ...
def quantize(
    level: str,
    qtype: str,
    rows: npt.NDArray[np.float32] | npt.NDArray[np.float16] | npt.NDArray[np.uint16],
    importance: npt.NDArray[np.float32] | None,
    out: npt.NDArray[np.uint8],
    codebook: Codebook | None = None,
) -> None: ...
def widen_f16(level: str, values: npt.NDArray[np.uint16], out: npt.NDArray[np.float32]) -> None: ...
def turn_words(level: str, source: npt.NDArray[np.uint32], target: npt.NDArray[np.uint32]) -> None: ...
def same_turned(level: str, one: npt.NDArray[np.uint32], other: npt.NDArray[np.uint32]) -> bool: ...
def from_interleaved(
    level: str, source: npt.NDArray[np.uint32], inputs: bool, target: npt.NDArray[np.uint32]
) -> None: ...
def to_interleaved(
    level: str, source: npt.NDArray[np.uint32], inputs: bool, target: npt.NDArray[np.uint32]
) -> None: ...
def same_interleaved(level: str, one: npt.NDArray[np.uint32], inputs: bool, other: npt.NDArray[np.uint32]) -> bool: ...
def feedback(
    level: str,
    scale: npt.NDArray[np.float32],
    inverse: npt.NDArray[np.float32],
    offset: npt.NDArray[np.float32] | None,
    group: npt.NDArray[np.int32],
    levels: npt.NDArray[np.float32],
    middles: npt.NDArray[np.float32],
    edges: tuple[float, float],
    uniform: bool,
    coupling: npt.NDArray[np.float32],
    weight: npt.NDArray[np.float32],
    target: npt.NDArray[np.float32],
    residual: npt.NDArray[np.float32],
    codes: npt.NDArray[np.uint8],
    counts: npt.NDArray[np.int32],
) -> None: ...
def descend(
    level: str,
    scale: npt.NDArray[np.float32],
    inverse: npt.NDArray[np.float32],
    offset: npt.NDArray[np.float32] | None,
    group: npt.NDArray[np.int32],
    levels: npt.NDArray[np.float32],
    middles: npt.NDArray[np.float32],
    edges: tuple[float, float],
    uniform: bool,
    hessian: npt.NDArray[np.float32],
    reciprocal: npt.NDArray[np.float32],
    weight: npt.NDArray[np.float32],
    gradient: npt.NDArray[np.float32],
    residual: npt.NDArray[np.float32],
    codes: npt.NDArray[np.uint8],
    sweeps: int,
    counts: npt.NDArray[np.int32],
) -> None: ...
def feed_words(
    level: str,
    scale: npt.NDArray[np.float32],
    inverse: npt.NDArray[np.float32],
    offset: npt.NDArray[np.float32] | None,
    group: npt.NDArray[np.int32],
    levels: npt.NDArray[np.float32],
    edges: tuple[float, float],
    entries: npt.NDArray[np.float32],
    entry_codes: npt.NDArray[np.uint8],
    signs: npt.NDArray[np.float32] | None,
    coupling: npt.NDArray[np.float32],
    metrics: npt.NDArray[np.float32],
    weight: npt.NDArray[np.float32],
    target: npt.NDArray[np.float32],
    residual: npt.NDArray[np.float32],
    codes: npt.NDArray[np.uint8],
    counts: npt.NDArray[np.int32],
) -> None: ...
def descend_words(
    level: str,
    scale: npt.NDArray[np.float32],
    inverse: npt.NDArray[np.float32],
    offset: npt.NDArray[np.float32] | None,
    group: npt.NDArray[np.int32],
    levels: npt.NDArray[np.float32],
    edges: tuple[float, float],
    entries: npt.NDArray[np.float32],
    entry_codes: npt.NDArray[np.uint8],
    signs: npt.NDArray[np.float32] | None,
    hessian: npt.NDArray[np.float32],
    weight: npt.NDArray[np.float32],
    gradient: npt.NDArray[np.float32],
    residual: npt.NDArray[np.float32],
    codes: npt.NDArray[np.uint8],
    sweeps: int,
    counts: npt.NDArray[np.int32],
) -> None: ...
def add_gram(
    level: str,
    inputs: npt.NDArray[np.uint16],
    weights: npt.NDArray[np.float32] | None,
    sums: npt.NDArray[np.float32],
    rows: tuple[int, int],
    columns: tuple[int, int],
) -> None: ...
def refit_scales(
    level: str,
    weights: npt.NDArray[np.float32],
    importance: npt.NDArray[np.float32],
    scale: npt.NDArray[np.float32],
    zero: npt.NDArray[np.float32] | None,
    lowest: float,
    highest: float,
    error: npt.NDArray[np.float32],
    fitted: npt.NDArray[np.float32] | None,
) -> None: ...

class Codebook:
    def __init__(self, codes: npt.NDArray[np.uint8], levels: int, wanted: int) -> None: ...
    def arrays(self) -> tuple[list[int], list[int], list[int]]: ...
