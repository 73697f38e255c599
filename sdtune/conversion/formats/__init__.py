"""Files of adapters: diffusers, PEFT, kohya and ComfyUI, each read into and written from one neutral form.

adapter = read(Path("in.safetensors"))          # format recognised by the keys
adapter.parts["unet"]["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"].delta()
with staged(Path("out.safetensors")) as new:    # takes its name when the block ends well
    write(new, adapter, "kohya")
"""

from sdtune.conversion.formats.files import read, staged, write
from sdtune.conversion.formats.neutral import PARTS, AdapterFile, Module, close

__all__ = ["PARTS", "AdapterFile", "Module", "close", "read", "staged", "write"]
