"""Adapter files: formats, conversion, merging. Imports `config`, `run` and `models`."""
