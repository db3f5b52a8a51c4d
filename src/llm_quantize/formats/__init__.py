"""Formats, the dialects of bytes on disk: a row of FORMATS (table.py) and a file each."""
