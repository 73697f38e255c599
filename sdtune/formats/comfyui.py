"""ComfyUI's loader, for Stable Diffusion 1, 2 and XL.

It reads kohya's keys, and of diffusers' only those of the attention processors of 2023: a ComfyUI file is a kohya
file. Its own deviation is DoRA on rows, where it divides by the norm of the base's weight and not of the changed one
(``weight_decompose`` in comfy/weight_adapter/base.py; an open pull request there, number 15458). No file can tell it
otherwise; the change of a row is off by the ratio of the two norms, which is 1 to second order.
"""

from sdtune.formats.kohya import tensors

__all__ = ["tensors"]

NOTE_DORA = "ComfyUI divides DoRA's rows by the norm of the base, not of the changed weight: its images differ a little"
