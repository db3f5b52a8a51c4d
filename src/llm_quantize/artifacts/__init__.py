"""What we make: its plan, its files, its manifest, and the checks of it."""
