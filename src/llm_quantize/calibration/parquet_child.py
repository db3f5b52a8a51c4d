"""The rows of a .parquet file, read in the limited process of ``text_files.py``: pyarrow and the standard library.

Asked for {"file"}, it answers {"columns": names} where none of them is of text, else {"column"} once, then {"row":
number from 1, "json": its value} for every row that has one, and {"end": true}; or {"refused": why}, or {"too_much":
what}.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

_BATCH = 64  # rows in memory at a time, unfolded


def answers(first: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """``first``: {"columns": the names that may hold text, in order, "most": characters of a row}."""
    import pyarrow

    try:
        yield from _rows(asked["file"], first["columns"], first["most"])
    except MemoryError:  # which pyarrow's own error of this kind is, too
        yield {"too_much": "memory at its end"}
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        yield {"refused": f"{type(error).__name__}: {error}"[:1000]}


def _rows(file: str, columns: list[str], most: int) -> Iterator[dict[str, Any]]:
    from pyarrow import parquet

    with parquet.ParquetFile(file, pre_buffer=False) as table:
        names = table.schema_arrow.names
        column = next((name for name in columns if name in names), None)
        if column is None:
            yield {"columns": ", ".join(names)[:1000]}
            return
        yield {"column": column}
        row = 0
        for batch in table.iter_batches(batch_size=_BATCH, columns=[column], use_threads=False):
            for value in batch.column(0):
                row += 1
                found = value.as_py()
                if found is not None:
                    text = json.dumps(found, default=_stranger, ensure_ascii=False)
                    if len(text) > most:
                        yield {"too_much": f"{len(text):,} characters in row {row}"}
                        return
                    yield {"row": row, "json": text}
    yield {"end": True}


def _stranger(value: object) -> dict[str, str]:
    """What is no text: refused by whoever looks for some."""
    return {"kind": type(value).__name__}
