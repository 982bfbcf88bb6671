"""Blocks that pass on what they get."""
