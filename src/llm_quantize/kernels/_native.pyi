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

class Codebook:
    def __init__(self, codes: npt.NDArray[np.uint8], levels: int, wanted: int) -> None: ...
    def arrays(self) -> tuple[list[int], list[int], list[int]]: ...
