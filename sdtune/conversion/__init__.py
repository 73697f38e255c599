"""Converts, merges and inspects adapter files. Imports `config`, `run` and `models`."""
