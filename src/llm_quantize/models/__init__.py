"""Anything stored, seen as a model: what it is, where it comes from, rows of its tensors."""
