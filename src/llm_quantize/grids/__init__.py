"""Number grids of one matrix: fitted, searched, decoded."""
