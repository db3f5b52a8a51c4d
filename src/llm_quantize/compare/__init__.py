"""Variants side by side: what each costs and loses."""
