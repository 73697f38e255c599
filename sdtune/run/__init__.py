"""A run: its folder, checkpoints, random numbers, processes, metrics and report. Imports `config` only."""
