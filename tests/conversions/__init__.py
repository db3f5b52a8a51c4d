"""The table of conversions: every kind of source into every format, as docs/reference/conversions.md shows it."""
