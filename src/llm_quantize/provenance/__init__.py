"""How an artifact came about: recorded in its manifest, made again from there, and stated for others to check."""
