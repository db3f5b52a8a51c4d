"""Rewrites of the float model that keep what it computes and make its weights easier to round."""
