"""Bytes on the command line."""

from __future__ import annotations

import re
from typing import Any

import click

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


LEAST_BYTES = 1_000_000
"""A bare number from here on is of bytes: nobody has a million gigabytes, and nothing here fits in a megabyte."""


class Tokens(click.ParamType[int]):
    """A number of tokens: 4096, or 8k, 128k, as people say it: 1,024 each."""

    name = "TOKENS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+)\s*(K?)", str(value).strip().upper())
        if match is None or int(match[1]) < 1:
            self.fail(f"{value!r} is not a number of tokens; write for example 8192 or 8k", param, ctx)
        return int(match[1]) * (1024 if match[2] else 1)


class Size(click.ParamType[int]):
    """Bytes with a unit: 512M, 4G (powers of ten), 4GiB (powers of two), 4096B. A number without one is of gigabytes,
    as people speak of memory, and of bytes where it is too large for that."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)(B?)", str(value).strip().upper())
        if match is None or match[2] == "I" or float(match[1]) <= 0:
            self.fail(f"{value!r} is not a size; write for example 512M, 4G or 4GiB", param, ctx)
        number = float(match[1])
        unit = "G" if not match[2] and not match[3] and number < LEAST_BYTES else match[2]
        return int(number * _UNITS[unit])
