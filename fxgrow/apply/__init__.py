"""Carry plans out: old tensors and modules in, new ones out. Nothing is decided here."""
