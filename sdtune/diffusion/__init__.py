"""The mathematics of diffusion, on tensors and diffusers' schedulers. Imports `config` only."""
