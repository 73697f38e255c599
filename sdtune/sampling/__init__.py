"""`sdtune sample`: images from a model. Imports `config`, `run`, `diffusion` and `models`."""
