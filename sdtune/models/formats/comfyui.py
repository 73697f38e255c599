"""ComfyUI's loader, for Stable Diffusion 1, 2 and XL.

It reads kohya's keys, and of diffusers' only those of the attention processors of 2023: a ComfyUI file is a kohya
file. Its own deviation is DoRA on rows, where it divides by the norm of the base's weight and not of the changed one
(``weight_decompose`` in comfy/weight_adapter/base.py as of 2026). Each row is off by the ratio of the two norms.
"""

from sdtune.models.formats.kohya import tensors

__all__ = ["tensors"]

NOTE_DORA = "ComfyUI divides DoRA's rows by the norm of the base, not of the changed weight: its images differ a little"
