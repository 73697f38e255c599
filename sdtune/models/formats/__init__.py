"""Files of adapters: diffusers, PEFT, kohya and ComfyUI, read into and written from one common form.

adapter = read(Path("in.safetensors"))          # the keys say which format it is
adapter.parts["unet"]["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"].delta()
with staged(Path("out.safetensors")) as new:    # renamed to out.safetensors if the block succeeds
    write(new, adapter, "kohya")
"""

from sdtune.models.formats.files import read, staged, write
from sdtune.models.formats.keys import with_alpha
from sdtune.models.formats.neutral import PARTS, AdapterFile, Embedding, Module, close

__all__ = ["PARTS", "AdapterFile", "Embedding", "Module", "close", "read", "staged", "with_alpha", "write"]
