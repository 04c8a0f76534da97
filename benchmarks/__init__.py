"""Measurements, each a script of its own; see its docstring."""
