"""Fine-tuning for diffusion models: recipes that read like the papers, one training loop."""

__version__ = "0.1.0"
