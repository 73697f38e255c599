"""The Hugging Face Hub and the model card. Imports `config` and `run`."""
