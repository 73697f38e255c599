"""Base models and what is added to them, from their files to modules. Imports `config`, `run`, `data`, `diffusion`."""
