"""The rows of a .parquet file, read in the limited process of ``text_files.py``: pyarrow and the standard library.

Asked for {"file"}, it answers {"columns": names} where none of them is of text, else {"column"} once, then {"rows":
numbers from 1, "values": what they hold} for the rows that hold something, and {"end": true}; or {"refused": why}, or
{"too_much": what}. A value is a string, or {"json"} of anything else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

_BATCH = 64  # rows in memory at a time, unfolded
_TOLD = 1 << 20  # characters told at a time, unless one row has more


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
        row, characters = 0, 0
        rows: list[int] = []
        values: list[Any] = []
        for batch in table.iter_batches(batch_size=_BATCH, columns=[column], use_threads=False):
            for found in batch.column(0).to_pylist():
                row += 1
                if found is None:
                    continue
                value, size = _told(found, most)
                if size > most:
                    yield {"too_much": f"{size:,} characters in row {row}"}
                    return
                if characters + size > _TOLD and rows:
                    yield {"rows": rows, "values": values}
                    rows, values, characters = [], [], 0
                rows.append(row)
                values.append(value)
                characters += size
        if rows:
            yield {"rows": rows, "values": values}
    yield {"end": True}


def _told(found: Any, most: int) -> tuple[Any, int]:
    """What is told of a value, and how many characters its JSON has, or might have, if that is less than ``most``."""
    if isinstance(found, str) and 6 * len(found) + 2 <= most:
        return found, 6 * len(found) + 2
    text = json.dumps(found, default=_stranger, ensure_ascii=False)
    return found if isinstance(found, str) else {"json": text}, len(text)


def _stranger(value: object) -> dict[str, str]:
    """What is no text: refused by whoever looks for some."""
    return {"kind": type(value).__name__}
